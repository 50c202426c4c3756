"""Setting up a run: what a step needs, made in order from one plan."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtrain.bad_numbers import StepGuard
from torchtrain.checkpoint import Progress
from torchtrain.config.parameter_groups import check_groups
from torchtrain.config.plans import RunPlan, find_tokenizer, plan_run
from torchtrain.config.schema import Compile, Debug
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.documents import Separators, say_where_documents_end
from torchtrain.datasets.loader import DataLoader, build_dataset
from torchtrain.datasets.open import check_sources
from torchtrain.datasets.samples import Dataset
from torchtrain.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtrain.dtypes import DTYPES
from torchtrain.errors import UserError
from torchtrain.loss import sequence_losses
from torchtrain.lr_scheduling import get_lr_scheduler
from torchtrain.models.decoder import Decoder, load_decoder
from torchtrain.optimizers.build import LearningRates, build_optimizer
from torchtrain.parallelisms.apply import (
    Techniques,
    build_parts,
    collect_buffers,
    collect_weights,
    find_own_stages,
)
from torchtrain.parallelisms.compile import silence_compiler
from torchtrain.parallelisms.context_parallel import shard_sequence
from torchtrain.parallelisms.expert_balance import ExpertBalance
from torchtrain.parallelisms.float8_gather import gather_in_float8, kept_scales
from torchtrain.parallelisms.initial_weights import materialize
from torchtrain.parallelisms.mesh import Mesh
from torchtrain.parallelisms.pipeline_parallel import Pipeline
from torchtrain.parallelisms.replica_check import ReplicaCheck
from torchtrain.parallelisms.ring_attention import Ring
from torchtrain.parallelisms.tensor_parallel import loss_context
from torchtrain.ranks import (
    first_on_each_node,
    on_rank_zero,
    patient_group,
    require_equal,
    set_timeout,
    together,
)
from torchtrain.step_metrics import MetricSource, find_metric_sources
from torchtrain.text_samples import TextSampler
from torchtrain.validation import ValidationSet, Validator

Losses = Callable[[Tensor, Tensor], Tensor]
"""From logits [B, S, V] and labels [B, S] to the sum of each sequence's token losses, [B]."""


@dataclass(kw_only=True)
class ParallelModel:
    """The model as its ranks share it, and what its forward and its loss need."""

    config: JobConfig
    plan: RunPlan
    """What follows from the config and the world size."""
    device: torch.device
    mesh: Mesh
    parts: dict[int, Decoder]
    """This rank's pipeline stages by their number; without a pipeline the whole model, as 0."""
    weights: dict[str, nn.Parameter]
    """Their parameters by their names in the whole model: what the optimizer updates."""
    buffers: dict[str, Tensor]
    """Their buffers: with the weights, what is saved of the model."""
    expert_balance: ExpertBalance | None
    """None where no layer is sparse."""
    pipeline: Pipeline | None
    sequence_losses: Losses
    shard: Callable[[Tensor], Tensor]
    """From tokens or labels [B, S] to what this rank computes: all of them, or under context
    parallelism its shard [B, S / cp]."""
    loss_context: Callable[[], AbstractContextManager[None]]
    """Goes around the loss and its backward; tensor parallelism keeps the logits sharded in it."""
    scale_context: Callable[[], AbstractContextManager[None]]
    """Goes around forwards and backwards between two changes of the weights; the scales of those
    that are gathered in float8 are found once for it, where the config asks for that."""

    @property
    def model_state(self) -> dict[str, Tensor]:
        """What is saved of the model."""
        return {**self.weights, **self.buffers}


@dataclass(kw_only=True)
class Trainer(ParallelModel):
    """What a step needs."""

    loader: DataLoader
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    validator: Validator
    """Is never due where there is no validation."""
    text_sampler: TextSampler
    """Is never due without prompts."""
    guard: StepGuard
    replica_check: ReplicaCheck
    """Is never due unless the config asks for it."""
    metric_sources: list[MetricSource]
    """What of the model, and the optimizer if it does, has metrics of its own."""
    step: int = 0
    """Optimizer steps taken."""
    tokens_seen: int = 0
    """Tokens that the whole job has trained on."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.plan.batch.global_batch_size * self.config.training.seq_len


def set_up(config: JobConfig, device: torch.device, saved: Progress | None = None) -> Trainer:
    """Make everything a step needs, with initial weights. A collective call.

    Args:
        config: checked.
        device: of this rank.
        saved: what a checkpoint to be loaded says of itself.

    Raises:
        UserError: tokenizer, corpus, vocabulary or batch that cannot be, on the rank that found it.
        PeerFault: the same, on the other ranks.
    """
    configure_numerics(config.debug)
    tokenizer = together(lambda: load_tokenizer(find_tokenizer(config.model)))
    say_where_documents_end(tokenizer)
    plan = together(lambda: make_plan(config, tokenizer.vocab_size, saved))
    together(lambda: check_names(config, plan))
    separators = None
    if config.training.document_masking:
        separators = (tokenizer.bos_id, tokenizer.eos_id)
    text_sampler = together(lambda: build_text_sampler(config, plan, tokenizer))
    dataset, validation_set = open_data(config, plan, tokenizer, separators)
    fingerprints = f"{dataset.fingerprint}; {validation_set.fingerprint}"
    require_equal(fingerprints, "the corpus, as each rank reads it,")

    model = set_up_model(config, plan, device)
    data_rank = model.mesh.data_rank
    optimizer_section = config.optimizer.model_copy(update={"lr": plan.rate.lr})
    optimizer = build_optimizer(model.weights, optimizer_section)
    stall_s = config.data.stall_timeout_seconds
    loader = DataLoader(dataset, plan.batch, data_rank, separators, stall_s)
    return Trainer(
        **vars(model),
        loader=loader,
        optimizer=optimizer,
        lr_scheduler=get_lr_scheduler(optimizer, config, plan.steps),
        validator=Validator(plan.validation, validation_set, plan.degrees, data_rank, device),
        text_sampler=text_sampler,
        guard=StepGuard(config.training, loader, model.parts),
        replica_check=ReplicaCheck(
            config.debug.replica_check_freq, model.model_state, optimizer, device
        ),
        metric_sources=[
            *([] if model.expert_balance is None else [model.expert_balance]),
            *find_metric_sources(model.parts.values(), optimizer),
            LearningRates(optimizer, optimizer_section),
        ],
    )


def set_up_model(
    config: JobConfig, plan: RunPlan, device: torch.device, *, draws: bool = True, fsdp: bool = True
) -> ParallelModel:
    """Make the model, with initial weights, and what its forward and its loss need.

    A collective call.

    Args:
        config: checked.
        plan: of the run.
        device: of this rank.
        draws: whether to draw initial weights; else they are left as the memory was, to be loaded.
        fsdp: whether FSDP is applied, which training needs also on one rank.
    """
    mesh = Mesh(
        plan.degrees,
        device.type,
        sequence_shards=plan.sequence_shards,
        has_experts=plan.shape.n_experts > 0,
    )
    set_timeout(config.comm.init_timeout_seconds)  # its groups have PyTorch's until here
    tag_compiler_cache(mesh)
    silence_compiler()
    parts = build_model(config, plan, mesh, device, draws=draws, fsdp=fsdp)
    weights = collect_weights(parts.values())
    losses = build_losses(config.compile)
    expert_balance = None
    if plan.shape.n_sparse_layers > 0:
        expert_balance = ExpertBalance(
            parts,
            plan,
            config.router,
            config.training.seq_len,
            device,
            forces_balance=config.debug.moe_force_load_balance,
        )
    pipeline = None
    if plan.pipeline is not None:
        dtype = DTYPES[config.training.mixed_precision_param]
        pipeline = Pipeline(parts, plan, mesh, device, dtype, losses)
    return ParallelModel(
        config=config,
        plan=plan,
        device=device,
        mesh=mesh,
        parts=parts,
        weights=weights,
        buffers=collect_buffers(parts.values()),
        expert_balance=expert_balance,
        pipeline=pipeline,
        sequence_losses=losses,
        shard=build_shard(config, mesh),
        loss_context=build_loss_context(config, mesh),
        scale_context=build_scale_context(config, weights),
    )


def configure_numerics(debug: Debug) -> None:
    """Set the process-wide switches that must be set before the first kernel runs."""
    torch.manual_seed(debug.seed)
    if debug.deterministic:
        # cuBLAS is deterministic only with this.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True, warn_only=debug.deterministic_warn_only)
    torch.autograd.set_detect_anomaly(debug.detect_anomaly)


def make_plan(config: JobConfig, tokenizer_size: int, saved: Progress | None) -> RunPlan:
    """Make the plan of the run, knowing the tokenizer and the checkpoint to be loaded.

    Raises:
        UserError: what the config check could not see: the vocabulary, or the checkpoint's global
            batch size, does not fit.
    """
    saved_batch = None
    if saved is not None and config.training.global_batch_size == -1:
        saved_batch = saved.data.get("global_batch_size")
    try:
        return plan_run(
            config,
            dist.get_world_size(),
            tokenizer_size=tokenizer_size,
            global_batch_size=saved_batch,
        )
    except UserError as fault:
        if saved_batch is None:
            raise
        raise UserError(
            f"{fault}; with training.global_batch_size = -1 the global batch is the checkpoint's, "
            f"{saved_batch}. Change parallelism.pipeline_parallel_microbatch_size, "
            "training.local_batch_size or the data-parallel degree"
        ) from fault


def check_names(config: JobConfig, plan: RunPlan) -> None:
    """Check the patterns of `optimizer.groups`: the config check knows no user's model.

    Raises:
        UserError: one matches nothing, or two the same.
    """
    if not config.optimizer.groups:
        return
    with torch.device("meta"):
        whole = load_decoder(config.model.name)(plan.shape)
    check_groups([name for name, _ in whole.named_parameters()], config.optimizer.groups)


def open_data(
    config: JobConfig, plan: RunPlan, tokenizer: Tokenizer, separators: Separators | None
) -> tuple[Dataset, ValidationSet]:
    """Open what the run trains on, and what it validates on. A collective call.

    Either is tokenized if need be.
    """

    def open_both() -> tuple[Dataset, ValidationSet]:
        dataset = build_dataset(
            config.training, config.data, tokenizer, config.debug.seed, config.validation
        )
        return dataset, ValidationSet(plan.validation, config.data, tokenizer, separators)

    sources = [*plan.sources, *plan.validation.sources]
    on_rank_zero(lambda: check_sources(sources, config.data, tokenizer), patient_group())
    # Hosts whose token cache is warm wait for one that builds it.
    dataset, validation_set = first_on_each_node(open_both, patient_group())
    on_rank_zero(dataset.try_tokenizer, patient_group())
    return dataset, validation_set


def build_text_sampler(config: JobConfig, plan: RunPlan, tokenizer: Tokenizer) -> TextSampler:
    """Build what lets the model write while it trains.

    Raises:
        UserError: a prompt is too long.
    """
    return TextSampler(
        config.text_samples,
        tokenizer,
        plan.degrees,
        seq_len=config.training.seq_len,
        last_step=plan.steps,
        seed=config.debug.seed,
    )


def tag_compiler_cache(mesh: Mesh) -> None:
    """Keep the ranks apart in the compiler's cache on disk under tensor parallelism.

    It takes all ranks' sharded tensors for the same, and would hand a rank another one's share of
    the vocabulary (https://github.com/pytorch/pytorch/issues/188390), or the name of another run's
    group.
    """
    tag = ""
    if mesh.has("tp"):
        groups = " ".join(group.group_name for group in mesh.all_groups())
        tag = f"rank {dist.get_rank()} of {dist.get_world_size()}, groups {groups}"
    torch.compiler.config.cache_key_tag = tag


def build_model(
    config: JobConfig, plan: RunPlan, mesh: Mesh, device: torch.device, *, draws: bool, fsdp: bool
) -> dict[int, Decoder]:
    """Build this rank's part of the model; where they are drawn, with its initial weights."""
    schedule = config.parallelism.pipeline_parallel_schedule
    stages = find_own_stages(plan.stages, schedule, mesh)
    model_class = load_decoder(config.model.name)
    techniques = Techniques(
        training=config.training,
        parallelism=config.parallelism,
        activation_checkpoint=config.activation_checkpoint,
        compile=config.compile,
        float8=config.quantize_linear_float8 if config.model.converters else None,
        fsdp=fsdp,
    )
    parts = build_parts(model_class, plan.shape, stages, mesh, techniques)
    for part in parts.values():
        seed = config.debug.seed if draws else None
        materialize(part, device, seed, offload=config.training.enable_cpu_offload)
        if fsdp and techniques.float8 and techniques.float8.enable_fsdp_float8_all_gather:
            gather_in_float8(part, DTYPES[config.training.mixed_precision_param])
    return parts


def build_losses(compile_section: Compile) -> Losses:
    """Return the loss, compiled where the config asks for it."""
    if compile_section.enable and "loss" in compile_section.components:
        # The compiler widens the logits as it reads them: in one chunk, it stores none in fp32.
        whole = partial(sequence_losses, chunk=sys.maxsize)
        return torch.compile(whole, backend=compile_section.backend, dynamic=False)
    return sequence_losses


def build_shard(config: JobConfig, mesh: Mesh) -> Callable[[Tensor], Tensor]:
    """Return the function from tokens or labels [B, S] to what this rank computes of them."""
    if not mesh.has("cp"):
        return lambda x: x
    ring = Ring.of(mesh.get("cp"), config.parallelism)
    return partial(shard_sequence, ring=ring)


def build_loss_context(config: JobConfig, mesh: Mesh) -> Callable[[], AbstractContextManager[None]]:
    """Return the factory of the context that goes around the loss and its backward."""
    is_sharded = mesh.has("tp") and not config.parallelism.disable_loss_parallel
    return partial(loss_context, vocabulary_sharded=is_sharded)


def build_scale_context(
    config: JobConfig, weights: dict[str, nn.Parameter]
) -> Callable[[], AbstractContextManager[None]]:
    """Return the factory of the context in which the scales of float8 weights are found once."""
    section = config.quantize_linear_float8
    if config.model.converters and section.precompute_float8_dynamic_scale_for_fsdp:
        return partial(kept_scales, list(weights.values()))
    return nullcontext
