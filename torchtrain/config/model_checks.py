"""What is wrong with the model's shape, by itself and for the ranks that share it."""

from collections.abc import Iterator

from torchtrain.catalog.models import ModelShape
from torchtrain.config.faults import Fault
from torchtrain.config.plans import plan_shape
from torchtrain.config.schema import Config
from torchtrain.errors import UserError

# What gives a model its shape where no other key of [model] does.
FLAVOR_KEYS = ("model.name", "model.flavor")

Faults = Iterator[Fault]


def check_model(config: Config) -> Faults:
    """Yield the faults of the model."""
    try:
        shape = plan_shape(config.model)
    except UserError as fault:
        yield Fault(str(fault), FLAVOR_KEYS)
        return
    yield from _check_heads(config, shape)
    yield from _check_rope(shape)
    yield from _check_experts(shape)
    yield from _check_sharing(config, shape)


def _check_heads(config: Config, shape: ModelShape) -> Faults:
    if shape.head_width == 0:
        yield from must_divide("model.n_heads", shape.n_heads, {"model.dim": shape.dim})
    if shape.width_per_head % 2 and (shape.head_width or shape.dim % shape.n_heads == 0):
        yield Fault(
            f"{describe_head_width(shape)}: the head width must be even, since RoPE rotates pairs "
            "of features",
            (*FLAVOR_KEYS, "model.head_width"),
        )
    note = ""
    if config.model.n_kv_heads is None:
        note = " (the flavor's: it does not follow n_heads; set it too)"
    heads = {"model.n_heads": shape.n_heads}
    yield from must_divide("model.n_kv_heads", shape.n_kv_heads, heads, note)


def describe_head_width(shape: ModelShape) -> str:
    """Return the head width as the config gives it."""
    if shape.head_width:
        return f"model.head_width = {shape.head_width}"
    division = f"{shape.dim} / {shape.n_heads}"
    return f"model.dim / model.n_heads = {division} = {shape.width_per_head}"


def _check_rope(shape: ModelShape) -> Faults:
    low, high = shape.rope_low_freq_factor, shape.rope_high_freq_factor
    if shape.rope_scaling_factor > 1 and high <= low:
        yield Fault(
            f"model.rope_high_freq_factor = {high} must be above model.rope_low_freq_factor = "
            f"{low} where model.rope_scaling_factor is above 1",
            FLAVOR_KEYS,
        )


def _check_experts(shape: ModelShape) -> Faults:
    """Check that there are experts enough, layers for them, and a router that can learn."""
    experts, k = shape.n_experts, shape.experts_per_token
    if experts == 0:
        return
    if k > experts:
        yield Fault(
            f"model.experts_per_token = {k} must be at most model.n_experts = {experts}",
            FLAVOR_KEYS,
        )
    if shape.n_sparse_layers == 0:
        yield Fault(
            f"model.n_dense_layers = {shape.n_dense_layers}, model.sparse_every = "
            f"{shape.sparse_every}: none of model.n_layers = {shape.n_layers} layers has "
            f"model.n_experts = {experts}",
            FLAVOR_KEYS,
        )
    if k == 1 < experts and shape.router_renormalize:
        yield Fault(
            "model.router_renormalize = true: with model.experts_per_token = 1 every weight is 1, "
            "and the router learns nothing from the loss; set it to false",
            (*FLAVOR_KEYS, "model.n_experts"),
        )


def _check_sharing(config: Config, shape: ModelShape) -> Faults:
    """Check that the ranks which share heads, features or experts have equal shares of them."""
    parallelism = config.parallelism
    experts = {"model.n_experts": shape.n_experts}
    if parallelism.expert_parallel_degree > 1 and shape.n_experts == 0:
        yield Fault(
            f"parallelism.expert_parallel_degree = {parallelism.expert_parallel_degree}: the model "
            "has no experts (model.n_experts = 0)",
            FLAVOR_KEYS,
        )
    yield from must_divide(
        "parallelism.expert_parallel_degree", parallelism.expert_parallel_degree, experts
    )
    tp = parallelism.tensor_parallel_degree
    heads = {"model.n_heads": shape.n_heads, "model.n_kv_heads": shape.n_kv_heads}
    shared = dict(heads)
    if shape.n_sparse_layers < shape.n_layers:
        shared["model.ffn_hidden_dim"] = shape.ffn_hidden_dim
    yield from must_divide("parallelism.tensor_parallel_degree", tp, shared)
    if shape.n_experts > 0 and parallelism.disable_sequence_parallel:
        lengths = {"training.seq_len": config.training.seq_len}
        if config.validation.enable and config.validation.seq_len is not None:
            lengths["validation.seq_len"] = config.validation.seq_len
        yield from must_divide(
            "parallelism.tensor_parallel_degree",
            parallelism.context_parallel_degree * tp,
            lengths,
            note=" (experts compute shards of a sequence: times the context-parallel degree)",
        )
    if parallelism.context_parallel_method == "ulysses":
        yield from must_divide(
            "parallelism.context_parallel_degree",
            parallelism.context_parallel_degree * tp,
            heads,
            note=" (ulysses: times the tensor-parallel degree)",
            depends_on=(*FLAVOR_KEYS, "parallelism.context_parallel_method"),
        )


def must_divide(
    key: str,
    divisor: int,
    numbers: dict[str, int],
    note: str = "",
    depends_on: tuple[str, ...] = FLAVOR_KEYS,
) -> Faults:
    """Yield a fault for each number, given by its key, that the divisor does not divide.

    `note` says why the divisor is not the value of its own key.
    """
    for divided, number in numbers.items():
        if number % divisor:
            yield Fault(f"{key} = {divisor}{note} must divide {divided} = {number}", depends_on)
