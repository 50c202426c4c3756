"""What is wrong with keys together: one function per subject, each yielding its faults."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchtrain.catalog.datasets import find_dataset
from torchtrain.catalog.models import ModelShape
from torchtrain.catalog.optimizers import find_optimizer
from torchtrain.catalog.schedules import SCHEDULES
from torchtrain.config.faults import Fault
from torchtrain.config.layout import (
    DEGREE_KEYS,
    check_batch,
    count_sequence_shards,
    plan_batch,
    plan_degrees,
    plan_stages,
)
from torchtrain.config.plans import list_output_folders, plan_shape
from torchtrain.config.schema import Config
from torchtrain.config.sources import DataSource, plan_sources, plan_validation_sources
from torchtrain.config.toml import quoted
from torchtrain.errors import UserError

# What gives a model its shape where no other key of [model] does.
FLAVOR_KEYS = ("model.name", "model.flavor")

# What the user's own code may add names to.
NAMED_BY_USERS = (
    *FLAVOR_KEYS,
    "optimizer.name",
    "training.dataset",
    "data.mixture",
    "validation.dataset",
)

PIPELINE_KEYS = (
    "parallelism.pipeline_parallel_schedule",
    "parallelism.pipeline_parallel_microbatch_size",
    "parallelism.pipeline_parallel_layers_per_stage",
    "parallelism.pipeline_parallel_first_stage_less_layers",
    "parallelism.pipeline_parallel_last_stage_less_layers",
    "parallelism.module_fqns_per_model_part",
)


def check(config: Config, world_size: int | None) -> list[Fault]:
    """Return every combination that cannot work; a world size of None leaves the layout out."""
    return [
        *_check_model(config),
        *_check_optimizer(config),
        *_check_data(config),
        *_check_validation(config),
        *_check_degrees(config, world_size),
        *_check_sequence(config),
        *_check_pipeline(config, world_size),
        *_check_folders(config),
        *_check_profiling(config),
        *_check_compile(config),
    ]


@dataclass(frozen=True)
class Number:
    """A number and the option that it comes from."""

    key: str
    value: int
    note: str = ""
    """Why the value is not the option's own."""


def _must_divide(divisor: Number, number: Number, *keys: str) -> Iterator[Fault]:
    """Yield a fault unless one divides the other; `keys` are what else they depend on."""
    if number.value % divisor.value:
        yield Fault(
            (divisor.key, number.key, *keys),
            f"{divisor.key} = {divisor.value}{divisor.note} must divide "
            f"{number.key} = {number.value}{number.note}",
        )


def _check_model(config: Config) -> Iterator[Fault]:
    model = config.model
    if model.tokenizer_path is not None and model.hf_assets_path is not None:
        yield Fault(
            ("model.tokenizer_path", "model.hf_assets_path"),
            f"model.tokenizer_path = {quoted(model.tokenizer_path)}, model.hf_assets_path = "
            f"{quoted(model.hf_assets_path)}: the two mean the same; give one of them",
        )
    try:
        shape = plan_shape(model)
    except UserError as fault:
        yield Fault(FLAVOR_KEYS, str(fault))
        return
    yield from _check_shape(config, shape)
    yield from _check_sharing(config, shape)


def _check_shape(config: Config, shape: ModelShape) -> Iterator[Fault]:
    dim = Number("model.dim", shape.dim)
    n_heads = Number("model.n_heads", shape.n_heads)
    inherited = " (the flavor's: it does not follow n_heads; set it too)"
    note = inherited if config.model.n_kv_heads is None else ""
    yield from _must_divide(n_heads, dim, *FLAVOR_KEYS)
    head_width, rest = divmod(shape.dim, shape.n_heads)
    if rest == 0 and head_width % 2:
        yield Fault(
            (*FLAVOR_KEYS, "model.dim", "model.n_heads"),
            f"model.dim / model.n_heads = {shape.dim} / {shape.n_heads} = {head_width}: the head "
            "width must be even, since RoPE rotates pairs of features",
        )
    yield from _must_divide(
        Number("model.n_kv_heads", shape.n_kv_heads, note), n_heads, *FLAVOR_KEYS
    )
    if shape.rope_scaling_factor > 1 and shape.rope_high_freq_factor <= shape.rope_low_freq_factor:
        yield Fault(
            (
                *FLAVOR_KEYS,
                "model.rope_scaling_factor",
                "model.rope_high_freq_factor",
                "model.rope_low_freq_factor",
            ),
            f"model.rope_high_freq_factor = {shape.rope_high_freq_factor} must be above "
            f"model.rope_low_freq_factor = {shape.rope_low_freq_factor}",
        )


def _check_sharing(config: Config, shape: ModelShape) -> Iterator[Fault]:
    """Check that heads and features can be shared by the tensor- and context-parallel ranks."""
    parallelism = config.parallelism
    tp = parallelism.tensor_parallel_degree
    tensor_parallel = Number("parallelism.tensor_parallel_degree", tp)
    context_parallel = Number(
        "parallelism.context_parallel_degree",
        parallelism.context_parallel_degree * tp,
        " (ulysses: times the tensor-parallel degree)",
    )
    heads = [
        Number("model.n_heads", shape.n_heads),
        Number("model.n_kv_heads", shape.n_kv_heads),
    ]
    for shared in [*heads, Number("model.ffn_hidden_dim", shape.ffn_hidden_dim)]:
        yield from _must_divide(tensor_parallel, shared, *FLAVOR_KEYS)
    if parallelism.context_parallel_method == "ulysses":
        for shared in heads:
            yield from _must_divide(
                context_parallel, shared, *FLAVOR_KEYS, "parallelism.context_parallel_method"
            )


def _check_optimizer(config: Config) -> Iterator[Fault]:
    try:
        find_optimizer(config.optimizer.name)
    except UserError as fault:
        yield Fault(("optimizer.name",), str(fault))


def _check_data(config: Config) -> Iterator[Fault]:
    data, validation = config.data, config.validation
    keys: tuple[str, ...] = ("training.dataset", "training.dataset_path")
    if data.mixture is not None:
        keys = ("data.mixture",)
    try:
        sources = plan_sources(config.training, data)
    except UserError as fault:
        yield Fault(keys, str(fault))
        return
    for source in sources:
        prefix = f"data.mixture: {quoted(source.name)}: " if data.mixture is not None else ""
        yield from _check_source(source, keys, prefix)
    holds_out = validation.enable and validation.dataset is None
    for source in sources:
        if holds_out and source.dataset == "tokens":
            what = f"{quoted(source.name)}, a token file,"
            yield _cannot_hold_out(what, keys)
            break
    else:
        if holds_out and data.streaming:
            yield _cannot_hold_out("what data.streaming = true reads once", keys)
    if data.streaming and data.packing == "best_fit":
        yield Fault(
            ("data.packing", "data.streaming"),
            'data.packing = "best_fit" looks at all documents before the first step; '
            "data.streaming = true does not",
        )


def _check_source(source: DataSource, keys: tuple[str, ...], prefix: str = "") -> Iterator[Fault]:
    try:
        find_dataset(source.dataset, source.path, source.option)
    except UserError as fault:
        yield Fault(keys, f"{prefix}{fault}")


def _cannot_hold_out(what: str, keys: tuple[str, ...]) -> Fault:
    return Fault(
        ("validation.dataset", "data.streaming", *keys),
        f"validation.enable = true: no documents can be held out of {what}; name others in "
        "validation.dataset",
    )


def _check_validation(config: Config) -> Iterator[Fault]:
    validation = config.validation
    if not validation.enable:
        return
    if validation.dataset is not None:
        for source in plan_validation_sources(config):
            keys = ("validation.dataset", "validation.dataset_path")
            yield from _check_source(source, keys)
    if validation.local_batch_size is not None:
        microbatch_size = config.parallelism.pipeline_parallel_microbatch_size
        yield from _must_divide(
            Number("parallelism.pipeline_parallel_microbatch_size", microbatch_size),
            Number("validation.local_batch_size", validation.local_batch_size),
        )


def _check_degrees(config: Config, world_size: int | None) -> Iterator[Fault]:
    if world_size is None:
        return
    try:
        degrees = plan_degrees(config.parallelism, world_size)
    except UserError as fault:
        yield Fault(DEGREE_KEYS, str(fault))
        return
    try:
        plan_batch(config.training, degrees.data_parallel)
    except UserError as fault:
        yield Fault(("training.global_batch_size", *DEGREE_KEYS), str(fault))


def _check_sequence(config: Config) -> Iterator[Fault]:
    """Check what context and sequence parallelism need of the sequence length and of documents."""
    parallelism = config.parallelism
    cp = parallelism.context_parallel_degree
    shards = count_sequence_shards(parallelism)
    head_and_tail = cp > 1 and parallelism.context_parallel_load_balancer == "headtail"
    factor = cp * shards * (2 if head_and_tail else 1)
    reason = f"context-parallel degree {cp}"
    if head_and_tail:
        reason += " twice (headtail)"
    if shards > 1:
        reason += f" x tensor-parallel degree {shards}"
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.enable and config.validation.seq_len is not None:
        lengths["validation.seq_len"] = config.validation.seq_len
    for key, length in lengths.items():
        if length % factor:
            yield Fault(
                (key, "parallelism.tensor_parallel_degree", "parallelism.context_parallel_degree"),
                f"{key} = {length} must be divisible by {factor}: {reason}",
            )
    is_ring = parallelism.context_parallel_method == "ring"
    if config.training.document_masking and cp > 1 and is_ring:
        yield Fault(
            (
                "training.document_masking",
                "parallelism.context_parallel_degree",
                "parallelism.context_parallel_method",
            ),
            f"training.document_masking = true with parallelism.context_parallel_degree = {cp}: "
            "ring attention does not support document masks; set "
            'parallelism.context_parallel_method = "ulysses"',
        )


def _check_pipeline(config: Config, world_size: int | None) -> Iterator[Fault]:
    """Check the split of the model, what the schedule needs, and what it makes of a batch."""
    parallelism = config.parallelism
    ranks = parallelism.pipeline_parallel_degree
    if ranks == 1:
        return
    schedule = parallelism.pipeline_parallel_schedule
    always_reshards = parallelism.fsdp_reshard_after_forward == "always"
    if SCHEDULES[schedule].splits_backward and always_reshards:
        yield Fault(
            ("parallelism.fsdp_reshard_after_forward", "parallelism.pipeline_parallel_schedule"),
            f'parallelism.fsdp_reshard_after_forward = "always": {schedule} splits the backward, '
            'where FSDP computes wrong gradients; leave it at "default"',
        )
    try:
        layer_names = plan_shape(config.model).layer_names
    except UserError:  # reported by _check_model
        return
    try:
        stages = len(plan_stages(parallelism, layer_names))
    except UserError as fault:
        yield Fault(
            (*DEGREE_KEYS, *PIPELINE_KEYS, *FLAVOR_KEYS, "model.n_layers"),
            f"parallelism.pipeline_parallel_degree = {ranks}: {fault}",
        )
        return
    yield from _check_pipeline_batch(config, world_size, stages)


def _check_pipeline_batch(config: Config, world_size: int | None, stages: int) -> Iterator[Fault]:
    parallelism = config.parallelism
    ranks = world_size or parallelism.pipeline_parallel_degree
    try:
        degrees = plan_degrees(parallelism, ranks)
        batch_size = plan_batch(config.training, degrees.data_parallel).microbatch_size
    except UserError:  # reported by _check_degrees
        return
    try:
        check_batch(parallelism, batch_size, stages)
    except UserError as fault:
        cannot_divide = batch_size % parallelism.pipeline_parallel_microbatch_size
        if world_size is not None or cannot_divide:
            yield Fault(
                (
                    *DEGREE_KEYS,
                    *PIPELINE_KEYS,
                    "training.local_batch_size",
                    "training.global_batch_size",
                ),
                str(fault),
            )


def _check_folders(config: Config) -> Iterator[Fault]:
    for key, folder in list_output_folders(config).items():
        inside = folder.parts and ".." not in folder.parts
        if not folder.is_absolute() and not inside:
            text = f"{key} = {quoted(str(folder))}: must name a folder inside job.dump_folder"
            yield Fault((key,), text)
    path = config.checkpoint.initial_load_path
    if config.checkpoint.enable and path is not None and not Path(path).is_dir():
        key = "checkpoint.initial_load_path"
        text = f"{key} = {quoted(path)} is not a folder that exists (looked from {Path.cwd()})"
        yield Fault((key, "checkpoint.enable"), text)


def _check_profiling(config: Config) -> Iterator[Fault]:
    profiling = config.profiling
    window = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and window > profiling.profile_freq:
        yield Fault(
            ("profiling.profile_freq", "profiling.profiler_warmup", "profiling.profiler_active"),
            f"profiling.profile_freq = {profiling.profile_freq} is too short for "
            f"profiling.profiler_warmup = {profiling.profiler_warmup} and "
            f"profiling.profiler_active = {profiling.profiler_active} steps: it must be at least "
            f"{window}",
        )


def _check_compile(config: Config) -> Iterator[Fault]:
    if config.compile.enable and "model" in config.compile.components:
        return
    wanted = {
        'activation_checkpoint.mode = "memory_budget"': (
            config.activation_checkpoint.mode == "memory_budget"
        ),
        "parallelism.enable_async_tensor_parallel = true": (
            config.parallelism.enable_async_tensor_parallel
            and config.parallelism.tensor_parallel_degree > 1
        ),
    }
    for option, is_wanted in wanted.items():
        if is_wanted:
            yield Fault(
                (option.partition(" ")[0], "compile.enable", "compile.components"),
                f"{option} is done by the compiler: it needs compile.enable = true with the "
                "component model",
            )
