"""Pretrain a Llama: `torchrun train.py --job.config_file FILE`, or plain `python train.py …` for one process.

`main` checks the config, `run` sets up in order and hands over to `train`, the whole loop. `set_up`,
`forward_backward` and `optimizer_step` can be called from a tool.
"""

import faulthandler
import math
import os
import platform
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

from torchtrain.config_manager import JobConfig, parse_or_exit

# Before torch is imported, so that --help and a faulty config are answered at once.
CONFIG = parse_or_exit() if __name__ == "__main__" else JobConfig()

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchtrain import __version__
from torchtrain.catalog.models import ModelShape
from torchtrain.checkpoint.checkpointer import Checkpointer, Progress, Source
from torchtrain.config.layout import BatchPlan, plan_batch
from torchtrain.config.plans import find_tokenizer, plan_schedule, plan_shape
from torchtrain.config.schema import LRScheduler
from torchtrain.config.toml import to_toml
from torchtrain.datasets.loader import DataLoader, Microbatch, build_dataset
from torchtrain.datasets.samples import Dataset
from torchtrain.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtrain.errors import NonFinite, PeerFault, SharedUserError, Stopped, UserError
from torchtrain.logging_utils import init_logging, logger
from torchtrain.loss import count_valid, sequence_losses
from torchtrain.lr_scheduling import describe as describe_schedule
from torchtrain.lr_scheduling import differences, get_lr_scheduler, set_step
from torchtrain.metrics import MetricsLogger, StepSummary, Stopwatch, peak_flops, peak_memory_gib
from torchtrain.models.decoder import Decoder
from torchtrain.models.llama import Transformer
from torchtrain.optimizers.build import build_optimizer
from torchtrain.optimizers.clipping import clip_grad_norm_
from torchtrain.parallelisms.apply import DTYPES, build_parts, named_weights
from torchtrain.parallelisms.context_parallel import shard_sequence
from torchtrain.parallelisms.initial_weights import materialize
from torchtrain.parallelisms.mesh import ParallelDims
from torchtrain.parallelisms.pipeline_parallel import Pipeline
from torchtrain.parallelisms.ring_attention import Ring
from torchtrain.parallelisms.tensor_parallel import loss_context
from torchtrain.profiling import GarbageCollection, Profiler
from torchtrain.ranks import (
    end_with_launcher,
    gathered,
    join_process_group,
    on_rank_zero,
    patient_group,
    require_equal,
    set_timeout,
    together,
)
from torchtrain.run_folder import RunFolder
from torchtrain.validation import ValidationSet, Validator


@dataclass
class Trainer:
    """What a step needs, in the order in which it is made."""

    config: JobConfig
    device: torch.device
    dims: ParallelDims
    mesh: DeviceMesh
    batch: BatchPlan
    loader: DataLoader
    parts: dict[int, Decoder]
    """This rank's part of the model: all of it, or by number its pipeline stages."""
    weights: dict[str, nn.Parameter]
    """Their parameters by their names in the whole model: what is updated and saved."""
    pipeline: Pipeline | None
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    sequence_losses: Callable[[Tensor, Tensor], Tensor]
    my_part: Callable[[Tensor], Tensor]
    """Of tokens or labels [B, S], what this rank computes: all, or under context parallelism [B, S / cp]."""
    loss_context: Callable[[], AbstractContextManager[None]]
    """Around the loss and its backward; tensor parallelism keeps the logits sharded in it."""
    validator: Validator
    """Has nothing to do where there is no validation."""
    step: int = 0
    """Optimizer steps taken."""
    tokens_seen: int = 0
    """Of the whole job."""

    @property
    def shape(self) -> ModelShape:
        """Of the whole model."""
        return next(iter(self.parts.values())).shape

    @property
    def stage_group(self) -> dist.ProcessGroup | None:
        """The ranks that have the rest of the model, where it is cut into stages."""
        return self.mesh.get_group("pp") if self.pipeline is not None else None


def train(
    trainer: Trainer, checkpointer: Checkpointer, metrics: MetricsLogger | None, profiler: Profiler
) -> None:
    """The training loop: from the step after `trainer.step` to `training.steps`, or until a signal asks to stop."""
    config = trainer.config
    collector = GarbageCollection(config.training.gc_freq, config.training.gc_debug)
    stop = StopRequest()
    first_step = trainer.step + 1
    with profiler.recording():
        for step in range(first_step, config.training.steps + 1):
            stopwatch = Stopwatch()
            microbatches = read_batches(trainer.loader, step, stopwatch)
            loss, max_loss = forward_backward(trainer, microbatches)
            grad_norm = clip_grad_norm_(
                trainer.weights.values(), config.training.max_norm, trainer.stage_group
            )
            summary, stopped_by = combine_ranks(trainer, loss, max_loss, grad_norm, stopwatch, stop)
            check_finite(summary, trainer.loader)
            optimizer_step(trainer)
            with (
                stopwatch.paused()
            ):  # a stop does not wait for a validation: the time to save may be short
                validated = (
                    validate(trainer) if trainer.validator.is_due(step) and not stopped_by else {}
                )
            if metrics is not None:
                metrics.log(summary, stopwatch, validated)
            if checkpointer.should_save(step, config.training.steps, stopped_by != 0):
                checkpointer.save(trainer.weights, trainer.optimizer, progress_of(trainer))
            profiler.step(step)
            collector.step(step)
            if step == first_step:
                set_timeout(config.comm.train_timeout_seconds, trainer.mesh.get_all_groups())
            if stopped_by:
                raise Stopped(stopped_by, step)


def read_batches(loader: DataLoader, step: int, stopwatch: Stopwatch) -> list[Microbatch]:
    """This rank's microbatches of `step`; a fault of any rank's stream is raised on all.

    A stream may be slow, or have many documents to skip where a run goes on. Meanwhile the ranks keep hearing from each
    other, so that none is taken for lost.
    """

    def has_come() -> bool:
        with stopwatch.waiting_for_data():
            return loader.read_ahead(step)

    waiting = torch.tensor(int(loader.streaming))
    while waiting.item():
        waiting = torch.tensor(int(not together(has_come)))
        dist.all_reduce(waiting)
    with stopwatch.waiting_for_data():
        return loader.step_batches(step)


def forward_backward(trainer: Trainer, microbatches: list[Microbatch]) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of the global batch's mean loss over this rank's microbatches, tokens [B, S] each.

    Returns:
        The loss of this rank's samples (a sum over their labels, divided by the valid labels of all samples) and the
        largest mean loss of one of them; both 0-dim, fp64, on the device, the same on ranks that share samples, but 0
        on those that have not the last stage of a pipeline.

    Raises:
        UserError: the global batch has no valid label.
    """
    batches = [batch.to(trainer.device) for batch in microbatches]
    valid_by_sequence = torch.cat([count_valid(batch.labels) for batch in batches])
    valid = valid_by_sequence.sum()
    dist.all_reduce(valid)
    valid //= trainer.dims.ranks_a_sample  # each of which has counted
    if valid.item() == 0:
        step = trainer.step + 1
        raise SharedUserError(
            f"step {step}: no valid label in the global batch, {sample_range(trainer.loader, step)}"
        )

    losses_by_sequence = []
    for batch in batches:
        tokens, labels = trainer.my_part(batch.tokens), trainer.my_part(batch.labels)
        with trainer.loss_context():
            if trainer.pipeline is not None:
                losses = trainer.pipeline.forward_backward(tokens, labels, valid, batch.documents)
            else:
                # Each microbatch's gradient is reduced and added to the shards at once: no rank ever holds a whole
                # gradient, and it accumulates in the same precision on one rank as on many.
                losses = trainer.sequence_losses(trainer.parts[0](tokens, batch.documents), labels)
                (losses.sum() / valid).backward()
        losses_by_sequence.append(losses.detach().double())
    losses = torch.cat(losses_by_sequence)
    if trainer.dims.cp > 1:
        dist.all_reduce(losses, group=trainer.mesh.get_group("cp"))
    return losses.sum() / valid, (losses / valid_by_sequence.clamp(min=1)).max()


def validate(trainer: Trainer) -> dict[str, float | None]:
    """The validation's results; of each of its batches the forward of `forward_backward`."""

    def losses_of(batch: Microbatch) -> Tensor:
        tokens, labels = trainer.my_part(batch.tokens), trainer.my_part(batch.labels)
        with trainer.loss_context():
            if trainer.pipeline is not None:
                return trainer.pipeline.evaluate(tokens, labels, batch.documents)
            return trainer.sequence_losses(trainer.parts[0](tokens, batch.documents), labels)

    return trainer.validator.run(losses_of)


def optimizer_step(trainer: Trainer) -> None:
    """Update the weights, set the next step's learning rate, and count the step."""
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.optimizer.zero_grad()
    trainer.step += 1
    trainer.tokens_seen += trainer.batch.global_batch_size * trainer.config.training.seq_len


def combine_ranks(
    trainer: Trainer,
    loss: Tensor,
    max_loss: Tensor,
    grad_norm: Tensor,
    stopwatch: Stopwatch,
    stop: "StopRequest",
) -> tuple[StepSummary, int]:
    """The step seen by the whole job, and the signal that asked any rank to stop, or 0: one small collective a step.

    The terms are gathered and added in rank order, so the sum does not depend on the order of arrival.
    """
    local = [peak_memory_gib(trainer.device), stopwatch.data_time_s, float(stop.signal_number)]
    mine = torch.cat(
        [
            torch.stack([loss, max_loss]),
            torch.tensor(local, dtype=torch.float64, device=loss.device),
        ]
    )
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    by_rank = torch.stack(gathered)  # [R, 5]
    worst = by_rank.max(dim=0).values.tolist()
    summary = StepSummary(
        step=trainer.step + 1,
        loss=by_rank[:, 0].sum().item() / trainer.dims.ranks_a_stage,
        max_loss=worst[1],
        grad_norm=grad_norm.item(),
        lr=trainer.optimizer.param_groups[0]["lr"],
        tokens_seen=trainer.tokens_seen
        + trainer.batch.global_batch_size * trainer.config.training.seq_len,
        memory_gib=worst[2],
        data_time_s=worst[3],
    )
    return summary, int(worst[4])


def check_finite(summary: StepSummary, loader: DataLoader) -> None:
    """Stop before a loss or gradient that is not a number reaches the weights.

    Raises:
        NonFinite: the same on every rank, since the summary is.
    """
    if math.isfinite(summary.loss) and math.isfinite(summary.grad_norm):
        return
    raise NonFinite(
        f"step {summary.step}: loss {summary.loss}, gradient norm {summary.grad_norm}, on "
        f"{sample_range(loader, summary.step)}. The weights are still those of step {summary.step - 1}. "
        "Find the operation with --debug.detect_anomaly; a lower optimizer.lr or a longer warm-up often helps."
    )


class StopRequest:
    """Turns SIGTERM, SIGHUP and the first SIGINT into a request to stop after the step in hand.

    A repeated SIGTERM changes nothing: schedulers and torchrun each send one. A second Ctrl-C ends at once.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT == self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number


def set_up(config: JobConfig, device: torch.device, saved: Progress | None = None) -> Trainer:
    """Everything a step needs, with initial weights; `saved` is what a checkpoint to be loaded says of itself.

    Raises:
        UserError: tokenizer, corpus, vocabulary or batch that cannot be, on the rank that found it.
        PeerFault: the same, on the other ranks.
    """
    configure_numerics(config)
    tokenizer = together(lambda: load_tokenizer(find_tokenizer(config.model)))
    # On a host whose token cache is warm the ranks wait for one that builds it.
    dataset, validation_set = together(lambda: open_data(config, tokenizer), patient_group())
    require_equal(
        f"{dataset.fingerprint}; {validation_set.fingerprint}", "the corpus, as each rank reads it,"
    )
    shape = together(lambda: shape_for(config, tokenizer.vocab_size))
    dims = ParallelDims.from_config(config.parallelism, dist.get_world_size())
    mesh = dims.build_mesh(device.type)
    training = config.training
    if saved is not None and training.global_batch_size == -1:
        training = training.model_copy(
            update={"global_batch_size": saved.data["global_batch_size"]}
        )
    batch = together(lambda: plan_batch(training, dims.data_parallel))
    data_rank = dims.data_rank(dist.get_rank())
    separators = (tokenizer.bos_id, tokenizer.eos_id) if training.document_masking else None
    loader = DataLoader(dataset, batch, data_rank, separators, config.data.stall_timeout_seconds)

    parts = build_parts(shape, mesh, dims, config)
    for part in parts.values():
        materialize(part, device, config.debug.seed, offload=config.training.enable_cpu_offload)
    weights = named_weights(parts.values())
    optimizer = build_optimizer(weights, config.optimizer)
    losses = sequence_losses
    # The compiler's cache on disk takes all ranks' sharded tensors for the same, and would hand a rank another one's
    # share of the vocabulary (https://github.com/pytorch/pytorch/issues/188390), or the name of another run's group.
    groups = " ".join(group.group_name for group in mesh.get_all_groups())
    tag = f"rank {dist.get_rank()} of {dist.get_world_size()}, groups {groups}"
    torch.compiler.config.cache_key_tag = tag if dims.tp > 1 else ""
    if config.compile.enable and "loss" in config.compile.components:
        losses = torch.compile(sequence_losses, backend=config.compile.backend, dynamic=False)
    lr_scheduler = get_lr_scheduler(optimizer, config)
    my_part: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731 (a rank that shares no sequence computes all of it)
    if dims.cp > 1:
        my_part = partial(shard_sequence, ring=Ring.of(mesh["cp"], config.parallelism))
    context = partial(
        loss_context,
        vocabulary_sharded=dims.tp > 1 and not config.parallelism.disable_loss_parallel,
    )
    pipeline = None
    if dims.pp > 1:
        pipeline = Pipeline(parts, mesh, dims, config, batch.microbatch_size, device, losses)
    return Trainer(
        config,
        device,
        dims,
        mesh,
        batch,
        loader,
        parts,
        weights,
        pipeline,
        optimizer,
        lr_scheduler,
        losses,
        my_part,
        context,
        Validator(config, validation_set, separators, batch, dims, parts.values(), device),
    )


def open_data(config: JobConfig, tokenizer: Tokenizer) -> tuple[Dataset, ValidationSet]:
    """What the run trains on, and what it validates on; either is tokenised if need be."""
    training, seed = config.training, config.debug.seed
    dataset = build_dataset(
        training, config.data, tokenizer, seed, config.validation, log=logger.info
    )
    return dataset, ValidationSet(config, tokenizer, logger.info)


def shape_for(config: JobConfig, tokenizer_size: int) -> ModelShape:
    """The model's shape with its vocabulary settled; 0 takes the tokenizer's."""
    shape = plan_shape(config.model)
    if shape.vocab_size == 0:
        return replace(shape, vocab_size=tokenizer_size)
    if shape.vocab_size < tokenizer_size:
        raise UserError(
            f"model.vocab_size = {shape.vocab_size} is smaller than the tokenizer's {tokenizer_size} pieces "
            f"({find_tokenizer(config.model)}); give at least that, or 0 to take the tokenizer's"
        )
    return shape


def configure_numerics(config: JobConfig) -> None:
    """Process-wide switches of [debug] and [training] that must be set before the first kernel runs."""
    torch.manual_seed(config.debug.seed)
    if config.debug.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS is deterministic only with this
        torch.use_deterministic_algorithms(True, warn_only=config.debug.deterministic_warn_only)
    torch.autograd.set_detect_anomaly(config.debug.detect_anomaly)


def run(config: JobConfig, device: torch.device) -> None:
    """One run, from claiming its folder to the last step; the process group is up."""
    rank = dist.get_rank()
    if config.job.print_config:
        logger.info(to_toml(config))
    for note in config.notes:
        logger.info(f"config     {note}")
    folder = together(lambda: RunFolder(config, owner=rank == 0))
    checkpointer = Checkpointer(config.checkpoint, folder.path)
    source = checkpointer.find()
    own = source if source is not None and source.path.parent == checkpointer.folder else None
    if own is not None and own.progress.step >= config.training.steps:
        logger.info(
            f"nothing to do: {own.path} already holds all {config.training.steps} steps of this run"
        )
        return

    if (
        source is not None
        and not source.model_only
        and source.progress.step >= config.training.steps
    ):
        raise SharedUserError(
            f"checkpoint.initial_load_path = {str(source.path)!r} is at step {source.progress.step}, and "
            f"training.steps = {config.training.steps} leaves nothing to do. Raise it, or take the weights alone."
        )

    trainer = set_up(
        config, device, None if source is None or source.model_only else source.progress
    )
    if source is not None:
        resume(trainer, checkpointer, source)
    profiler = together(lambda: Profiler(config.profiling, folder.path, device, rank))
    on_rank_zero(
        lambda: folder.resume_at(trainer.step) if own is not None else folder.begin_afresh()
    )
    checkpointer.prepare(trainer.weights, trainer.optimizer)
    facts = describe(trainer)
    on_rank_zero(lambda: folder.describe_run(facts))
    metrics = together(lambda: open_metrics(trainer, folder, facts))
    try:
        train(trainer, checkpointer, metrics, profiler)
    except torch.OutOfMemoryError:
        profiler.write_memory_snapshot("out-of-memory")
        raise
    finally:
        if metrics is not None:
            metrics.close()
    logger.info(
        f"done: {trainer.step} steps, {trainer.tokens_seen:,} tokens; outputs in {folder.path}"
    )


def resume(trainer: Trainer, checkpointer: Checkpointer, source: Source) -> None:
    """Load the weights and, unless only they are wanted, the rest of the state; what was loaded is stated."""
    saved = source.progress
    if source.model_only:
        checkpointer.load(source, trainer.weights, None)
        return
    accept = trainer.config.checkpoint.accept_changed_data
    together(lambda: trainer.loader.resume(saved.data, saved.step, accept))
    checkpointer.load(source, trainer.weights, trainer.optimizer)
    trainer.step, trainer.tokens_seen = saved.step, saved.tokens_seen
    set_step(trainer.lr_scheduler, trainer.step)
    for change in schedule_changes(trainer.config, saved):
        logger.warning(f"the learning-rate schedule differs from the checkpoint's: {change}")


def schedule_changes(config: JobConfig, saved: Progress) -> list[str]:
    """How the current schedule, which is the one that counts, differs from the one the checkpoint was made under."""
    known = {
        key: value
        for key, value in saved.config["lr_scheduler"].items()
        if key in LRScheduler.model_fields
    }
    before = plan_schedule(LRScheduler(**known), saved.config["training"]["steps"])
    now = plan_schedule(config.lr_scheduler, config.training.steps)
    changes = differences(asdict(before), now)
    rate = saved.config["optimizer"]["lr"]
    if rate != config.optimizer.lr:
        changes.insert(0, f"optimizer.lr was {rate}, is {config.optimizer.lr}")
    return changes


def progress_of(trainer: Trainer) -> Progress:
    """What a checkpoint holds beside tensors."""
    return Progress(
        step=trainer.step,
        tokens_seen=trainer.tokens_seen,
        data=trainer.loader.state(trainer.step, gathered(trainer.loader.positions())),
        config=trainer.config.model_dump(mode="json"),
    )


def sample_range(loader: DataLoader, step: int) -> str:
    """The global samples of one step, in words, for error messages."""
    return f"global samples {loader.samples_before(step)} to {loader.samples_before(step + 1) - 1}"


def describe(trainer: Trainer) -> dict[str, Any]:
    """Print what will run; return the same as facts for run.json."""
    config, batch, shape = trainer.config, trainer.batch, trainer.shape
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(shape).parameters())
    tokens_per_step = batch.global_batch_size * config.training.seq_len
    device_name = (
        "cpu"
        if trainer.device.type == "cpu"
        else torch.get_device_module(trainer.device).get_device_name()
    )
    logger.info(
        f"torchtrain {__version__}, torch {torch.__version__}: {config.job.description}, "
        f"{dist.get_world_size()} x {device_name}, outputs in {config.job.dump_folder}"
    )
    logger.info(
        f"model      {config.model.name} {config.model.flavor}, {parameters:,} parameters: {shape.describe()}"
    )
    layout = [trainer.dims.describe()] + (
        [trainer.pipeline.plan.describe()] if trainer.pipeline is not None else []
    )
    logger.info(f"layout     {'; '.join(layout)}")
    logger.info(
        f"batch      {batch.global_batch_size} sequences x {config.training.seq_len} tokens = {tokens_per_step:,} "
        f"tokens a step; microbatch {batch.microbatch_size}, accumulation {batch.accumulation_steps}"
    )
    logger.info(
        f"precision  parameters {config.training.dtype}, compute {config.training.mixed_precision_param}, "
        f"reductions {config.training.mixed_precision_reduce}"
    )
    logger.info(f"data       {trainer.loader.describe(config.training.steps)}")
    if config.validation.enable:
        logger.info(f"validation {trainer.validator.describe()}")
    if config.lr_scheduler.log_schedule:
        schedule = plan_schedule(config.lr_scheduler, config.training.steps)
        logger.info(f"lr         {describe_schedule(schedule, config.optimizer.lr)}")
    return {
        "torchtrain": __version__,
        "description": config.job.description,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "device": device_name,
        "world_size": dist.get_world_size(),
        "degrees": asdict(trainer.dims),
        "batch": asdict(batch),
        "tokens_per_step": tokens_per_step,
        "shape": asdict(shape),
        "parameters": parameters,
        "data_fingerprint": trainer.loader.dataset.fingerprint,
        "validation_fingerprint": trainer.validator.samples.fingerprint,
        "first_step": trainer.step + 1,
    }


def open_metrics(
    trainer: Trainer, folder: RunFolder, facts: dict[str, Any]
) -> MetricsLogger | None:
    """Rank 0's metrics; the other ranks have none."""
    if not folder.owner:
        return None
    training = trainer.config.training
    peak = peak_flops(trainer.device, DTYPES[training.mixed_precision_param])
    peak = None if peak is None else peak * dist.get_world_size()
    return MetricsLogger(
        trainer.config,
        folder.path,
        facts,
        next(iter(trainer.parts.values())).flops_per_token(training.seq_len),
        peak,
    )


def main(config: JobConfig) -> int:
    """Exit status: 0 done; 1 a crash; 2 something the user can mend; 128 + n stopped by signal n."""
    rank = int(os.environ.get("RANK", "0"))
    init_logging(
        rank, int(os.environ.get("WORLD_SIZE", "1")), config.metrics.disable_color_printing
    )
    end_with_launcher()
    faulthandler.register(signal.SIGUSR1)  # `kill -USR1` shows where every thread of a rank stands
    try:
        run(config, join_process_group(config.comm.init_timeout_seconds))
    except (UserError, NonFinite) as fault:
        if rank == 0 or not isinstance(fault, (SharedUserError, NonFinite)):
            logger.error(str(fault))
        return 2 if isinstance(fault, UserError) else 1
    except PeerFault as fault:
        return 2 if fault.is_user_error else 1
    except Stopped as stopped:
        logger.warning(str(stopped))
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:
        logger.error(f"rank {rank} failed:\n{traceback.format_exc()}")
        return 1
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    status = main(CONFIG)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a process group's threads can hang or abort while the interpreter is torn down, after a fault when
    # the peers have gone, rarely even after success, and that would hide how the run ended.
    os._exit(status)
