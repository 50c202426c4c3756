"""What is wrong with keys together: one function per subject, each yielding its faults."""

from collections.abc import Callable
from pathlib import Path

from torchtrain.catalog.datasets import find_dataset
from torchtrain.catalog.optimizers import find_optimizer
from torchtrain.catalog.parameters import count_parameters, list_parameters
from torchtrain.catalog.schedules import SCHEDULES
from torchtrain.config import layout
from torchtrain.config.faults import Fault
from torchtrain.config.model_checks import FLAVOR_KEYS, Faults, check_model, must_divide
from torchtrain.config.parameter_groups import check_groups
from torchtrain.config.plans import list_output_folders, plan_shape
from torchtrain.config.rules import plan_length, plan_rate
from torchtrain.config.schema import Checkpoint, Config
from torchtrain.config.sources import DataSource, plan_sources
from torchtrain.config.toml import quoted
from torchtrain.errors import UserError
from torchtrain.utils import describe_no_folder, expand_user

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


def check(config: Config, world_size: int | None) -> list[Fault]:
    """Return every combination that cannot work; a world size of None leaves the layout out."""
    return [
        *_check_tokenizer(config),
        *check_model(config),
        *_catch(find_optimizer, config.optimizer.name),
        *_check_groups(config),
        *_check_rules(config),
        *_check_state_dtype(config),
        *_check_float8(config),
        *_check_data(config),
        *_check_validation(config),
        *_check_degrees(config, world_size),
        *_check_sequence(config),
        *_check_pipeline(config, world_size),
        *_check_folders(config),
        *_check_profiling(config),
        *_check_compile(config),
    ]


def _catch(check: Callable[..., object], *arguments: object) -> Faults:
    """Yield the user error that `check` raises as a fault."""
    try:
        check(*arguments)
    except UserError as fault:
        yield Fault(str(fault))


def _check_tokenizer(config: Config) -> Faults:
    model = config.model
    if model.tokenizer_path is not None and model.hf_assets_path is not None:
        yield Fault(
            f"model.tokenizer_path = {quoted(model.tokenizer_path)}, model.hf_assets_path = "
            f"{quoted(model.hf_assets_path)}: the two mean the same; give one of them"
        )


def _check_groups(config: Config) -> Faults:
    """Check what `optimizer.groups` set, and for which names where the model's are known."""
    groups = config.optimizer.groups
    for group in groups:
        if group.lr is None and group.weight_decay is None:
            pattern = quoted(group.pattern)
            yield Fault(f"optimizer.groups: {pattern} sets nothing; give it lr or weight_decay")
    try:
        names = list_parameters(config.model.name, plan_shape(config.model))
    except UserError:  # reported by _check_model
        return
    if names is None:
        return
    try:
        check_groups(names, groups)
    except UserError as fault:
        yield Fault(str(fault), FLAVOR_KEYS)


def _check_rules(config: Config) -> Faults:
    """Check that the published rules which the config asks for know what they need to."""
    try:
        count = count_parameters(config.model.name, plan_shape(config.model))
    except UserError:  # reported by _check_model
        return
    for fault in (
        *_catch(plan_length, config.training, count, 1),
        *_catch(plan_rate, config.optimizer, count, 1, 1, 0.0),
    ):
        yield Fault(fault.text, FLAVOR_KEYS)


def _check_state_dtype(config: Config) -> Faults:
    if config.optimizer.state_dtype == "float32" and config.training.dtype == "bfloat16":
        yield Fault(
            'optimizer.state_dtype = "float32": with training.dtype = "bfloat16" an optimizer\'s '
            'states are bfloat16 too; set training.dtype = "float32", or leave it out'
        )


def _check_float8(config: Config) -> Faults:
    if not config.model.converters:
        return
    key = "quantize.linear.float8.filter_fqns"
    section = config.quantize_linear_float8
    if "auto_filter_small_kn" in section.filter_fqns:
        yield Fault(
            f'{key}: "auto_filter_small_kn", by which torchtitan leaves small layers out, is not '
            "supported; name them"
        )
    if section.enable_fsdp_float8_all_gather and section.recipe_name not in (None, "tensorwise"):
        yield Fault(
            "quantize.linear.float8.enable_fsdp_float8_all_gather = true: FSDP gathers in float8 "
            f'only what is scaled as one tensor, and with recipe_name = "{section.recipe_name}" '
            'each row has a scale; set recipe_name = "tensorwise", or leave this out'
        )
    shape = plan_shape(config.model)
    shards = config.parallelism.context_parallel_degree
    if shape.n_shared_experts:  # which compute a shard of the sequence
        shards *= layout.count_sequence_shards(config.parallelism)
    if config.training.seq_len % (layout.FLOAT8_MULTIPLE * shards):
        yield Fault(
            f"training.seq_len = {config.training.seq_len}: with float8 (model.converters) each "
            f"rank's part of a sequence must be a multiple of {layout.FLOAT8_MULTIPLE} tokens"
            + (f", and {shards} ranks share one" if shards > 1 else "")
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
        yield from must_divide(
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
    others = {
        "parallelism.tensor_parallel_degree": parallelism.tensor_parallel_degree,
        "parallelism.context_parallel_degree": parallelism.context_parallel_degree,
    }
    for key, degree in others.items():
        if layout.overlaps_exchanges(parallelism) and degree > 1:
            yield Fault(
                f"{key} = {degree} exchanges within what DualPipeV overlaps, in an order that may "
                "differ between ranks; set "
                "parallelism.pipeline_parallel_expert_parallel_overlap = false"
            )
    try:
        layer_names = plan_shape(config.model).layer_names
    except UserError:  # reported by _check_model
        return
    try:
        stages = len(layout.plan_stages(parallelism, layer_names))
    except UserError as fault:
        text = f"parallelism.pipeline_parallel_degree = {ranks}: {fault}"
        yield Fault(text, (*PIPELINE_KEYS, *FLAVOR_KEYS, "model.n_layers"))
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
                (*PIPELINE_KEYS, "training.global_batch_size"),
            )


def _check_folders(config: Config) -> Faults:
    for key, given in (
        ("job.dump_folder", config.job.dump_folder),
        ("checkpoint.folder", config.checkpoint.folder),
        ("metrics.save_tb_folder", config.metrics.save_tb_folder),
        ("profiling.save_traces_folder", config.profiling.save_traces_folder),
        ("profiling.save_memory_snapshot_folder", config.profiling.save_memory_snapshot_folder),
        ("data.cache_folder", config.data.cache_folder or ""),
    ):
        if fault := describe_no_folder(given):
            yield Fault(f"{key} = {quoted(given)} {fault}")
    for key, folder in list_output_folders(config).items():
        inside = folder.parts and ".." not in folder.parts
        if not folder.is_absolute() and not inside:
            yield Fault(f"{key} = {quoted(str(folder))}: must name a folder inside job.dump_folder")
    yield from _check_initial_load(config.checkpoint)


def _check_initial_load(checkpoint: Checkpoint) -> Faults:
    path = checkpoint.initial_load_path
    if not checkpoint.enable:
        return
    in_hf = checkpoint.initial_load_in_hf
    there = expand_user(path) if path is not None else None
    if there is not None and not (there.exists() if in_hf else there.is_dir()):
        yield Fault(
            f"checkpoint.initial_load_path = {quoted(path)} is not a folder that exists (looked "
            f"from {Path.cwd()})",
            ("checkpoint.enable",),
        )
    if in_hf and path is None:
        yield Fault(
            "checkpoint.initial_load_in_hf = true needs checkpoint.initial_load_path: the Hugging "
            "Face folder with the weights",
            ("checkpoint.enable",),
        )
    if in_hf and not checkpoint.initial_load_model_only:
        yield Fault(
            "checkpoint.initial_load_model_only = false: a Hugging Face folder "
            "(checkpoint.initial_load_in_hf) holds nothing but weights",
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
