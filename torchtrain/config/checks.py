"""What is wrong with keys together: one function per subject, each yielding its faults."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torchtrain.catalog.datasets import find_dataset
from torchtrain.catalog.models import ModelShape
from torchtrain.catalog.optimizers import find_optimizer
from torchtrain.catalog.schedules import SCHEDULES
from torchtrain.config import layout
from torchtrain.config.faults import Fault
from torchtrain.config.plans import list_output_folders, plan_shape
from torchtrain.config.schema import Config
from torchtrain.config.sources import DataSource, plan_sources
from torchtrain.config.toml import quoted
from torchtrain.errors import UserError

# What gives a model its shape where no other key of [model] does.
FLAVOR_KEYS = ("model.name", "model.flavor")

# What a pipeline's stages and microbatches depend on.
PIPELINE_KEYS = (*layout.DEGREE_KEYS, *layout.PIPELINE_KEYS)

# What the user's own code may add names to.
NAMED_BY_USERS = (
    *FLAVOR_KEYS,
    "optimizer.name",
    "training.dataset",
    "data.mixture",
    "validation.dataset",
)


Faults = Iterator[Fault]


def check(config: Config, world_size: int | None) -> list[Fault]:
    """Return every combination that cannot work; a world size of None leaves the layout out."""
    return [
        *_check_tokenizer(config),
        *_check_model(config),
        *_catch(find_optimizer, config.optimizer.name),
        *_check_data(config),
        *_check_validation(config),
        *_check_degrees(config, world_size),
        *_check_sequence(config),
        *_check_pipeline(config, world_size),
        *_check_folders(config),
        *_check_profiling(config),
        *_check_compile(config),
        *_check_compiled_experts(config),
    ]


def _catch(check: Callable[..., object], *arguments: object) -> Faults:
    """Yield the user error that `check` raises as a fault."""
    try:
        check(*arguments)
    except UserError as fault:
        yield Fault(str(fault))


def _must_divide(
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


def _check_tokenizer(config: Config) -> Faults:
    model = config.model
    if model.tokenizer_path is not None and model.hf_assets_path is not None:
        yield Fault(
            f"model.tokenizer_path = {quoted(model.tokenizer_path)}, model.hf_assets_path = "
            f"{quoted(model.hf_assets_path)}: the two mean the same; give one of them"
        )


def _check_model(config: Config) -> Faults:
    try:
        shape = plan_shape(config.model)
    except UserError as fault:
        yield Fault(str(fault), FLAVOR_KEYS)
        return
    yield from _check_heads(config, shape)
    yield from _check_rope(shape)
    yield from _check_experts(config, shape)
    yield from _check_sharing(config, shape)


def _check_heads(config: Config, shape: ModelShape) -> Faults:
    given = f"model.head_width = {shape.head_width}"
    if shape.head_width == 0:
        yield from _must_divide("model.n_heads", shape.n_heads, {"model.dim": shape.dim})
        given = f"model.dim / model.n_heads = {shape.dim} / {shape.n_heads} = "
        given += str(shape.width_per_head)
    if shape.width_per_head % 2 and (shape.head_width or shape.dim % shape.n_heads == 0):
        yield Fault(
            f"{given}: the head width must be even, since RoPE rotates pairs of features",
            (*FLAVOR_KEYS, "model.head_width"),
        )
    note = ""
    if config.model.n_kv_heads is None:
        note = " (the flavor's: it does not follow n_heads; set it too)"
    heads = {"model.n_heads": shape.n_heads}
    yield from _must_divide("model.n_kv_heads", shape.n_kv_heads, heads, note)


def _check_rope(shape: ModelShape) -> Faults:
    low, high = shape.rope_low_freq_factor, shape.rope_high_freq_factor
    if shape.rope_scaling_factor > 1 and high <= low:
        yield Fault(
            f"model.rope_high_freq_factor = {high} must be above model.rope_low_freq_factor = "
            f"{low} where model.rope_scaling_factor is above 1",
            FLAVOR_KEYS,
        )


def _check_experts(config: Config, shape: ModelShape) -> Faults:
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
    ep = config.parallelism.expert_parallel_degree
    yield from _must_divide(layout.EXPERT_KEY, ep, {"model.n_experts": experts})


def _check_sharing(config: Config, shape: ModelShape) -> Faults:
    """Check that heads and features can be shared by the tensor- and context-parallel ranks."""
    parallelism = config.parallelism
    tp = parallelism.tensor_parallel_degree
    heads = {"model.n_heads": shape.n_heads, "model.n_kv_heads": shape.n_kv_heads}
    shared = dict(heads)
    if shape.n_sparse_layers < shape.n_layers:
        shared["model.ffn_hidden_dim"] = shape.ffn_hidden_dim
    yield from _must_divide("parallelism.tensor_parallel_degree", tp, shared)
    if parallelism.context_parallel_method == "ulysses":
        yield from _must_divide(
            "parallelism.context_parallel_degree",
            parallelism.context_parallel_degree * tp,
            heads,
            note=" (ulysses: times the tensor-parallel degree)",
            depends_on=(*FLAVOR_KEYS, "parallelism.context_parallel_method"),
        )


def _check_data(config: Config) -> Faults:
    data = config.data
    try:
        sources = plan_sources(config.training, data)
    except UserError as fault:
        yield Fault(str(fault))
        return
    for source in sources:
        yield from _catch(find_dataset, source.dataset, source.path, source.option)
    yield from _check_held_out(config, sources)
    if data.streaming and data.packing == "best_fit":
        yield Fault(
            'data.packing = "best_fit" looks at all documents before the first step; '
            "data.streaming = true does not"
        )


def _check_held_out(config: Config, sources: list[DataSource]) -> Faults:
    """Check that documents to validate on can be held out, where no others are named."""
    if not config.validation.enable or config.validation.dataset is not None:
        return
    what = "what data.streaming = true reads once" if config.data.streaming else ""
    for source in sources:
        if source.dataset == "tokens":
            what = f"{quoted(source.name)}, a token file ({source.option})"
    if what:
        yield Fault(
            f"validation.enable = true: no documents can be held out of {what}; name others in "
            "validation.dataset"
        )


def _check_validation(config: Config) -> Faults:
    validation = config.validation
    if not validation.enable:
        return
    if validation.dataset is not None:
        path = validation.dataset_path
        yield from _catch(find_dataset, validation.dataset, path, "validation.dataset")
    if validation.local_batch_size is not None:
        yield from _must_divide(
            "parallelism.pipeline_parallel_microbatch_size",
            config.parallelism.pipeline_parallel_microbatch_size,
            {"validation.local_batch_size": validation.local_batch_size},
            depends_on=(),
        )


def _check_degrees(config: Config, world_size: int | None) -> Faults:
    if world_size is None:
        return
    try:
        degrees = layout.plan_degrees(config.parallelism, world_size)
        layout.plan_batch(config.training, degrees.data_parallel)
    except UserError as fault:
        yield Fault(str(fault), layout.DEGREE_KEYS)


def _check_sequence(config: Config) -> Faults:
    """Check what context and sequence parallelism need of the sequence length and of documents."""
    parallelism = config.parallelism
    cp = parallelism.context_parallel_degree
    shards = layout.count_sequence_shards(parallelism)
    factor = cp * shards
    reason = f"parallelism.context_parallel_degree = {cp}"
    if cp > 1 and parallelism.context_parallel_load_balancer == "headtail":
        factor *= 2
        reason += " twice (headtail)"
    if shards > 1:
        reason += f" x parallelism.tensor_parallel_degree = {shards}"
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.enable and config.validation.seq_len is not None:
        lengths["validation.seq_len"] = config.validation.seq_len
    for key, length in lengths.items():
        if length % factor:
            yield Fault(f"{key} = {length} must be divisible by {factor}: {reason}")
    is_ring = parallelism.context_parallel_method == "ring"
    if config.training.document_masking and cp > 1 and is_ring:
        yield Fault(
            f"training.document_masking = true with parallelism.context_parallel_degree = {cp}: "
            "ring attention does not support document masks; set "
            'parallelism.context_parallel_method = "ulysses"'
        )


def _check_pipeline(config: Config, world_size: int | None) -> Faults:
    """Check the split of the model, what the schedule needs, and what it makes of a batch."""
    parallelism = config.parallelism
    ranks = parallelism.pipeline_parallel_degree
    if ranks == 1:
        return
    schedule = parallelism.pipeline_parallel_schedule
    reshard = parallelism.fsdp_reshard_after_forward
    if SCHEDULES[schedule].splits_backward and reshard == "always":
        yield Fault(
            f'parallelism.fsdp_reshard_after_forward = "always": {schedule} splits the backward, '
            'where FSDP computes wrong gradients; leave it at "default", or change '
            "parallelism.pipeline_parallel_schedule"
        )
    try:
        layer_names = plan_shape(config.model).layer_names
    except UserError:  # reported by _check_model
        return
    try:
        stages = len(layout.plan_stages(parallelism, layer_names))
    except UserError as fault:
        text = f"parallelism.pipeline_parallel_degree = {ranks}: {fault}"
        yield Fault(
            text, (*layout.DEGREE_KEYS, *layout.PIPELINE_KEYS, *FLAVOR_KEYS, "model.n_layers")
        )
        return
    yield from _check_pipeline_batch(config, world_size, stages)


def _check_pipeline_batch(config: Config, world_size: int | None, stages: int) -> Faults:
    parallelism = config.parallelism
    try:
        degrees = layout.plan_degrees(
            parallelism, world_size or parallelism.pipeline_parallel_degree
        )
        batch_size = layout.plan_batch(config.training, degrees.data_parallel).microbatch_size
    except UserError:  # reported by _check_degrees
        return
    try:
        layout.check_batch(parallelism, batch_size, stages)
    except UserError as fault:
        # How many microbatches there are depends on the world size, whether they divide does not.
        if world_size is not None or batch_size % parallelism.pipeline_parallel_microbatch_size:
            yield Fault(
                str(fault),
                (*layout.DEGREE_KEYS, *layout.PIPELINE_KEYS, "training.global_batch_size"),
            )


def _check_folders(config: Config) -> Faults:
    for key, folder in list_output_folders(config).items():
        inside = folder.parts and ".." not in folder.parts
        if not folder.is_absolute() and not inside:
            yield Fault(f"{key} = {quoted(str(folder))}: must name a folder inside job.dump_folder")
    path = config.checkpoint.initial_load_path
    if config.checkpoint.enable and path is not None and not Path(path).is_dir():
        yield Fault(
            f"checkpoint.initial_load_path = {quoted(path)} is not a folder that exists (looked "
            f"from {Path.cwd()})",
            ("checkpoint.enable",),
        )


def _check_profiling(config: Config) -> Faults:
    profiling = config.profiling
    window = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and window > profiling.profile_freq:
        yield Fault(
            f"profiling.profile_freq = {profiling.profile_freq} is too short for "
            f"profiling.profiler_warmup = {profiling.profiler_warmup} and "
            f"profiling.profiler_active = {profiling.profiler_active} steps: it must be at least "
            f"{window}"
        )


def _check_compile(config: Config) -> Faults:
    if config.compile.enable and "model" in config.compile.components:
        return
    needs = 'is done by the compiler: it needs compile.enable = true and "model" in '
    needs += "compile.components"
    if config.activation_checkpoint.mode == "memory_budget":
        yield Fault(f'activation_checkpoint.mode = "memory_budget" {needs}')
    parallelism = config.parallelism
    if parallelism.enable_async_tensor_parallel and parallelism.tensor_parallel_degree > 1:
        yield Fault(f"parallelism.enable_async_tensor_parallel = true {needs}")


def _check_compiled_experts(config: Config) -> Faults:
    """Check that experts are multiplied by one kernel, where blocks are compiled whole."""
    if not (config.compile.enable and "model" in config.compile.components):
        return
    try:
        shape = plan_shape(config.model)
    except UserError:  # reported by _check_model
        return
    if shape.n_experts == 0:
        return
    if config.training.mixed_precision_param != "bfloat16":
        yield Fault(
            f"compile.enable = true with model.n_experts = {shape.n_experts} needs "
            'training.mixed_precision_param = "bfloat16": in fp32 each expert is multiplied by '
            "itself, and the compiler cannot know how many tokens it has",
            FLAVOR_KEYS,
        )
    widths = {"model.dim": shape.dim, "model.expert_hidden_dim": shape.width_per_expert}
    for key, width in widths.items():
        if width % 8:
            yield Fault(
                f"{key} = {width} must be divisible by 8 with compile.enable = true and "
                f"model.n_experts = {shape.n_experts}: rows of 16 bytes, which the kernel reads",
                FLAVOR_KEYS,
            )
