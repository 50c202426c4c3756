"""The configuration of a run: typed sections, filled from a TOML file and the command line, checked whole.

    config = JobConfig().parse_args()          # default < TOML < command line
    python -m torchtrain.config_manager --world-size 8 -- --job.config_file FILE ...     # check alone

Sections and keys have torchtitan v0.2.2's names where it has an option for the same thing
(https://github.com/pytorch/torchtitan/blob/v0.2.2/torchtitan/config/job_config.py); `[data]` is ours. A field's
docstring is its help text; its type and bounds are what the help and the messages say is allowed.
"""

import functools
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tomli
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from torchtrain.catalog import schedules as pipeline_stages
from torchtrain.catalog.datasets import DATASETS, find_dataset, import_custom
from torchtrain.catalog.models import FLAVORS, ModelShape, resolve_shape
from torchtrain.errors import ConfigError, UserError
from torchtrain.utils import nearest

DEBUG_TOKENIZER = Path(__file__).parent / "datasets" / "debug_tokenizer.model"


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("zero")
    return value


def _utf8(value: str) -> str:
    if "\0" in value:
        raise ValueError("NUL, which no path can hold")
    value.encode()  # bytes of the command line that were no UTF-8 arrive as lone surrogates, which no file can hold
    return value


Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
CountOrAuto = Annotated[
    int, Field(ge=-1, le=10**9, json_schema_extra={"not": {"const": 0}}), AfterValidator(_not_zero)
]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, AfterValidator(_utf8)]
Name = Annotated[Text, Field(min_length=1)]
Pieces = Annotated[list[Name], Field(min_length=1)]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """What all sections share: no unknown key, no conversion between types (an int may stand for a float), no NaN."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Job(Section):
    """The run itself."""

    config_file: str | None = None
    """TOML file to read; on the command line alone."""
    dump_folder: Name = "./outputs"
    """Folder that gets all outputs of the run."""
    description: Text = "default job"
    """What the run is for, in your words."""
    print_config: bool = False
    """Print the merged config at the start."""


class Profiling(Section):
    """Profiler traces and memory snapshots."""

    enable_profiling: bool = False
    """Record PyTorch profiler traces."""
    save_traces_folder: Name = "profiling/traces"
    """Folder of the traces, inside job.dump_folder."""
    profile_freq: Count = 10
    """Steps from one trace, or memory snapshot, to the next."""
    profiler_active: Count = 1
    """Steps that a trace records."""
    profiler_warmup: CountOrZero = 3
    """Steps for which the profiler runs before it records."""
    enable_memory_snapshot: bool = False
    """Dump the allocation history each profile_freq steps (CUDA)."""
    save_memory_snapshot_folder: Name = "profiling/memory"
    """Folder of the memory snapshots, inside job.dump_folder."""


class Metrics(Section):
    """What is logged, and where to."""

    log_freq: Count = 1
    """Steps from one full line (loss, gradient norm, speed, memory) to the next."""
    enable_tensorboard: bool = False
    """Write TensorBoard scalars."""
    disable_color_printing: bool = False
    """Plain lines, on a terminal too."""
    save_tb_folder: Name = "tb"
    """Folder of the TensorBoard files, inside job.dump_folder."""
    enable_wandb: bool = False
    """Log to Weights & Biases (to be installed separately)."""


class Model(Section):
    """Which model: a family, a size of it, a tokenizer. The keys from dim on replace the flavor's own value."""

    name: Text = "llama3"
    """Model family."""
    flavor: Text = "debugmodel"
    """Size within the family."""
    tokenizer_path: Name | None = None
    """Tokenizer file, or the folder that holds it; unset: the small tokenizer of the debug runs."""
    hf_assets_path: Name | None = None
    """The same under torchtitan's name; give one of the two."""
    dim: Count | None = None
    """Model width, in features."""
    n_layers: Count | None = None
    """Transformer blocks."""
    n_heads: Count | None = None
    """Query heads; must divide dim into heads of an even width."""
    n_kv_heads: Count | None = None
    """Key/value heads; must divide n_heads."""
    ffn_hidden_dim: Count | None = None
    """Feed-forward width, in features."""
    vocab_size: CountOrZero | None = None
    """Rows of the embedding; 0 takes the tokenizer's size."""
    rope_theta: Positive | None = None
    """Base of the rotary frequencies."""
    norm_eps: Positive | None = None
    """Added to the mean square inside RMSNorm."""
    tied_embeddings: bool | None = None
    """Use the embedding matrix as the output projection too."""
    rope_scaling_factor: Annotated[float, Field(ge=1)] | None = None
    """Llama 3.1's context extension: divisor of the low rotary frequencies; 1 turns it off."""
    rope_low_freq_factor: Positive | None = None
    """Wavelengths above rope_original_seq_len / this are scaled in full."""
    rope_high_freq_factor: Positive | None = None
    """Wavelengths below rope_original_seq_len / this are left alone; must be above rope_low_freq_factor."""
    rope_original_seq_len: Count | None = None
    """Context, in tokens, for which the unscaled frequencies were trained."""


class Optimizer(Section):
    """The optimizer."""

    name: Literal["AdamW", "Adam"] = "AdamW"
    """Algorithm."""
    lr: Positive = 8e-4
    """Largest learning rate; [lr_scheduler] says how it is reached and left."""
    beta1: Beta = 0.9
    """Decay, a step, of the running mean of the gradient."""
    beta2: Beta = 0.95
    """Decay, a step, of the running mean of its square."""
    eps: Positive = 1e-8
    """Added to the root of the running mean square."""
    weight_decay: NotNegative = 0.1
    """Decay of the weights, times the learning rate a step; norms are left out."""
    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """PyTorch's implementation; fused is the fastest."""


class LRScheduler(Section):
    """The learning rate over the run: linear warm-up, a stable stretch if asked for, decay."""

    warmup_steps: CountOrZero | None = None
    """Steps of warm-up, 0 for none; unset: from warmup_ratio. Goes before warmup_ratio."""
    warmup_ratio: Share = 0.1
    """Share of total_steps that warms up, but at least 2 steps."""
    total_steps: Count | None = None
    """Steps that the schedule spans; unset: training.steps."""
    decay_ratio: Share | None = None
    """Share of total_steps that decays; unset: all after the warm-up."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""
    min_lr_factor: Share = 0.1
    """Learning rate at the last step, as a share of optimizer.lr."""
    log_schedule: bool = True
    """State the schedule at the start."""
    log_lr: bool = True
    """Log the learning rate of every step."""


class Training(Section):
    """Data, batch, length and precision."""

    dataset: Text = "python_stdlib"
    """Name of the dataset, or owner/name[:config[:split]] of one of the Hugging Face Hub."""
    dataset_path: Name | None = None
    """File or folder with the documents, for the datasets that read your own."""
    local_batch_size: Count = 8
    """Largest microbatch of a rank, in sequences."""
    global_batch_size: CountOrAuto = -1
    """Sequences in an optimizer step over all ranks; -1: local_batch_size x data-parallel degree."""
    seq_len: Count = 2048
    """Sequence length, in tokens."""
    max_norm: Positive = 1.0
    """Norm to which a larger gradient is clipped."""
    steps: Count = 10_000
    """Optimizer steps of the run."""
    document_masking: bool = False
    """Keep documents in a sequence apart: no attention, no position and no label goes beyond a document's border."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in the host's memory, the accelerator's for compute alone."""
    dtype: Dtype = "float32"
    """Type in which parameters and optimizer states are kept."""
    mixed_precision_param: Dtype = "bfloat16"
    """Type in which the model computes."""
    mixed_precision_reduce: Dtype = "float32"
    """Type in which gradients are summed over ranks."""
    gc_freq: Count = 50
    """Steps from one garbage collection to the next, the same on all ranks."""
    gc_debug: bool = False
    """Collect everything at each step, and say what was found."""


class Data(Section):
    """How documents become tokens."""

    cache_folder: Name | None = None
    """Folder of the token cache; unset: $XDG_CACHE_HOME/torchtrain or ~/.cache/torchtrain."""
    text_key: Name = "text"
    """Field of a jsonl line, a parquet row or a hub's dataset that holds the document."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What becomes of a row that is no document: the run stops, naming it, or it is left out and counted."""
    mixture: Pieces | None = None
    """Several sources instead of training.dataset, each "dataset = weight" or "dataset path = weight"."""
    packing: Literal["cut", "best_fit"] = "cut"
    """How documents fill sequences: one after the other, cut where a sequence ends; or whole, by best fit, padded."""
    token_dtype: Literal["uint16", "uint32"] | None = None
    """Type of the ids in token files that don't say; unset: the smallest that holds the vocabulary."""
    streaming: bool = False
    """Tokenise documents while they are read, in the corpus' order, instead of all of them before the first step."""
    streams: Count = 8
    """Rows of documents in which a streamed corpus is read; they fix the order, whatever the number of ranks."""
    stall_timeout_seconds: Count = 60
    """How long a streamed corpus may give no document before the run ends."""


class Parallelism(Section):
    """How the model is spread; the product of the degrees is the world size."""

    data_parallel_replicate_degree: Count = 1
    """Copies of the (sharded) model."""
    data_parallel_shard_degree: CountOrAuto = -1
    """Ranks that share a copy of parameters, gradients and optimizer states; -1: all that are left."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """When a block's gathered parameters are freed: less memory (always) or less communication (never)."""
    tensor_parallel_degree: Count = 1
    """Ranks that share each matrix product."""
    disable_sequence_parallel: bool = False
    """With tensor parallelism, keep whole sequences between the products (more memory)."""
    disable_loss_parallel: bool = False
    """With tensor parallelism, gather the logits for the loss (more memory)."""
    enable_async_tensor_parallel: bool = False
    """With tensor parallelism under compile on CUDA, overlap the products with their communication."""
    pipeline_parallel_degree: Count = 1
    """Ranks that share the layers, each with one stage or several."""
    pipeline_parallel_schedule: Literal[
        "GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
    ] = "1F1B"
    """Order of forwards and backwards; the first two take one stage a rank, the interleaved several, the others two."""
    pipeline_parallel_microbatch_size: Count = 1
    """Sequences in a microbatch of the pipeline; must divide the batch that passes it, at most local_batch_size."""
    pipeline_parallel_layers_per_stage: Count | None = None
    """Layers in a stage; unset: as many as give the schedule the fewest stages it takes."""
    pipeline_parallel_first_stage_less_layers: CountOrZero = 1
    """Layers that the embedding stands for, by which the first stage is lighter."""
    pipeline_parallel_last_stage_less_layers: CountOrZero = 1
    """Layers that the output stands for, by which the last stage is lighter."""
    module_fqns_per_model_part: Annotated[list[Pieces], Field(min_length=1)] | None = None
    """The pieces of each stage, from tok_embeddings, layers.0 on, norm and output; unset: cut evenly."""
    context_parallel_degree: Count = 1
    """Ranks that share each sequence."""
    context_parallel_method: Literal["ring", "ulysses"] = "ring"
    """How attention sees the whole sequence: keys and values travel (ring), or heads are exchanged (ulysses)."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """How keys and values travel in the ring: all at once, or shard by shard."""
    context_parallel_load_balancer: Literal["headtail", "none"] = "headtail"
    """Give each rank a piece of the sequence's head and one of its tail, so that causal work is even (headtail)."""


class Checkpoint(Section):
    """Saving and resuming."""

    enable: bool = False
    """Save checkpoints, and resume from the newest complete one in the folder."""
    folder: Name = "checkpoint"
    """Folder of the checkpoints, inside job.dump_folder."""
    interval: Count = 500
    """Steps from one checkpoint to the next; the last step is always saved."""
    initial_load_path: Name | None = None
    """Checkpoint (a step-N folder) to start from while the run has none of its own."""
    initial_load_model_only: bool = True
    """Take the weights alone from initial_load_path, not optimizer, step and data position."""
    keep_latest_k: CountOrZero = 10
    """Checkpoints to keep, 0 for all."""
    load_step: CountOrAuto = -1
    """Step to resume from; -1: the newest."""
    enable_first_step_checkpoint: bool = False
    """Save after the first step too, to see early that saving works."""
    load_only: bool = False
    """Load, but save nothing."""
    accept_changed_data: bool = False
    """Go on although batch size, sequence length, corpus, tokenizer or seed differ from the checkpoint's; says how."""


class ActivationCheckpoint(Section):
    """Recomputing activations in the backward, for memory."""

    mode: Literal["none", "full", "selective", "memory_budget"] = "none"
    """Keep all activations; recompute each block's; some of them; or let the compiler choose within a budget."""
    selective_ac_option: Annotated[str, Field(pattern=r"^(op|[1-9][0-9]*)$")] = "2"
    """What selective recomputes: every n-th block whole ("2"), or in each block all but the costly products ("op")."""
    memory_budget: Share = 0.5
    """Share of the activations that the compiler may keep (mode memory_budget): 0 as full, 1 as none."""


class Compile(Section):
    """torch.compile."""

    enable: bool = False
    """Compile the components."""
    components: Annotated[list[Literal["model", "loss"]], Field(min_length=1)] = ["model", "loss"]
    """What is compiled: the model block by block, the loss."""
    backend: Name = "inductor"
    """Backend of torch.compile."""


class Comm(Section):
    """Communication between ranks."""

    init_timeout_seconds: Count = 300
    """Longest wait for other ranks during set-up and the first step, in seconds."""
    train_timeout_seconds: Count = 100
    """The same from the second step on, in seconds."""


class Validation(Section):
    """The loss on documents that are not trained on, while training."""

    enable: bool = False
    """Validate after every freq steps and after the last."""
    dataset: Name | None = None
    """Documents to validate on, as training.dataset names them; unset: a part of the training corpus is held out."""
    dataset_path: Name | None = None
    """File or folder with the documents, for the datasets that read your own."""
    held_out_share: Part = 0.01
    """Share of the training corpus' documents that is held out, and never trained on, where dataset is unset."""
    local_batch_size: Count | None = None
    """Sequences that a rank evaluates together; unset: the microbatch of training. Changes no result."""
    seq_len: Count | None = None
    """Sequence length, in tokens; unset: training.seq_len."""
    freq: Count = 10
    """Steps from one validation to the next."""
    steps: CountOrAuto = -1
    """Batches of training.global_batch_size sequences in one validation; -1: all there are."""


class Debug(Section):
    """Reproducing and finding faults."""

    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of initial weights and data order."""
    deterministic: bool = False
    """Use deterministic kernels alone; an operation that has none is an error."""
    deterministic_warn_only: bool = False
    """Make that error a warning."""
    detect_anomaly: bool = False
    """Find the operation whose gradient is NaN (slow)."""


class Experimental(Section):
    """Your own code."""

    custom_import: Text = ""
    """Module (dotted) or .py file that is run before the config is checked, to register a dataset; empty: none."""


# What names datasets, which the user's own code may add to.
DATASET_KEYS = ("training.dataset", "data.mixture", "validation.dataset")

# What gives a model its shape where no other key of [model] does.
FLAVOR = ("model.name", "model.flavor")

# What the run writes inside job.dump_folder.
OUTPUT_FOLDERS = "profiling.save_traces_folder profiling.save_memory_snapshot_folder metrics.save_tb_folder checkpoint.folder"

# The factors of the world size.
DEGREES = tuple(f"parallelism.{key}" for key in Parallelism.model_fields if key.endswith("_degree"))

# What says how many layers a pipeline's stages get, and all that says how it is cut and run.
CUTTING_KEYS = (
    "pipeline_parallel_layers_per_stage "
    "pipeline_parallel_first_stage_less_layers pipeline_parallel_last_stage_less_layers"
)
PIPELINE_KEYS = f"pipeline_parallel_schedule pipeline_parallel_microbatch_size module_fqns_per_model_part {CUTTING_KEYS}"

# Keys that say how something is done, by the option of their section that has it done once it leaves its default.
DETAILS = {
    "parallelism.tensor_parallel_degree": "disable_sequence_parallel disable_loss_parallel "
    "enable_async_tensor_parallel",
    "parallelism.context_parallel_degree": "context_parallel_method context_parallel_rotate_method",
    "parallelism.pipeline_parallel_degree": PIPELINE_KEYS,
    "data.streaming": "streams stall_timeout_seconds",
    "checkpoint.enable": "load_step initial_load_path load_only enable_first_step_checkpoint accept_changed_data",
    "checkpoint.initial_load_path": "initial_load_model_only",
    "debug.deterministic": "deterministic_warn_only",
}

# What torchtitan v0.2.2 has beyond our fields. Listed, so that its users read "not yet" and not "misspelt".
UNSUPPORTED_SECTIONS = ("quantize", "memory_estimation", "fault_tolerance")
UNSUPPORTED_KEYS = {
    "job": "save_config_file custom_config_module",
    "metrics": "save_for_all_ranks",
    "model": "converters print_after_conversion",
    "optimizer": "early_step_in_backward",
    "training": "dataloader",
    "parallelism": "pipeline_parallel_schedule_csv pipeline_parallel_expert_parallel_overlap "
    "expert_parallel_degree expert_tensor_parallel_degree expert_parallel_comm_backend",
    "checkpoint": "enable_ft_dataloader_checkpoints initial_load_in_hf initial_load_in_hf_quantized "
    "last_save_model_only last_save_in_hf export_dtype async_mode exclude_from_loading "
    "create_seed_checkpoint",
    "activation_checkpoint": "per_op_sac_force_recompute_mm_shapes_by_fqns early_stop "
    "visualize_memory_budget_pareto preserve_rng_state determinism_check debug",
    "comm": "trace_buf_size save_traces_folder save_traces_file_prefix mode",
    "debug": "moe_force_load_balance",
    "experimental": "custom_args_module",
}
UNSUPPORTED_VALUES = {"parallelism.context_parallel_load_balancer": ("ptrr",)}
NOT_YET = "is a torchtitan v0.2.2 option that torchtrain does not support yet"
NOT_NEEDED = {
    "checkpoint.create_seed_checkpoint": "it is not needed: initial weights are a function of debug.seed and the "
    "parameter's name, the same on every layout"
}


@dataclass(frozen=True)
class Fault:
    """One thing wrong with the values given."""

    keys: tuple[str, ...]
    """The `section.key` whose values it leaves in doubt: no combination that depends on one of them is judged."""
    text: str
    """What was given, what is allowed, what to do."""


class JobConfig(BaseModel):
    """All sections. `JobConfig()` holds the defaults; `parse_args` fills it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    job: Job = Field(default_factory=Job)
    profiling: Profiling = Field(default_factory=Profiling)
    metrics: Metrics = Field(default_factory=Metrics)
    model: Model = Field(default_factory=Model)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = Field(default_factory=LRScheduler)
    training: Training = Field(default_factory=Training)
    data: Data = Field(default_factory=Data)
    parallelism: Parallelism = Field(default_factory=Parallelism)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = Field(default_factory=ActivationCheckpoint)
    compile: Compile = Field(default_factory=Compile)
    comm: Comm = Field(default_factory=Comm)
    validation: Validation = Field(default_factory=Validation)
    debug: Debug = Field(default_factory=Debug)
    experimental: Experimental = Field(default_factory=Experimental)

    def parse_args(
        self, args_list: list[str] | None = None, world_size: int | None = None
    ) -> "JobConfig":
        """Fill in place: default < TOML < command line. `-h` or `--help` prints every option and exits with 0.

        Args:
            args_list: the command line; by default this process's.
            world_size: ranks of the run; by default WORLD_SIZE, torchrun's variable, or 1. 0: not known, and no
                layout is judged.

        Raises:
            ConfigError: every fault that can be known, in one report.
        """
        args = sys.argv[1:] if args_list is None else args_list
        if wants_help(args):
            print_help()
            raise SystemExit(0)
        sources = [("command line", *read_command_line(args))]
        config_file = sources[0][1].get("job.config_file")
        if config_file is not None:
            sources.insert(0, (config_file, *read_toml(config_file)))

        lines: list[str] = []
        faulty: set[str] = set()
        merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        origin: dict[str, str] = {}
        for source, values, faults in sources:
            faults += [
                fault
                for name, value in values.items()
                if (fault := value_fault(name, value)) is not None
            ]
            lines += [f"{source}: {fault.text}" for fault in faults]
            faulty.update(*(fault.keys for fault in faults))
            for name in values.keys() - faulty:
                section, _, key = name.partition(".")
                merged[section][key] = values[name]
                origin[name] = source

        config = JobConfig.model_validate(merged)
        if config.experimental.custom_import:
            name = "experimental.custom_import"
            try:
                import_custom(config.experimental.custom_import)
            except UserError as fault:
                lines.append(f"{origin[name]}: {fault}")
                faulty.update((name, *DATASET_KEYS))
        if world_size is None:
            text = os.environ.get("WORLD_SIZE", "1")
            world_size = int(text) if text.isdecimal() else 0
            if world_size == 0:
                lines.append(
                    f"environment: WORLD_SIZE = {shown(text)}: must be a whole number >= 1"
                )
        for clash in check(config, world_size or None):
            if not faulty.intersection(clash.keys):
                where = list(dict.fromkeys(origin[key] for key in clash.keys if key in origin))
                lines.append(f"{', '.join(where) or 'defaults'}: {clash.text}")
        if lines:
            heading = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
            raise ConfigError(
                "\n".join([f"The configuration has {heading}:", *(f"  {line}" for line in lines)])
            )
        for section in SECTIONS:
            setattr(self, section, config.__dict__[section])
        return self


SECTIONS: dict[str, type[Section]] = {
    name: get_type_hints(JobConfig)[name] for name in JobConfig.model_fields
}


# ---- the fields, described for the help, the command line and the messages ----


@dataclass(frozen=True)
class Option:
    """One field."""

    kind: str
    """JSON Schema's name of its type: integer, number, boolean, string or array; "lists" for an array of arrays."""
    optional: bool
    """Whether it can be unset."""
    allowed: str
    """Type and bounds, in words."""
    default: Any
    doc: str


@functools.cache
def options() -> dict[str, Option]:
    """Every field by its full name, `section.key`, in the order of declaration."""
    names = {
        "model.flavor": [f"{family}: {', '.join(flavors)}." for family, flavors in FLAVORS.items()],
        "training.dataset": [f"{name}: {spec.description}." for name, spec in DATASETS.items()],
    }
    found = {}
    for section, model in SECTIONS.items():
        for key, schema in model.model_json_schema()["properties"].items():
            name, optional = f"{section}.{key}", "anyOf" in schema
            value_schema = schema["anyOf"][0] if optional else schema
            kind = (
                "lists"
                if value_schema.get("items", {}).get("type") == "array"
                else value_schema["type"]
            )
            doc = " ".join([schema["description"], *names.get(name, [])])
            found[name] = Option(kind, optional, _in_words(value_schema), schema["default"], doc)
    return found


def _in_words(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if schema["type"] == "array" and "enum" in schema["items"]:
        return "a list with at least one of " + ", ".join(schema["items"]["enum"])
    if schema["type"] == "array":
        return f"a list of {'lists of names' if schema['items']['type'] == 'array' else 'texts'}, none empty"
    numbers = {"integer": "a whole number", "number": "a finite number"}
    words = {**numbers, "boolean": "true or false", "string": "UTF-8 text"}[schema["type"]]
    if "minLength" in schema:
        words += ", not empty"
    if "not" in schema:
        words, schema = f"{schema['minimum']}, or {words}", {**schema, "minimum": 1}
    bounds = {">=": "minimum", ">": "exclusiveMinimum", "<=": "maximum", "<": "exclusiveMaximum"}
    limits = [f"{sign} {schema[bound]:,}" for sign, bound in bounds.items() if bound in schema]
    return f"{words} {' and '.join(limits)}".rstrip()


def wants_help(args: list[str]) -> bool:
    """Whether the help is asked for, anywhere on the command line."""
    return "-h" in args or "--help" in args


def print_help() -> None:
    """Print the help; a reader that has seen enough (`--help | head`) is no fault."""
    try:
        print(help_text(), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text() -> str:
    """Every option with what it allows, its default and its meaning."""
    lines = [
        "Train a Llama. Options may stand in a TOML file too, as KEY under [SECTION]; the command line goes before it.",
        "",
        "  --SECTION.KEY VALUE or --SECTION.KEY=VALUE; true/false options also bare, for true; lists with commas,",
        "  lists of lists with semicolons between; the value none unsets an option that can be unset.",
    ]
    for section, model in SECTIONS.items():
        lines += ["", f"[{section}] {model.__doc__}"]
        for name, option in options().items():
            if name.startswith(f"{section}."):
                lines.append(f"  --{name}  ({option.allowed}; default: {shown(option.default)})")
                lines += textwrap.wrap(
                    option.doc, 112, initial_indent="      ", subsequent_indent="      "
                )
    return "\n".join(lines)


# ---- reading ----


def read_command_line(args: list[str]) -> tuple[dict[str, Any], list[Fault]]:
    """Values by full name, and what is wrong with the arguments themselves; the values are checked by `value_fault`."""
    values: dict[str, Any] = {}
    faults = []
    rest = list(args)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            faults.append(
                Fault(
                    (), f"{shown(argument)} belongs to no option; options are --section.key value"
                )
            )
            continue
        name, has_value, text = argument[2:].partition("=")
        option = options().get(name)
        if not has_value and rest and not rest[0].startswith("--"):
            has_value, text = "=", rest.pop(0)
        if option is None:
            faults.append(unknown_key(name, given=f"--{name}", prefix="--"))
        elif name in values:
            faults.append(Fault((name,), f"--{name} is given twice; give it once"))
        elif has_value:
            values[name] = _from_text(option, text)
        elif option.kind == "boolean":
            values[name] = True
        else:
            faults.append(Fault((name,), f"--{name} has no value; it must be {option.allowed}"))
    return values, faults


def _from_text(option: Option, text: str) -> Any:
    """The value of the option's type that the text stands for; where there is none the text, to be refused as such."""
    if option.optional and text == "none":
        return None
    if option.kind == "boolean":
        return {"true": True, "false": False}.get(text, text)
    if option.kind == "array":
        return text.split(",")
    if option.kind == "lists":
        return [part.split(",") for part in text.split(";")]
    try:
        return {"integer": int, "number": float, "string": str}[option.kind](text)
    except ValueError:
        return text


def read_toml(path: str) -> tuple[dict[str, Any], list[Fault]]:
    """Values by full name, and what is wrong with the file or its sections; the values are checked by `value_fault`."""
    everything = tuple(options())
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as fault:
        return {}, [Fault(everything, f"the config file cannot be read: {fault.strerror}")]
    except UnicodeDecodeError as fault:
        line = fault.object[: fault.start].count(b"\n") + 1
        where = f"byte {fault.object[fault.start]:#04x} in line {line}"
        return {}, [Fault(everything, f"not UTF-8 text: {where}; save the file as UTF-8")]
    try:
        tables = tomli.loads(text)
    except (ValueError, RecursionError) as fault:
        return {}, [Fault(everything, _locate(str(fault), text.replace("\r\n", "\n")))]

    values: dict[str, Any] = {}
    faults = []
    for section, table in tables.items():
        if section in SECTIONS and isinstance(table, dict):
            values |= {f"{section}.{key}": value for key, value in table.items()}
        elif section in SECTIONS:
            faults.append(
                Fault(
                    (),
                    f"{section} = {shown(table)}: this is a section; write [{section}] and its keys",
                )
            )
        else:
            faults.append(unknown_section(section, table))
    if "job.config_file" in values:
        del values["job.config_file"]
        faults.append(
            Fault(
                ("job.config_file",), "job.config_file: is for the command line alone; leave it out"
            )
        )
    return values, faults


def _locate(message: str, text: str) -> str:
    """tomli's message with the line it is about; one that says no position is handed on as it is."""
    problem, _, position = message.partition(" (at ")
    at = re.fullmatch(r"line (\d+), column (\d+)\)", position)
    if at:
        line, column = int(at[1]), int(at[2])
    elif position:  # "end of document"
        last = text.rstrip("\n")
        line, column = last.count("\n") + 1, len(last) - last.rfind("\n")
    else:
        return f"not TOML: {problem}"
    if problem == "Cannot overwrite a value":
        problem = "this key was given before; give it once"
    quoted = text.split("\n")[line - 1]
    return f"not TOML: line {line}, column {column}: {problem}\n      {line} | {_shortened(quoted)}"


# ---- what is wrong with one key ----


def value_fault(name: str, value: Any) -> Fault | None:
    """What is wrong with this key or its value, or None."""
    given = f"{name} = {shown(value)}"
    option = options().get(name)
    if option is None:
        return unknown_key(name, given)
    if value in UNSUPPORTED_VALUES.get(name, ()):
        return Fault((name,), f"{given}: this value {NOT_YET}; it must be {option.allowed}")
    section, _, key = name.partition(".")
    try:
        SECTIONS[section].model_validate({key: value})
    except ValidationError:
        return Fault((name,), f"{given}: must be {option.allowed}")
    return None


def unknown_key(name: str, given: str, prefix: str = "") -> Fault:
    """A `section.key` that is none of ours, with the nearest that is; `prefix` is written before that."""
    section, _, key = name.partition(".") if "." in name else ("", "", name)
    if (
        section in UNSUPPORTED_SECTIONS
        or key.split(".")[0] in UNSUPPORTED_KEYS.get(section, "").split()
    ):
        return Fault((name,), f"{given}: {NOT_YET}; {NOT_NEEDED.get(name, 'leave it out')}")
    close = _suggestions(section, key)
    if close:
        hint = "did you mean " + " or ".join(prefix + other for other in close) + "?"
    elif section in SECTIONS:
        hint = f"the keys of [{section}] are {', '.join(SECTIONS[section].model_fields)}"
    else:
        hint = f"the sections are {', '.join(SECTIONS)}; --help prints every option"
    return Fault((name, *close), f"{given}: unknown; {hint}")


def unknown_section(name: str, content: Any) -> Fault:
    """What stands at the top of a file and is no section of ours."""
    if name in UNSUPPORTED_SECTIONS:
        return Fault((), f"[{name}]: this section {NOT_YET}; leave it out")
    if not isinstance(content, dict):
        close = _suggestions("", name)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        return Fault(
            tuple(close), f"{name} = {shown(content)}: a key must stand in a section{hint}"
        )
    section = nearest(name, SECTIONS)
    hint = f"; did you mean [{section}]?" if section else ""
    doubtful = tuple(option for option in options() if section and option.startswith(f"{section}."))
    return Fault(
        doubtful, f"[{name}]: unknown section{hint}; the sections are {', '.join(SECTIONS)}"
    )


def _suggestions(section: str, key: str) -> list[str]:
    """The same key elsewhere; else the nearest of its section; else the nearest of all."""
    by_key: dict[str, list[str]] = {}
    for name in options():
        by_key.setdefault(name.partition(".")[2], []).append(name)
    if key in by_key:
        return by_key[key]
    close = nearest(key, SECTIONS[section].model_fields) if section in SECTIONS else None
    if close:
        return [f"{section}.{close}"]
    close = nearest(key, by_key)
    return by_key[close] if close else []


def shown(value: Any) -> str:
    """A value as TOML writes it, cut where it is long; None is "unset"."""
    if value is None:
        return "unset"
    try:
        return _shortened(_toml_value(value))
    except TypeError:  # a date or a table: TOML has them, no field of ours does
        return _shortened(str(value))
    except ValueError:  # Python does not print an integer of thousands of digits
        return "a number of thousands of digits"


def _shortened(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."


# ---- what is wrong with keys together ----


def check(config: JobConfig, world_size: int | None) -> list[Fault]:
    """Every combination that cannot work; with a world size of None, those that need none."""
    return [
        *_check_details(config),
        *_check_model(config),
        *_check_data(config),
        *_check_validation(config),
        *_check_layout(config, world_size),
        *_check_sharing(config),
        *_check_pipeline(config, world_size),
        *_check_folders(config),
        *_check_switches(config),
    ]


def _value(config: JobConfig, name: str) -> Any:
    section, _, key = name.partition(".")
    return config.__dict__[section].__dict__[key]


def _no_effect(
    config: JobConfig, section: str, keys: str, how: str, *causes: str
) -> Iterator[Fault]:
    """Those of the section's keys that were given, though other options, the `causes`, leave them nothing to do."""
    for key in keys.split():
        name, value = f"{section}.{key}", _value(config, f"{section}.{key}")
        if value != options()[name].default:
            yield Fault((name, *causes), f"{name} = {shown(value)} has no effect{how}")


def _must_divide(
    divisor: str, by: int, number: str, of: int, *keys: str, note: str = ""
) -> Iterator[Fault]:
    """`keys` are what else the two numbers depend on."""
    if of % by:
        yield Fault((divisor, number, *keys), f"{divisor} = {by}{note} must divide {number} = {of}")


def _check_details(config: JobConfig) -> Iterator[Fault]:
    for cause, keys in DETAILS.items():
        section, value = cause.partition(".")[0], _value(config, cause)
        if value == options()[cause].default:
            how = f" without {cause}" if value is None else f" while {cause} = {shown(value)}"
            yield from _no_effect(config, section, keys, how, cause)


def _check_model(config: JobConfig) -> Iterator[Fault]:
    """The shape, alone and shared out by heads and features."""
    model, parallelism = config.model, config.parallelism
    if model.tokenizer_path is not None and model.hf_assets_path is not None:
        yield Fault(
            ("model.tokenizer_path", "model.hf_assets_path"),
            f"model.tokenizer_path = {shown(model.tokenizer_path)}, model.hf_assets_path = "
            f"{shown(model.hf_assets_path)}: the two mean the same; give one of them",
        )
    try:
        shape = model_shape(model)
    except UserError as fault:
        yield Fault(FLAVOR, str(fault))
        return
    yield from _must_divide("model.n_heads", shape.n_heads, "model.dim", shape.dim, *FLAVOR)
    if shape.dim % shape.n_heads == 0 and shape.dim // shape.n_heads % 2:
        yield Fault(
            (*FLAVOR, "model.dim", "model.n_heads"),
            f"model.dim / model.n_heads = {shape.dim} / {shape.n_heads} = {shape.dim // shape.n_heads}: the head width "
            "must be even, since RoPE turns pairs of features",
        )
    own = "" if model.n_kv_heads else " (it is the flavor's own; give it too)"
    yield from _must_divide(
        "model.n_kv_heads", shape.n_kv_heads, "model.n_heads", shape.n_heads, *FLAVOR, note=own
    )
    if shape.rope_scaling_factor > 1 and shape.rope_high_freq_factor <= shape.rope_low_freq_factor:
        yield Fault(
            (
                *FLAVOR,
                "model.rope_scaling_factor",
                "model.rope_high_freq_factor",
                "model.rope_low_freq_factor",
            ),
            f"model.rope_high_freq_factor = {shape.rope_high_freq_factor} must be above "
            f"model.rope_low_freq_factor = {shape.rope_low_freq_factor}",
        )
    degree, method = "parallelism.context_parallel_degree", "parallelism.context_parallel_method"
    tp, ulysses = (
        parallelism.tensor_parallel_degree,
        parallelism.context_parallel_method == "ulysses",
    )
    shared = {
        f"model.{key}": shape.__dict__[key] for key in ("n_heads", "n_kv_heads", "ffn_hidden_dim")
    }
    for name, count in shared.items():
        yield from _must_divide("parallelism.tensor_parallel_degree", tp, name, count, *FLAVOR)
        if ulysses and name != "model.ffn_hidden_dim":
            product, note = (
                tp * parallelism.context_parallel_degree,
                " (ulysses: times the tensor-parallel degree)",
            )
            yield from _must_divide(degree, product, name, count, *FLAVOR, method, note=note)


def _check_data(config: JobConfig) -> Iterator[Fault]:
    data, validation = config.data, config.validation
    keys: tuple[str, ...] = ("training.dataset", "training.dataset_path")
    if data.mixture is not None:
        keys, how = ("data.mixture",), ": data.mixture names the sources"
        yield from _no_effect(config, "training", "dataset dataset_path", how, *keys)
    try:
        sources = plan_sources(config.training, data)
    except UserError as fault:
        yield Fault(keys, str(fault))
        return
    for source in sources:
        try:
            find_dataset(source.dataset, source.path)
        except UserError as fault:
            yield Fault(
                keys, f"data.mixture: {shown(source.name)}: {fault}" if data.mixture else str(fault)
            )
    token_files = [source.name for source in sources if source.dataset == "tokens"]
    if validation.enable and validation.dataset is None and (token_files or data.streaming):
        what = (
            f"{shown(token_files[0])}, a token file,"
            if token_files
            else "what data.streaming = true reads once"
        )
        text = f"validation.enable = true: of {what} no documents can be held out; name others in validation.dataset"
        yield Fault(("validation.dataset", "data.streaming", *keys), text)
    if not token_files and validation.dataset != "tokens":
        yield from _no_effect(
            config, "data", "token_dtype", ': no source is a token file (dataset "tokens")', *keys
        )
    if data.streaming:
        yield from _check_streaming(config, len(token_files) == len(sources), keys)


def _check_streaming(
    config: JobConfig, token_files_only: bool, sources: tuple[str, ...]
) -> Iterator[Fault]:
    if token_files_only:
        yield from _no_effect(
            config, "data", "streaming", ": token files are read where they lie", *sources
        )
    if config.data.packing == "best_fit":
        text = 'data.packing = "best_fit" looks at all documents before the first step; data.streaming = true does not'
        yield Fault(("data.packing", "data.streaming"), text)


def _check_validation(config: JobConfig) -> Iterator[Fault]:
    validation, dataset = config.validation, "validation.dataset"
    if not validation.enable:
        return
    if validation.dataset is None:
        yield from _no_effect(config, "validation", "dataset_path", f" without {dataset}", dataset)
    else:
        how = f": {dataset} = {shown(validation.dataset)} is validated on"
        yield from _no_effect(config, "validation", "held_out_share", how, dataset)
        try:
            find_dataset(validation.dataset, validation.dataset_path)
        except UserError as fault:
            yield Fault((dataset, "validation.dataset_path"), of_validation(fault))
    if validation.local_batch_size is not None:
        size, microbatch = (
            "validation.local_batch_size",
            "parallelism.pipeline_parallel_microbatch_size",
        )
        yield from _must_divide(
            microbatch, _value(config, microbatch), size, validation.local_batch_size
        )


def _check_layout(config: JobConfig, world_size: int | None) -> Iterator[Fault]:
    if world_size is None:
        return
    keys = DEGREES
    try:
        ranks = data_parallel_degree(config.parallelism, world_size)
        keys = ("training.global_batch_size", *DEGREES)
        plan_batch(config.training, ranks)
    except UserError as fault:
        yield Fault(keys, str(fault))


def _check_sharing(config: JobConfig) -> Iterator[Fault]:
    """What tensor and context parallelism need of the sequence and of each other."""
    parallelism = config.parallelism
    cp, ulysses = (
        parallelism.context_parallel_degree,
        parallelism.context_parallel_method == "ulysses",
    )
    tp = 1 if parallelism.disable_sequence_parallel else parallelism.tensor_parallel_degree
    head_and_tail = cp > 1 and parallelism.context_parallel_load_balancer == "headtail"
    pieces = cp * tp * (2 if head_and_tail else 1)
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.enable and config.validation.seq_len is not None:
        lengths["validation.seq_len"] = config.validation.seq_len
    for key, length in lengths.items():
        if length % pieces:
            yield Fault(
                (key, "parallelism.tensor_parallel_degree", "parallelism.context_parallel_degree"),
                f"{key} = {length} must be divisible by {pieces}: context-parallel degree {cp}"
                + (" twice (headtail)" if head_and_tail else "")
                + (f" x tensor-parallel degree {tp}" if tp > 1 else ""),
            )
    if ulysses and parallelism.context_parallel_rotate_method != "allgather":
        rotate = "parallelism.context_parallel_rotate_method"
        text = f'{rotate} has no effect with context_parallel_method = "ulysses"'
        yield Fault((rotate, "parallelism.context_parallel_method"), text)
    if config.training.document_masking and cp > 1 and not ulysses:
        yield Fault(
            (
                "training.document_masking",
                *(f"parallelism.context_parallel_{key}" for key in ("degree", "method")),
            ),
            f"training.document_masking = true with parallelism.context_parallel_degree = {cp}: the ring knows nothing "
            'of documents; set parallelism.context_parallel_method = "ulysses"',
        )
    if parallelism.disable_sequence_parallel:
        switch = "parallelism.disable_sequence_parallel"
        how = " with disable_sequence_parallel = true: it overlaps the exchanges of sequence parallelism"
        yield from _no_effect(config, "parallelism", "enable_async_tensor_parallel", how, switch)


def _check_pipeline(config: JobConfig, world_size: int | None) -> Iterator[Fault]:
    """Cutting the model, the schedule's own wants, and what it makes of a batch."""
    parallelism = config.parallelism
    ranks, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if ranks == 1:
        return
    if parallelism.module_fqns_per_model_part is not None:
        how = " with module_fqns_per_model_part, which says what each stage gets"
        yield from _no_effect(
            config, "parallelism", CUTTING_KEYS, how, "parallelism.module_fqns_per_model_part"
        )
    if (
        pipeline_stages.SCHEDULES[schedule].splits_backward
        and parallelism.fsdp_reshard_after_forward == "always"
    ):
        yield Fault(
            ("parallelism.fsdp_reshard_after_forward", "parallelism.pipeline_parallel_schedule"),
            f'parallelism.fsdp_reshard_after_forward = "always": {schedule} splits the backward, where FSDP computes '
            'wrong gradients; leave it at "default"',
        )
    keys = (*DEGREES, *(f"parallelism.{key}" for key in PIPELINE_KEYS.split()))
    try:
        stages = plan_stages(parallelism, model_shape(config.model).pieces)
    except UserError as fault:
        yield Fault(
            (*keys, *FLAVOR, "model.n_layers"),
            f"parallelism.pipeline_parallel_degree = {ranks}: {fault}",
        )
        return
    try:
        batch = plan_batch(
            config.training, data_parallel_degree(parallelism, world_size or ranks)
        ).microbatch_size
    except UserError:  # reported elsewhere
        return
    try:
        check_batch(parallelism, batch, len(stages))
    except UserError as fault:
        if world_size is not None or batch % parallelism.pipeline_parallel_microbatch_size:
            yield Fault(
                (*keys, "training.local_batch_size", "training.global_batch_size"), str(fault)
            )


def _check_folders(config: JobConfig) -> Iterator[Fault]:
    for key, folder in output_folders(config).items():
        if not folder.is_absolute() and (not folder.parts or ".." in folder.parts):
            yield Fault(
                (key,), f"{key} = {shown(str(folder))}: must name a folder inside job.dump_folder"
            )
    key, path = "checkpoint.initial_load_path", config.checkpoint.initial_load_path
    if path is not None and not Path(path).is_dir():
        yield Fault(
            (key,), f"{key} = {shown(path)} is not a folder that exists (seen from {Path.cwd()})"
        )


def _check_switches(config: JobConfig) -> Iterator[Fault]:
    if config.checkpoint.load_only:
        how = ": checkpoint.load_only = true saves nothing"
        yield from _no_effect(
            config, "checkpoint", "enable_first_step_checkpoint", how, "checkpoint.load_only"
        )
    profiling = config.profiling
    window = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and window > profiling.profile_freq:
        yield Fault(
            ("profiling.profile_freq", "profiling.profiler_warmup", "profiling.profiler_active"),
            f"profiling.profile_freq = {profiling.profile_freq} is too short for profiling.profiler_warmup = "
            f"{profiling.profiler_warmup} and profiling.profiler_active = {profiling.profiler_active} steps: it must "
            f"be at least {window}",
        )
    compiled = config.compile.enable and "model" in config.compile.components
    for key, value, wanted in (
        (
            "activation_checkpoint.mode",
            '"memory_budget"',
            config.activation_checkpoint.mode == "memory_budget",
        ),
        (
            "parallelism.enable_async_tensor_parallel",
            "true",
            config.parallelism.enable_async_tensor_parallel,
        ),
    ):
        if wanted and not compiled:
            text = f"{key} = {value} is the compiler's work: it needs compile.enable = true with the component model"
            yield Fault((key, "compile.enable", "compile.components"), text)


# ---- what follows from the values ----


@dataclass(frozen=True)
class DataSource:
    """One source of documents, and its share of the samples."""

    dataset: str
    path: str | None
    share: Fraction
    """All shares add up to 1."""
    held_out_share: float = 0.0
    """Of its documents, for validation."""
    side: Literal["training", "validation"] = "training"
    """Which documents are meant: those that are left, or those held out."""

    @property
    def name(self) -> str:
        """As data.mixture names it."""
        return self.dataset if self.path is None else f"{self.dataset} {self.path}"


MIXTURE_PERIOD = 100_000
"""Most samples after which a mixture's pattern of sources may repeat: it is kept as a table."""


def plan_sources(
    training: Training, data: Data, validation: Validation | None = None
) -> list[DataSource]:
    """The sources that the samples come from; weights are exact fractions, so that shares are.

    Where `validation` names no documents of its own, it holds out a part of each source.

    Raises:
        UserError: an entry of data.mixture that is none, a source named twice, weights too fine for a table.
    """
    held_out = 0.0
    if validation is not None and validation.enable and validation.dataset is None:
        held_out = validation.held_out_share
    if data.mixture is None:
        return [DataSource(training.dataset, training.dataset_path, Fraction(1), held_out)]
    weights: dict[tuple[str, str | None], Fraction] = {}
    for entry in data.mixture:
        name, _, number = (part.strip() for part in entry.rpartition("="))
        plain = re.fullmatch(r"\d{1,18}(\.\d{1,18})?|\d{1,18}/0*[1-9]\d{0,17}", number, re.ASCII)
        weight = Fraction(number) if plain else Fraction(0)
        if not name or weight == 0:
            raise UserError(
                f'data.mixture: {shown(entry)} must be "dataset = weight" or "dataset path = weight", with a weight '
                "> 0 such as 0.7, 7 or 7/10"
            )
        dataset, *path = name.split(maxsplit=1)
        key = (dataset, path[0] if path else None)
        if key in weights:
            raise UserError(f"data.mixture: {shown(name)} is named twice; add its weights up")
        weights[key] = weight
    shares = {key: weight / sum(weights.values()) for key, weight in weights.items()}
    if math.lcm(*(share.denominator for share in shares.values())) > MIXTURE_PERIOD:
        near = [max(1, round(share * MIXTURE_PERIOD / 10)) for share in shares.values()]
        raise UserError(
            f"data.mixture: these weights need more than {MIXTURE_PERIOD:,} samples to come out exactly. Weights that "
            f"are near, and do: {', '.join(map(str, near))}"
        )
    return [DataSource(dataset, path, share, held_out) for (dataset, path), share in shares.items()]


def plan_validation(config: JobConfig) -> list[DataSource]:
    """The sources of the documents to validate on; none without validation.

    Raises:
        UserError: as `plan_sources`.
    """
    validation = config.validation
    if not validation.enable:
        return []
    if validation.dataset is not None:
        return [DataSource(validation.dataset, validation.dataset_path, Fraction(1))]
    sources = plan_sources(config.training, config.data, validation)
    return [replace(source, side="validation") for source in sources]


def of_validation(fault: UserError) -> str:
    """What is said of training's dataset, said of validation's."""
    return str(fault).replace("training.dataset", "validation.dataset")


@dataclass(frozen=True)
class BatchPlan:
    """How the sequences of one optimizer step are split."""

    global_batch_size: int
    """Sequences of all ranks."""
    microbatch_size: int
    """Sequences of one forward and backward of one rank."""
    accumulation_steps: int
    """Microbatches of one rank."""
    data_parallel_degree: int
    """Ranks that read different sequences."""


def plan_batch(training: Training, data_parallel_degree: int) -> BatchPlan:
    """Split the global batch over ranks, and a rank's part into the largest equal microbatches it may have.

    Raises:
        UserError: the degree does not divide the global batch; names the nearest degrees, and batches, that do.
    """
    total = training.global_batch_size
    if total == -1:
        total = training.local_batch_size * data_parallel_degree
    if total % data_parallel_degree:
        fitting = _divisors(total)
        near = [max(d for d in fitting if d < data_parallel_degree)]
        near += [d for d in fitting if d > data_parallel_degree][:1]
        below = total - total % data_parallel_degree
        batches = [size for size in (below, below + data_parallel_degree) if size]
        raise UserError(
            f"training.global_batch_size = {total} cannot be divided over {data_parallel_degree} data-parallel ranks; "
            f"the nearest data-parallel degrees that divide it: {' and '.join(map(str, near))}; "
            f"the nearest global batches for {data_parallel_degree} ranks: {' and '.join(map(str, batches))}"
        )
    of_a_rank = total // data_parallel_degree
    microbatch = max(d for d in _divisors(of_a_rank) if d <= training.local_batch_size)
    return BatchPlan(total, microbatch, of_a_rank // microbatch, data_parallel_degree)


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def plan_stages(parallelism: Parallelism, pieces: list[str]) -> list[list[str]]:
    """The pieces (`ModelShape.pieces`) of each pipeline stage of all ranks; one stage without a pipeline.

    Raises:
        UserError: the model cannot be cut so, or the schedule not run so many stages.
    """
    ranks, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if ranks == 1:
        return [pieces]
    parts = parallelism.module_fqns_per_model_part
    if parts is not None:
        pipeline_stages.check_cut(parts, pieces)
        pipeline_stages.check_stages(schedule, len(parts), ranks)
        return parts
    first = parallelism.pipeline_parallel_first_stage_less_layers
    last = parallelism.pipeline_parallel_last_stage_less_layers
    layers = parallelism.pipeline_parallel_layers_per_stage
    stages = pipeline_stages.default_stages(schedule, ranks)
    if layers is not None:
        stages = -(-(len(pieces) - 3 + first + last) // layers)
    pipeline_stages.check_stages(schedule, stages, ranks)
    return pipeline_stages.cut_evenly(pieces, stages, first, last)


def check_batch(parallelism: Parallelism, batch: int, stages: int) -> None:
    """See that a pipeline of so many stages can run the `batch` sequences that a rank's microbatch has.

    Raises:
        UserError: they cannot be cut as the config says, or the schedule not run so many microbatches.
    """
    size, schedule = (
        parallelism.pipeline_parallel_microbatch_size,
        parallelism.pipeline_parallel_schedule,
    )
    if batch % size:
        raise UserError(
            f"parallelism.pipeline_parallel_microbatch_size = {size} must divide the {batch} sequences that pass the "
            "pipeline together (the largest divisor of global batch / data-parallel degree up to "
            "training.local_batch_size)"
        )
    try:
        pipeline_stages.check_microbatches(
            schedule, batch // size, stages, parallelism.pipeline_parallel_degree
        )
    except UserError as fault:
        raise UserError(
            f"parallelism.pipeline_parallel_schedule: {fault} ({batch} sequences pass together, "
            f"pipeline_parallel_microbatch_size = {size}; training.local_batch_size allows more)"
        ) from None


def data_parallel_degree(parallelism: Parallelism, world_size: int) -> int:
    """Ranks that read different samples: replicate x shard, with a shard degree of -1 resolved to what is left.

    Raises:
        UserError: the degrees do not multiply to the world size.
    """
    replicate, shard = (
        parallelism.data_parallel_replicate_degree,
        parallelism.data_parallel_shard_degree,
    )
    degrees = {name: parallelism.__dict__[name.partition(".")[2]] for name in DEGREES}
    factors = {name: degree for name, degree in degrees.items() if degree > 1}
    product = math.prod(factors.values())
    given = " x ".join(f"{name} = {degree}" for name, degree in factors.items())
    if shard == -1 and world_size % product:
        raise UserError(
            f"{given}{f' gives {product} ranks, which' if len(factors) > 1 else ''} does not divide the world size "
            f"{world_size}; allowed: {', '.join(map(str, _divisors(world_size)))}"
        )
    if shard != -1 and product != world_size:
        raise UserError(
            f"{given or 'parallelism.data_parallel_shard_degree = 1'} gives {product} ranks, but the world size is "
            f"{world_size}; a shard degree of -1 takes what is left"
        )
    return replicate * (world_size // product if shard == -1 else shard)


def model_shape(model: Model) -> ModelShape:
    """The flavor's shape under the overrides given.

    Raises:
        UserError: unknown family or flavor.
    """
    return resolve_shape(
        model.name, model.flavor, model.model_dump(include=set(ModelShape.__dataclass_fields__))
    )


def output_folders(config: JobConfig) -> dict[str, Path]:
    """The folders that the run writes, as given: relative to `job.dump_folder`, by the keys that name them."""
    return {name: Path(_value(config, name)) for name in OUTPUT_FOLDERS.split()}


def tokenizer_path(model: Model) -> str:
    """The tokenizer file or folder, which may not exist: that is found when it is loaded."""
    return model.tokenizer_path or model.hf_assets_path or str(DEBUG_TOKENIZER)


def to_toml(config: JobConfig) -> str:
    """The values as a config file: unset keys and `job.config_file` are left out, -1 stays."""
    lines = []
    for section, table in config.model_dump().items():
        lines.append(f"[{section}]")
        for key, value in table.items():
            if value is not None and (section, key) != ("job", "config_file"):
                lines.append(f"{key} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    """One value in TOML's notation (https://toml.io/en/v1.0.0).

    JSON's escapes are TOML's too, but for DEL, which JSON leaves as it is.

    Raises:
        TypeError: none of str, bool, int, float and lists of them.
    """
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    raise TypeError(f"no TOML for {type(value).__name__}")


def parse_or_exit(args_list: list[str] | None = None, world_size: int | None = None) -> JobConfig:
    """As `JobConfig.parse_args`; a fault is reported on stderr and ends the process with status 2, help with 0."""
    try:
        return JobConfig().parse_args(args_list, world_size)
    except ConfigError as fault:
        print(fault, file=sys.stderr)
        raise SystemExit(2) from None
