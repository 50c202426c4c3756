"""The sections of a config and their fields, nothing else.

Sections and keys have torchtitan v0.2.2's names where it has an option for the same thing
(https://github.com/pytorch/torchtitan/blob/v0.2.2/torchtitan/config/job_config.py); `[data]` is
ours. A field's docstring is its help text; its type and bounds are what the help and the messages
say is allowed.
"""

from typing import Annotated, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
CountOrAuto = Count | Literal[-1]
MOST_TOKENS = 10**15


def _keep_whole(number: float) -> int | float:
    """Return a whole number as one, as which it was meant and is written."""
    return int(number) if number.is_integer() else number


def _check_number(text: str) -> str:
    """Return the text; a number in it, without an "x", has the bounds of a number."""
    if not text.endswith("x") and not 1 <= float(text) <= MOST_TOKENS:
        raise ValueError
    return text


Tokens = (
    Annotated[float, Field(ge=1, le=MOST_TOKENS), AfterValidator(_keep_whole)]
    | Annotated[int, Field(ge=1, le=MOST_TOKENS)]
    | Annotated[
        str,
        Field(pattern=r"^[0-9]{1,18}(\.[0-9]{1,18})?(e[0-9]{1,2})?x?$", examples=["20x"]),
        AfterValidator(_check_number),
    ]
)
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# No NUL, which no path can hold. A pattern also refuses lone surrogates: bytes on the command line
# that are not UTF-8 arrive as such.
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Name = Annotated[Text, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]
Dtype = Literal["float32", "bfloat16"]
PipelineSchedule = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]


class Section(BaseModel):
    """A section: no unknown key, no NaN, no type conversion (an int may stand for a float)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Job(Section):
    """The run itself."""

    config_file: str | None = None
    """TOML file to read; only on the command line."""
    dump_folder: Name = "./outputs"
    """Folder for all outputs of the run."""
    description: Text = "default job"
    """What the run is for, in your words."""
    max_minutes: Positive | None = None
    """Save and end before so many minutes have passed, with exit status 75; unset: no limit."""
    print_config: bool = False
    """Print the merged config at the start."""


class Profiling(Section):
    """Profiler traces and memory snapshots."""

    enable_profiling: bool = False
    """Record PyTorch profiler traces."""
    save_traces_folder: Name = "profiling/traces"
    """Folder for the traces, inside job.dump_folder."""
    profile_freq: Count = 10
    """Steps from one trace, or memory snapshot, to the next."""
    profiler_active: Count = 1
    """Steps that a trace records."""
    profiler_warmup: CountOrZero = 3
    """Steps for which the profiler runs before it records."""
    enable_memory_snapshot: bool = False
    """Dump the allocation history every profile_freq steps (CUDA only)."""
    save_memory_snapshot_folder: Name = "profiling/memory"
    """Folder for the memory snapshots, inside job.dump_folder."""


class Metrics(Section):
    """What is logged, and where."""

    log_freq: Count = 1
    """Steps from one full line (loss, gradient norm, speed, memory) to the next."""
    enable_tensorboard: bool = False
    """Write TensorBoard scalars."""
    disable_color_printing: bool = False
    """Print without colors, on a terminal too."""
    save_tb_folder: Name = "tb"
    """Folder for the TensorBoard files, inside job.dump_folder."""
    enable_wandb: bool = False
    """Log to Weights & Biases (installed separately)."""
    peak_tflops: Positive | None = None
    """Peak of one device in the run's compute precision, TFLOP/s, for MFU; unset: from its name."""


class Model(Section):
    """The model: family, size, tokenizer. The keys from dim on override the flavor's values."""

    name: Text = "llama3"
    """Model family."""
    flavor: Text = "debugmodel"
    """Size within the family."""
    tokenizer_path: Name | None = None
    """Tokenizer file, or the folder that holds it; unset: the small tokenizer of the debug runs."""
    hf_assets_path: Name | None = None
    """torchtitan's name for tokenizer_path; give only one of the two."""
    converters: list[Literal["quantize.linear.float8"]] = []
    """With "quantize.linear.float8", linear layers compute in float8, as that section says."""
    dim: Count | None = None
    """Model width, in features."""
    n_layers: Count | None = None
    """Number of transformer blocks."""
    n_heads: Count | None = None
    """Number of query heads; without head_width it must divide dim into heads of an even width."""
    n_kv_heads: Count | None = None
    """Number of key/value heads; must divide n_heads."""
    ffn_hidden_dim: Count | None = None
    """Feed-forward width, in features."""
    vocab_size: CountOrZero | None = None
    """Rows of the embedding; 0 means the tokenizer's size."""
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
    """Wavelengths below rope_original_seq_len / this are unchanged; above rope_low_freq_factor."""
    rope_original_seq_len: Count | None = None
    """Context length, in tokens, for which the unscaled frequencies were trained."""
    head_width: CountOrZero | None = None
    """Width of a head, in features; even; 0 means dim / n_heads."""
    qk_norm: bool | None = None
    """Normalize each head of queries and keys before the rotation, as Qwen3 does."""
    n_experts: CountOrZero | None = None
    """Experts of a sparse layer; 0 makes every layer dense."""
    experts_per_token: Count | None = None
    """Experts that compute each token; at most n_experts."""
    expert_hidden_dim: CountOrZero | None = None
    """Feed-forward width of one expert, in features; 0 means ffn_hidden_dim."""
    n_shared_experts: CountOrZero | None = None
    """Experts that compute every token, beside those that the router chooses."""
    n_dense_layers: CountOrZero | None = None
    """Number of first layers that stay dense."""
    sparse_every: Count | None = None
    """Of the layers after those, every how many are sparse: the last of each group."""
    router_scores: Literal["softmax", "sigmoid"] | None = None
    """How a router's logits become scores: against each other, or each by itself."""
    router_renormalize: bool | None = None
    """Divide the scores of a token's experts by their sum."""
    router_scale: Positive | None = None
    """Factor of the scores, after that."""
    router_bias: bool | None = None
    """Let a bias per expert, moved against its load, take part in the choice."""


class ParameterGroup(Section):
    """Settings of the parameters whose full names match a pattern."""

    pattern: Name
    """Of full names, such as "tok_embeddings.*"; "*" stands for any text, dots too."""
    lr: Positive | None = None
    """Their largest learning rate; unset: what they have without the group."""
    weight_decay: NotNegative | None = None
    """Their weight decay; unset: what they have without the group."""

    @property
    def changes(self) -> dict[str, float]:
        """What is set, by its name in a parameter group of the optimizer."""
        return self.model_dump(include={"lr", "weight_decay"}, exclude_none=True)


class Optimizer(Section):
    """The optimizer."""

    name: Text = "AdamW"
    """Algorithm."""
    lr: Positive | Literal["auto"] = 8e-4
    """Largest learning rate; "auto": Step Law's (arXiv:2503.04715) for parameters and tokens."""
    beta1: Beta = 0.9
    """Decay per step of the running mean of the gradient."""
    beta2: Beta = 0.95
    """Decay per step of the running mean of the squared gradient."""
    eps: Positive = 1e-8
    """Added to the root of the running mean of the squared gradient."""
    weight_decay: NotNegative = 0.1
    """Decay of the weights per step, times the learning rate; norms do not decay."""
    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """PyTorch's implementation of Adam and AdamW; fused is the fastest."""
    state_dtype: Dtype | None = None
    """Type of the running means; bfloat16 is rounded by chance. Unset: training.dtype."""
    groups: list[ParameterGroup] = []
    """Other settings by parameter name: { pattern = "tok_embeddings.*", weight_decay = 0 }, …"""
    muon_momentum: Beta = 0.95
    """Decay per step of Muon's running mean of the gradient."""
    muon_nesterov: bool = True
    """Whether Muon's update looks one step ahead along that mean (Nesterov's momentum)."""
    muon_ns_steps: Annotated[int, Field(ge=1, le=99)] = 5
    """Newton-Schulz iterations of Muon's orthogonalization."""
    muon_ns_dtype: Dtype = "bfloat16"
    """Precision of these iterations."""
    muon_adamw_lr: Positive | None = None
    """Largest learning rate of what AdamW updates beside Muon; unset: lr."""


class LRScheduler(Section):
    """The learning rate over the run: linear warm-up, a stable phase if asked for, decay."""

    warmup_steps: CountOrZero | None = None
    """Steps of warm-up, 0 for none; takes precedence over warmup_ratio."""
    warmup_ratio: Fraction = 0.1
    """Fraction of total_steps that warms up, but at least 2 steps."""
    total_steps: Count | None = None
    """Steps that the schedule spans; unset: those of the run."""
    decay_ratio: Fraction | None = None
    """Fraction of total_steps that decays; unset: everything after the warm-up."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""
    min_lr_factor: Fraction = 0.1
    """Learning rate at the last step, as a fraction of optimizer.lr."""
    log_schedule: bool = True
    """Print the schedule at the start."""
    log_lr: bool = False
    """Print the learning rate of every step, those between full lines included."""


class Router(Section):
    """How tokens are kept spread over the experts of a sparse model, and what is logged of it."""

    bias_update_rate: NotNegative = 1e-3
    """Change per step of an expert's bias, which raises it while its load is below the mean."""
    balance_loss_weight: NotNegative = 0.0
    """Weight in the loss of each sparse layer's balance over a sequence (DeepSeek-V3's)."""
    z_loss_weight: NotNegative = 0.0
    """Weight in the loss of each sparse layer's mean squared logsumexp of the router's logits."""
    log_layers_freq: CountOrZero = 0
    """Steps from one logging of each layer's own metrics to the next; 0 means never."""


class Training(Section):
    """Data, batch, length and precision."""

    dataset: Text = "python_stdlib"
    """Name of the dataset, or owner/name[:config[:split]] on the Hugging Face Hub."""
    dataset_path: Name | None = None
    """File or folder with the documents, for datasets that read your own."""
    local_batch_size: Count = 8
    """Largest microbatch per rank, in sequences."""
    global_batch_size: CountOrAuto = -1
    """Sequences per optimizer step over all ranks; -1: local_batch_size x data-parallel degree."""
    seq_len: Count = 2048
    """Sequence length, in tokens."""
    max_norm: Positive = 1.0
    """Largest gradient norm; a larger gradient is clipped to it."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do in a step whose loss or gradient is not finite: end the run, or skip the step."""
    max_skips: Count = 10
    """Most steps that may be skipped in a row; one more ends the run."""
    spike_deviations: Positive | None = None
    """Skip a step whose loss or gradient norm is so many deviations above the recent mean."""
    spike_window: Annotated[int, Field(ge=2, le=10**9)] = 128
    """Recent steps in that mean; until half of them have been taken, none is skipped."""
    steps: Count = 10_000
    """Optimizer steps of the run, unless tokens is set."""
    tokens: Tokens | None = None
    """Tokens of the run instead, rounded up to whole steps; "20x": 20 per active parameter."""
    document_masking: bool = False
    """Keep a sequence's documents apart: attention, positions and labels end with a document."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in host memory; the device only computes."""
    dtype: Dtype = "float32"
    """Type of parameters and optimizer states."""
    mixed_precision_param: Dtype = "bfloat16"
    """Type in which the model computes."""
    mixed_precision_reduce: Dtype = "float32"
    """Type in which gradients are summed over ranks."""
    gc_freq: Count = 50
    """Steps from one garbage collection to the next, the same on all ranks."""
    gc_debug: bool = False
    """Collect everything at each step, and print what was found."""


class Data(Section):
    """How documents become tokens."""

    cache_folder: Name | None = None
    """Folder of the token cache; unset: $XDG_CACHE_HOME/torchtrain or ~/.cache/torchtrain."""
    text_key: Name = "text"
    """Field that holds the document in a jsonl line, a parquet row or a row of a Hub dataset."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that is not a document: stop and name it, or skip and count it."""
    mixture: Names | None = None
    """Replaces training.dataset: a list of "dataset = weight" or "dataset path = weight"."""
    packing: Literal["cut", "best_fit"] = "cut"
    """How documents fill sequences: end to end, cut at a sequence's end; or whole, padded."""
    token_dtype: Literal["uint16", "uint32"] | None = None
    """Type of the ids in token files that do not say; unset: the smallest for the vocabulary."""
    streaming: bool = False
    """Tokenize documents as they are read, in the corpus' order, not before the first step."""
    streams: Count = 8
    """Streams that read a corpus side by side; they fix the order, for any number of ranks."""
    stall_timeout_seconds: Count = 60
    """How long a streamed corpus may yield no document before the run ends, in seconds."""


class Parallelism(Section):
    """How the model is split over ranks; the degrees multiply to the world size."""

    data_parallel_replicate_degree: Count = 1
    """Replicas of the (sharded) model."""
    data_parallel_shard_degree: CountOrAuto = -1
    """Ranks that shard parameters, gradients and optimizer states; -1: all that are left."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """When gathered parameters are freed: less memory (always) or communication (never)."""
    tensor_parallel_degree: Count = 1
    """Ranks that share each matrix product."""
    disable_sequence_parallel: bool = False
    """With tensor parallelism, keep whole sequences between the products (more memory)."""
    disable_loss_parallel: bool = False
    """With tensor parallelism, gather the logits for the loss (more memory)."""
    enable_async_tensor_parallel: bool = False
    """With tensor parallelism under compile on CUDA, overlap the products with communication."""
    pipeline_parallel_degree: Count = 1
    """Ranks that share the layers, each with one stage or several."""
    pipeline_parallel_schedule: PipelineSchedule = "1F1B"
    """Order of forwards and backwards. Stages per rank: one (the first two), several, or two."""
    pipeline_parallel_microbatch_size: Count = 1
    """Sequences per microbatch of the pipeline; must divide the batch that passes through it."""
    pipeline_parallel_layers_per_stage: Count | None = None
    """Layers per stage; unset: as many as give the fewest stages that the schedule accepts."""
    pipeline_parallel_first_stage_less_layers: CountOrZero = 1
    """Layers that the embedding counts for: the first stage has that many fewer."""
    pipeline_parallel_last_stage_less_layers: CountOrZero = 1
    """Layers that norm and output count for: the last stage has that many fewer."""
    pipeline_parallel_expert_parallel_overlap: bool = True
    """Under DualPipeV with expert parallelism, compute while experts' exchanges are under way."""
    module_fqns_per_model_part: Annotated[list[Names], Field(min_length=1)] | None = None
    """Layer names per stage: tok_embeddings, layers.0, ..., norm, output; unset: even split."""
    expert_parallel_degree: Count = 1
    """Ranks that share the experts of a layer; among those along data shard, context, tensor."""
    context_parallel_degree: Count = 1
    """Ranks that share each sequence."""
    context_parallel_method: Literal["ring", "ulysses"] = "ring"
    """How attention sees the whole sequence: keys and values travel, or heads are exchanged."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """How keys and values travel in the ring: all at once, or shard by shard."""
    context_parallel_load_balancer: Literal["headtail", "none"] = "headtail"
    """headtail gives each rank a chunk from both ends of the sequence, to balance causal work."""


class Checkpoint(Section):
    """Saving and resuming."""

    enable: bool = False
    """Save checkpoints, and resume from the newest complete one in the folder."""
    folder: Name = "checkpoint"
    """Folder for the checkpoints, inside job.dump_folder."""
    interval: Count = 500
    """Steps from one checkpoint to the next; the last step is always saved."""
    initial_load_path: Name | None = None
    """Checkpoint (a step-N folder, or torchtitan's) to start from while the run has none yet."""
    initial_load_model_only: bool = True
    """Load only the weights from initial_load_path, not optimizer, step and data position."""
    exclude_from_loading: list[
        Literal["optimizer", "dataloader", "train_state", "lr_scheduler"]
    ] = []
    """Parts of it not to load: optimizer, dataloader (data position), train_state (step)."""
    initial_load_in_hf: bool = False
    """initial_load_path is a Hugging Face folder, or a safetensors file in one."""
    keep_latest_k: CountOrZero = 10
    """Number of checkpoints to keep, 0 for all."""
    keep_every: CountOrZero = 0
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    interval_minutes: Positive | None = None
    """Save also when so many minutes have passed since the last save; unset: never."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "async"
    """Save beside training, from a copy in host memory (pinned, for an accelerator), or not."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """After a failed save, such as on a full disk: end the run, or train on to the next."""
    load_step: CountOrAuto = -1
    """Step to resume from; -1: the newest."""
    enable_first_step_checkpoint: bool = False
    """Save after the first step too, to see early that saving works."""
    load_only: bool = False
    """Load, but never save."""
    last_save_model_only: bool = False
    """Save the weights alone after the last step: they can start a run, but not go on with one."""
    last_save_in_hf: bool = False
    """Also write the last checkpoint in Hugging Face's form, into its folder hf."""
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights of those two; unset: as they are."""
    accept_changed_data: bool = False
    """Resume although batch size, sequence length, corpus, tokenizer or seed differ; states how."""
    accept_changed_model: bool = False
    """Load the weights although the model computes something else from them; states what."""


class ActivationCheckpoint(Section):
    """Recomputing activations in the backward, to save memory."""

    mode: Literal["none", "full", "selective", "memory_budget"] = "none"
    """Recompute nothing, each block, some of it, or what the compiler chooses within a budget."""
    selective_ac_option: Annotated[str, Field(pattern=r"^(op|op_all|[1-9][0-9]*)$")] = "2"
    """selective recomputes every n-th block ("2"), all but every second matrix product ("op"), or
    all but the matrix products ("op_all")."""
    memory_budget: Fraction = 0.5
    """Fraction of the activations that memory_budget may keep: 0 is full, 1 is none."""

    @property
    def recomputed_blocks(self) -> int | None:
        """The n of "every n-th block is recomputed whole"; None: no block is."""
        if self.mode == "full":
            return 1
        if self.mode == "selective" and self.selective_ac_option.isdigit():
            return int(self.selective_ac_option)
        return None


class Compile(Section):
    """torch.compile."""

    enable: bool = False
    """Compile the components."""
    components: Annotated[list[Literal["model", "loss"]], Field(min_length=1)] = ["model", "loss"]
    """What is compiled: the model block by block, the loss."""
    backend: Name = "inductor"
    """Backend of torch.compile."""


class Float8Linear(Section):
    """Linear layers in float8, where model.converters asks for it (needs the package torchao)."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """What has a scale of its own: a tensor (unset), a row; or that, weight gradients in bf16."""
    filter_fqns: list[Name] = []
    """Layers to leave out: those whose names contain one of these texts, such as "output"."""
    enable_fsdp_float8_all_gather: bool = False
    """Let FSDP gather these layers' weights in float8, a byte a number; tensorwise alone."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Find the scales of all weights that are gathered in float8 in one exchange per step."""
    emulate: bool = False
    """Multiply the float8 values in fp32, on any device and slowly: to try it out."""


class Comm(Section):
    """Communication between ranks."""

    init_timeout_seconds: Count = 300
    """Longest wait for others in set-up and in the first step, validation and texts, in seconds."""
    train_timeout_seconds: Count = 100
    """Longest wait for other ranks in all else, from the second step on, in seconds."""


class Validation(Section):
    """The loss on documents that are not trained on, during training."""

    enable: bool = False
    """Validate after every freq steps and after the last."""
    dataset: Name | None = None
    """Documents to validate on, named as in training.dataset; unset: hold out a part of those."""
    dataset_path: Name | None = None
    """File or folder with the documents, for datasets that read your own."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Fraction of the training documents to hold out where dataset is unset."""
    local_batch_size: Count | None = None
    """Sequences that a rank evaluates at once; unset: training's microbatch. Changes no result."""
    seq_len: Count | None = None
    """Sequence length, in tokens; unset: training.seq_len."""
    freq: Count = 10
    """Steps from one validation to the next."""
    steps: CountOrAuto = -1
    """Batches of training.global_batch_size sequences per validation; -1: all there are."""


class TextSamples(Section):
    """What the model itself writes, during training: on the screen and in samples.jsonl."""

    prompts: Names | None = None
    """Beginnings of texts, which the model continues; unset: it writes none."""
    freq: Count = 100
    """Steps from one time to the next; after the last step it writes too."""
    max_new_tokens: Count = 64
    """Longest continuation, in tokens, within training.seq_len. Each costs a whole forward."""
    temperature: NotNegative = 0.8
    """Divides the logits before a token is chosen by chance; 0 takes the likeliest."""


class Debug(Section):
    """Reproducing and finding faults."""

    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of initial weights and data order."""
    deterministic: bool = False
    """Use only deterministic kernels; an operation that has none is an error."""
    deterministic_warn_only: bool = False
    """Make that error a warning."""
    detect_anomaly: bool = False
    """Find the operation whose gradient is NaN (slow)."""
    replica_check_freq: CountOrZero = 0
    """Check every n steps that replicas are bitwise identical; 0: never."""
    moe_force_load_balance: bool = False
    """Give each expert as many tokens as the others, whatever its scores: for benchmarks alone."""


class Experimental(Section):
    """Your own code."""

    custom_import: Text = ""
    """Dotted module or .py file that registers datasets, models, optimizers; empty: none."""


class Config(BaseModel):
    """All sections, with their defaults."""

    model_config = ConfigDict(serialize_by_alias=True, extra="forbid", strict=True)

    job: Job = Job()
    profiling: Profiling = Profiling()
    metrics: Metrics = Metrics()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    lr_scheduler: LRScheduler = LRScheduler()
    router: Router = Router()
    training: Training = Training()
    data: Data = Data()
    parallelism: Parallelism = Parallelism()
    checkpoint: Checkpoint = Checkpoint()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    compile: Compile = Compile()
    quantize_linear_float8: Float8Linear = Field(
        default=Float8Linear(), alias="quantize.linear.float8"
    )
    comm: Comm = Comm()
    validation: Validation = Validation()
    text_samples: TextSamples = TextSamples()
    debug: Debug = Debug()
    experimental: Experimental = Experimental()


SECTIONS: dict[str, type[Section]] = {
    field.alias or name: get_type_hints(Config)[name] for name, field in Config.model_fields.items()
}
"""The sections by name, in the order of declaration."""
