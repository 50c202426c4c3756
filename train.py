"""Pretrain a Llama: `torchrun train.py --job.config_file FILE`, or `python train.py …` on one rank.

`train` is the whole loop; below it stand the parts of a step, in their order. `run` sets up and
hands over to it; `main` turns faults into exit statuses. `torchtrain.set_up.set_up`,
`forward_backward` and `optimizer_step` can be called from a tool.
"""

import faulthandler
import math
import os
import signal
import sys
import traceback
from dataclasses import asdict
from functools import partial

from torchtrain.early_interrupt import await_end, end_in_time, end_on_interrupt
from torchtrain.imports import begin_imports, end_imports
from torchtrain.installation import exit_without_dependencies
from torchtrain.orphans import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()
    exit_without_dependencies()
    end_on_interrupt(before="the first step")
    begin_imports()

from torchtrain.config_manager import JobConfig, parse_or_exit

# Before torch is imported, so that --help and a faulty config are answered at once.
CONFIG = parse_or_exit() if __name__ == "__main__" else JobConfig()

import torch
import torch.distributed as dist
from torch import Tensor

from torchtrain.attempts import end_for_good, log_restart
from torchtrain.catalog.identity import MAY_DIFFER_PER_NODE
from torchtrain.checkpoint import Checkpointer
from torchtrain.config.plans import list_output_folders
from torchtrain.config.toml import to_toml
from torchtrain.datasets.loader import Microbatch
from torchtrain.errors import BadNumbers, PeerFault, SharedUserError, Stopped, UserError
from torchtrain.exporting import export_last
from torchtrain.logging_utils import init_logging, logger
from torchtrain.loss import BatchLoss, count_valid
from torchtrain.lr_scheduling import set_step
from torchtrain.metrics import (
    MetricsLogger,
    StepSummary,
    Stopwatch,
    peak_memory_gib,
    reset_peak_memory,
)
from torchtrain.optimizers.clipping import clip_grad_norm_
from torchtrain.parallelisms.fsdp import free_gathered
from torchtrain.parallelisms.initial_weights import require_same_draws
from torchtrain.profiling import GarbageCollection, Profiler
from torchtrain.ranks import (
    join_process_group,
    name_process,
    on_rank_zero,
    require_equal_config,
    together,
)
from torchtrain.resuming import (
    check_model,
    claim_folder,
    find_saved_progress,
    has_steps_left,
    make_up_validation,
    resume,
    save_progress,
    saving_at_stop,
)
from torchtrain.run_facts import describe, open_metrics, state_config
from torchtrain.set_up import ParallelModel, Trainer, set_up
from torchtrain.step_metrics import StepMetrics
from torchtrain.stopping import StopRequest, find_deadline, log_deadline
from torchtrain.text_samples import OfLogits
from torchtrain.utils import plural
from torchtrain.watchdog import Watchdog


def train(
    trainer: Trainer,
    checkpointer: Checkpointer,
    metrics: MetricsLogger | None,
    profiler: Profiler,
    stop: StopRequest,
    watchdog: Watchdog,
) -> None:
    """Train from the step after `trainer.step` to the run's last, or until it is to stop."""
    config, last_step = trainer.config, trainer.plan.steps
    collector = GarbageCollection(config.training.gc_freq, debug=config.training.gc_debug)
    ending = saving_at_stop(trainer, checkpointer, metrics)
    reset_peak_memory(trainer.device)  # before, each weight was whole: drawn, or read from a file
    with watchdog.watching(), profiler.recording(), checkpointer.finishing(), ending:
        make_up_validation(trainer, metrics, partial(losses_of, trainer))
        for step in range(trainer.step + 1, last_step + 1):
            stop.begin_turn(checkpointer.save_seconds, is_last=step == last_step)
            stopwatch = Stopwatch()
            watchdog.begin_step(step)
            microbatches = trainer.loader.read(step, stopwatch.waiting_for_data, stop.find_reason)
            with trainer.scale_context():
                loss = forward_backward(trainer, microbatches)
            grad_norm = clip_gradients(trainer)
            summary, stopped_by = combine_ranks(trainer, loss, grad_norm, stopwatch, stop)
            summary = trainer.guard.judge(summary, loss.own)
            optimizer_step(trainer, skips=summary.skipped)
            if trainer.replica_check.is_due(step):
                trainer.replica_check.run(step)
            validated, stopped_by = validate(trainer, stop, stopwatch, watchdog, stopped_by)
            if metrics is not None:
                metrics.log(summary, stopwatch, validated)
            if trainer.text_sampler.is_due(step) and not stopped_by:
                stopped_by = show_texts(trainer, metrics, stop, watchdog)
            checkpointer.poll()
            if not stopped_by:
                save_progress(trainer, checkpointer, metrics)
            profiler.step(step)
            collector.step(step)
            watchdog.end_step()
            if stopped_by:
                raise Stopped(stopped_by, step)


def forward_backward(trainer: Trainer, microbatches: list[Microbatch]) -> BatchLoss:
    """Accumulate the gradient of the global batch's mean loss over this rank's microbatches.

    Without a valid label in the global batch, loss and gradient are 0. (To ask whether there is one
    would be to wait for the device: the guard does, later in the step.)

    Args:
        trainer: its weights get the gradient.
        microbatches: of this rank, tokens [B, S] each.
    """
    batches = [batch.to(trainer.device) for batch in microbatches]
    valid_by_sequence = torch.cat([count_valid(batch.labels) for batch in batches])
    valid = valid_by_sequence.sum()
    dist.all_reduce(valid)
    valid //= trainer.plan.degrees.ranks_per_sample  # each of which has counted
    divisor = valid.clamp(min=1)

    losses_by_sequence = []
    for batch in batches:
        tokens = trainer.shard(batch.tokens)
        labels = trainer.shard(batch.labels)
        with trainer.loss_context():
            if trainer.pipeline is not None:
                losses = trainer.pipeline.forward_backward(tokens, labels, divisor, batch.documents)
            else:
                # Each microbatch's gradient is reduced and added to the shards at once: no rank
                # ever holds a whole gradient, and it accumulates in the same precision on one rank
                # as on many.
                losses = trainer.sequence_losses(trainer.parts[0](tokens, batch.documents), labels)
                (losses.sum() / divisor).backward()
        losses_by_sequence.append(losses.detach().double())
    losses = torch.cat(losses_by_sequence)
    if trainer.mesh.has("cp"):
        dist.all_reduce(losses, group=trainer.mesh.group("cp"))
    if trainer.expert_balance is not None:
        trainer.expert_balance.collect(trainer.step + 1)
    largest = (losses / valid_by_sequence.clamp(min=1)).max()
    return BatchLoss(losses.sum() / divisor, largest, valid)


def clip_gradients(trainer: Trainer) -> Tensor:
    """Clip the gradient, and return its norm before that, which is the same on every rank."""
    stages = trainer.mesh.group("pp")
    return clip_grad_norm_(trainer.weights.values(), trainer.config.training.max_norm, stages)


def combine_ranks(
    trainer: Trainer,
    loss: BatchLoss,
    grad_norm: Tensor,
    stopwatch: Stopwatch,
    stop: StopRequest,
) -> tuple[StepSummary, int]:
    """Return the step as the whole job sees it, and the reason to stop that a rank has, or 0.

    Metrics that the model and the optimizer add travel in the same small collective. Reading its
    result is a step's one wait for the device: the guard judges it before the update.
    """
    metrics = StepMetrics()
    metrics.add("loss", loss.own, reduce="sum")
    metrics.add("max_loss", loss.largest, reduce="max")
    metrics.add("valid_labels", loss.valid, reduce="max")
    metrics.add("grad_norm", grad_norm, reduce="max")
    metrics.add("memory_gib", peak_memory_gib(trainer.device), reduce="max")
    metrics.add("data_time_s", stopwatch.data_time_s, reduce="max")
    metrics.add("own_time_s", stopwatch.own_time_s, reduce="max")
    metrics.add("stop_reason", stop.find_reason(), reduce="max")
    metrics.collect(trainer.metric_sources)
    values = metrics.reduce(trainer.device)
    stop.listen()
    del values["own_time_s"]
    stopped_by = int(values.pop("stop_reason"))
    summary = StepSummary(
        step=trainer.step + 1,
        loss=values.pop("loss") / trainer.plan.degrees.ranks_per_stage,
        max_loss=values.pop("max_loss"),
        valid_labels=int(values.pop("valid_labels")),
        grad_norm=values.pop("grad_norm"),
        lr=trainer.optimizer.param_groups[0]["lr"],
        tokens_seen=trainer.tokens_seen + trainer.tokens_per_step,
        memory_gib=values.pop("memory_gib"),
        data_time_s=values.pop("data_time_s"),
        own_times_s=metrics.of_each_rank("own_time_s"),
        added=values,
    )
    return summary, stopped_by


def optimizer_step(trainer: Trainer, *, skips: bool = False) -> None:
    """Update weights and routers' biases, set the next step's learning rate, count the step.

    A step that is skipped has no update, and counts all the same.
    """
    if skips:
        set_step(trainer.lr_scheduler, trainer.step + 1)
    else:
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    trainer.optimizer.zero_grad()
    if trainer.expert_balance is not None and not skips:
        trainer.expert_balance.update_biases()
    trainer.step += 1
    trainer.tokens_seen += trainer.tokens_per_step


def validate(
    trainer: Trainer, stop: StopRequest, stopwatch: Stopwatch, watchdog: Watchdog, stopped_by: int
) -> tuple[dict[str, float | None], int]:
    """Return the results, if a validation is due after this step, and why a rank is to stop, or 0.

    A run that is to stop leaves its validation out, since the time to save may be short. The next
    start makes up for it.
    """
    if not trainer.validator.is_due(trainer.step):
        return {}, stopped_by
    warming_up = watchdog.warming_up("validation")
    with stopwatch.paused(), warming_up, trainer.scale_context():
        losses = partial(losses_of, trainer)
        results = trainer.validator.run(losses, lambda: stopped_by or stop.find_reason())
        free_gathered(trainer.parts.values())
    return results


def losses_of(model: ParallelModel, batch: Microbatch) -> Tensor:
    """Return this rank's part of the losses [B] of a batch on the device, by its forward alone."""
    tokens = model.shard(batch.tokens)
    labels = model.shard(batch.labels)
    with model.loss_context():
        if model.pipeline is not None:
            return model.pipeline.evaluate(tokens, labels, batch.documents)
        return model.sequence_losses(model.parts[0](tokens, batch.documents), labels)


def show_texts(
    trainer: Trainer, metrics: MetricsLogger | None, stop: StopRequest, watchdog: Watchdog
) -> int:
    """Let the model write, and report it; return why a rank is to stop, which ends it, or 0."""
    write = trainer.text_sampler.run
    compute = partial(compute_of_logits, trainer)
    with watchdog.warming_up("text samples"), trainer.scale_context():
        samples, reason = write(trainer.step, compute, trainer.device, stop.find_reason)
    free_gathered(trainer.parts.values())
    if metrics is not None and not reason:
        metrics.log_texts(trainer.step, samples)
    return reason


def compute_of_logits(
    model: ParallelModel, of_logits: OfLogits, tokens: Tensor, labels: Tensor
) -> Tensor:
    """Return this rank's values [B] of a function of logits and labels, of tokens [B, S]."""
    tokens, labels = model.shard(tokens), model.shard(labels)
    if model.pipeline is not None:
        return model.pipeline.compute(of_logits, tokens, labels)
    return of_logits(model.parts[0](tokens), labels)


def run(config: JobConfig, device: torch.device, deadline: float = math.inf) -> None:
    """Do one run, from what it needs to its last step; the process group is up.

    It ends before `deadline`, by `time.monotonic`.
    """
    rank = dist.get_rank()
    require_equal_config(config.model_dump(mode="json"), MAY_DIFFER_PER_NODE)
    state_config(config)
    folder, checkpointer, source = claim_folder(config, device)
    is_own = source is not None and source.path.parent == checkpointer.folder
    if source is not None and not has_steps_left(source, config, is_own=is_own):
        export_last(config, source.path)
        return

    if source is not None:
        check_model(source, config)
    require_same_draws(device, loads=source is not None)
    trainer = set_up(config, device, find_saved_progress(source))
    if source is not None:
        resume(trainer, checkpointer, source)
    log_restart(trainer.step)
    profiler = together(lambda: Profiler(config.profiling, folder.path, device, rank))
    if is_own:
        on_rank_zero(lambda: folder.resume_at(trainer.step))
    else:
        on_rank_zero(lambda: folder.begin_afresh(list_output_folders(config).values()))
    checkpointer.prepare(trainer.model_state, trainer.optimizer, estimate=deadline < math.inf)
    watchdog = Watchdog(config.comm, folder.path, trainer.mesh, loop=train)
    facts = describe(trainer)
    log_deadline(deadline)
    on_rank_zero(lambda: folder.describe_run(to_toml(config), asdict(facts)))
    metrics = together(lambda: open_metrics(trainer, folder, facts))
    try:
        train(trainer, checkpointer, metrics, profiler, StopRequest(deadline), watchdog)
    except torch.OutOfMemoryError:
        profiler.write_memory_snapshot("out-of-memory")
        raise
    finally:
        if metrics is not None:
            metrics.close()
    export_last(config, checkpointer.path(trainer.step))
    logger.info(
        f"done: {plural(trainer.step, 'step')}, {plural(trainer.tokens_seen, 'token')}; "
        f"outputs in {folder.path}"
    )


def main(config: JobConfig) -> int:
    """Return the exit status: 0 done; 1 a crash; 2 a user error; 128 + n stopped by signal n."""
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    init_logging(rank, world_size, disable_color=config.metrics.disable_color_printing)
    faulthandler.register(signal.SIGUSR1)  # shows where every thread of a rank is
    name_process()  # `pkill -USR1 torchtrain` then finds the ranks, and not torchrun
    deadline = math.inf
    try:
        saves = config.checkpoint.enable and not config.checkpoint.load_only
        deadline = find_deadline(config.job.max_minutes, os.environ, saves=saves)
        end_in_time(deadline)
        run(config, join_process_group(config.comm.init_timeout_seconds), deadline)
    except (SharedUserError, BadNumbers) as fault:
        if rank == 0:
            logger.error(str(fault))
        return end_for_good(1 if isinstance(fault, BadNumbers) else 2)
    except UserError as fault:
        logger.error(str(fault))
        return end_for_good(2)
    except PeerFault as fault:
        return end_for_good(2) if fault.is_user_error else 1
    except Stopped as stopped:
        logger.warning(str(stopped))
        return end_for_good(stopped.status)
    except KeyboardInterrupt:
        return end_for_good(128 + signal.SIGINT)
    except BaseException:
        await_end(deadline)
        logger.error(f"rank {rank} failed:\n{traceback.format_exc()}")
        return 1
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    end_imports()
    status = main(CONFIG)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a process group's threads can hang or abort while the interpreter is torn down,
    # after a fault when the peers have gone, rarely even after success, and that would hide how the
    # run ended.
    os._exit(status)
