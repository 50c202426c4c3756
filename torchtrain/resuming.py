"""What a run goes on from: finding it, whether it may be taken, and taking it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from torchtrain.catalog.identity import (
    ModelIdentity,
    describe_changes,
    describe_state_dtype,
    find_saved_model,
    require_same_model,
)
from torchtrain.catalog.parameters import count_parameters
from torchtrain.checkpoint import Checkpointer, Foreign, Progress, Source
from torchtrain.checkpoint.commit import peek
from torchtrain.config.plans import plan_schedule, plan_shape
from torchtrain.config.rules import plan_length
from torchtrain.config.schema import LRScheduler
from torchtrain.config.toml import quoted
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.data_state import find_tokenizers
from torchtrain.datasets.loader import Microbatch
from torchtrain.errors import SharedUserError, Stopped
from torchtrain.logging_utils import logger
from torchtrain.lr_scheduling import differences, set_step
from torchtrain.metrics import MetricsLogger
from torchtrain.needs import check_needs
from torchtrain.parallelisms.fsdp import free_gathered
from torchtrain.ranks import gathered, on_rank_zero, together
from torchtrain.run_folder import RunFolder, lacks_validation
from torchtrain.set_up import Trainer
from torchtrain.utils import expand_user


def claim_folder(
    config: JobConfig, device: torch.device
) -> tuple[RunFolder, Checkpointer, Source | Foreign | None]:
    """Check what the run needs, lock its folder, and find what it goes on from. A collective call.

    The needs come first: to find a checkpoint is to read it whole, and to set a damaged one aside.
    A run that is finished, by what its newest checkpoint says of itself, needs nothing.

    Raises:
        UserError: something is missing, the folder is in use, or no checkpoint can be taken.
    """
    path = expand_user(config.job.dump_folder)
    checkpointer = Checkpointer(config.checkpoint, path)
    newest = checkpointer.peek()
    seems_finished = newest is not None and is_finished(newest, config)
    if not seems_finished:
        check_needs(config, device)
    folder = together(lambda: RunFolder(path, owner=dist.get_rank() == 0))
    source = checkpointer.find(partial(count_steps, config))
    if seems_finished and not (isinstance(source, Source) and source.progress == newest):
        check_needs(config, device)  # it is damaged, so the run is not finished after all
    return folder, checkpointer, source


def find_saved_progress(source: Source | Foreign | None) -> Progress | None:
    """Return what the run goes on from; None where it takes weights alone, or nothing."""
    if isinstance(source, Source) and not source.model_only:
        return source.progress
    return None


def check_model(source: Source | Foreign, config: JobConfig) -> None:
    """Check that the model to be loaded is this run's: the same function of the tokens.

    Raises:
        SharedUserError: it is another, and `checkpoint.accept_changed_model` is not set.
    """
    if isinstance(source, Source):
        saved = find_saved_model(source.progress.config, source.progress.shape)
    elif source.identity is None:
        return  # its tensors are all there is to compare
    else:
        saved = source.identity
    require_same_model(
        source.path,
        saved,
        ModelIdentity(family=config.model.name, shape=asdict(plan_shape(config.model))),
        accept_changes=config.checkpoint.accept_changed_model,
    )


def count_steps(config: JobConfig, saved: Progress) -> int:
    """Return the steps of a run that goes on from a checkpoint, by its vocabulary and batch."""
    if config.training.tokens is None:
        return config.training.steps
    shape = plan_shape(config.model)
    if shape.vocab_size == 0:
        shape = replace(shape, vocab_size=(saved.shape or {}).get("vocab_size", 0))
    batch = config.training.global_batch_size
    if batch == -1:
        batch = saved.data["global_batch_size"]
    count = count_parameters(config.model.name, shape)
    return plan_length(config.training, count, batch).steps


def seems_finished(config: JobConfig) -> bool:
    """Check whether a run is finished, by what its newest checkpoint says of itself.

    Asked before there are ranks.
    """
    folder = expand_user(config.job.dump_folder) / expand_user(config.checkpoint.folder)
    newest = peek(config.checkpoint, folder)
    return newest is not None and leaves_nothing(newest, config)


def is_finished(saved: Progress, config: JobConfig) -> bool:
    """Return what `leaves_nothing` does. A collective call."""
    return on_rank_zero(lambda: leaves_nothing(saved, config))


def leaves_nothing(saved: Progress, config: JobConfig) -> bool:
    """Check whether a checkpoint of the run's own leaves it no step, and no validation."""
    if saved.step < count_steps(config, saved):
        return False
    if not config.validation.enable or saved.model_only:
        return True
    return not lacks_validation(expand_user(config.job.dump_folder), saved.step)


def has_steps_left(source: Source | Foreign, config: JobConfig, *, is_own: bool) -> bool:
    """Check whether a run has steps left after those of the checkpoint, or their validation.

    Where its own checkpoint leaves nothing, the run says so and is done.

    Raises:
        SharedUserError: another run's checkpoint leaves none.
    """
    if not isinstance(source, Source):
        return True
    steps = count_steps(config, source.progress)
    if is_own:
        if not is_finished(source.progress, config):
            return True
        logger.info(f"nothing to do: {source.path} already holds all {steps} steps of this run")
        return False
    if source.progress.step < steps:
        return True
    if source.model_only or "train_state" in source.left_out:
        return True
    given = f"training.steps = {steps}"
    if config.training.tokens is not None:
        given = f"training.tokens = {quoted(config.training.tokens)}, {steps} steps,"
    raise SharedUserError(
        f"checkpoint.initial_load_path = {str(source.path)!r} is at step {source.progress.step}, "
        f"and {given} leaves nothing to do. Raise it, or take the weights alone."
    )


def resume(trainer: Trainer, checkpointer: Checkpointer, source: Source | Foreign) -> None:
    """Load the weights and, unless only they are wanted, the rest; say what differs."""
    if not isinstance(source, Source):
        checkpointer.load_foreign(source, trainer.weights)
        return
    saved = source.progress
    config = trainer.config
    if source.model_only or "dataloader" in source.left_out:
        warn_of_another_tokenizer(trainer, source)
    if source.model_only:
        checkpointer.load(source, trainer.model_state, None)
        return
    resume_data(trainer, source)
    now = config.model_dump(mode="json")
    changed_states = describe_state_dtype(source.path, saved.config, now)
    checkpointer.load(source, trainer.model_state, trainer.optimizer, changed_states)
    if "train_state" not in source.left_out:
        trainer.step = saved.step
        trainer.tokens_seen = saved.tokens_seen
        trainer.guard.resume(saved.guard)
    if source.left_out:
        logger.info(f"not loaded from {source.path}: {', '.join(source.left_out)}")
    set_step(trainer.lr_scheduler, trainer.step)
    for change in find_schedule_changes(trainer, saved):
        logger.warning(f"the learning-rate schedule differs from the checkpoint's: {change}")
    changes, more_than_rounding = describe_changes(
        saved.config, now, JobConfig().model_dump(mode="json")
    )
    if changes:
        level = logging.WARNING if more_than_rounding else logging.INFO
        logger.log(level, f"the config differs from the checkpoint's: {changes}")


def warn_of_another_tokenizer(trainer: Trainer, source: Source) -> None:
    """Say so where the weights know other tokens; with the data position it would be refused."""
    tokenizers = find_tokenizers(source.progress.data)
    if tokenizers and tokenizers != find_tokenizers(trainer.loader.state(0)):
        logger.warning(
            f"the weights of {source.path} were trained with another tokenizer than "
            "model.tokenizer_path: to them the same id is another token"
        )


def resume_data(trainer: Trainer, source: Source) -> None:
    """Read on where the checkpoint's run has ended, unless that is left out. A collective call."""
    saved = source.progress
    accept = trainer.config.checkpoint.accept_changed_data
    sample = 0
    if "dataloader" not in source.left_out:
        together(lambda: trainer.loader.resume(saved.data, saved.step, accept_changes=accept))
        sample = trainer.loader.samples_before(saved.step + 1)
    if "dataloader" in source.left_out or "train_state" in source.left_out:
        step = 0 if "train_state" in source.left_out else saved.step
        trainer.loader.continue_at(step, sample)


def find_schedule_changes(trainer: Trainer, saved: Progress) -> list[str]:
    """Return how the current schedule, which counts, differs from the checkpoint's."""
    section = saved.config["lr_scheduler"]
    known = {key: value for key, value in section.items() if key in LRScheduler.model_fields}
    steps = saved.steps or saved.config["training"]["steps"]
    changes = differences(asdict(plan_schedule(LRScheduler(**known), steps)), trainer.plan.schedule)
    rate = saved.max_lr or saved.config["optimizer"]["lr"]
    now = trainer.plan.rate.lr
    if rate != now:
        hint = ""
        if trainer.config.optimizer.lr == "auto":
            hint = f' by "auto"; to keep it, set optimizer.lr = {rate}'
        changes.insert(0, f"optimizer.lr was {rate}, is {now}{hint}")
    return changes


def progress_of(trainer: Trainer) -> Progress:
    """Return what a checkpoint holds beside tensors. A collective call."""
    positions = gathered(trainer.loader.positions())
    return Progress(
        step=trainer.step,
        tokens_seen=trainer.tokens_seen,
        data=trainer.loader.state(trainer.step, positions),
        config=trainer.config.model_dump(mode="json"),
        shape=asdict(trainer.plan.shape),
        guard=trainer.guard.state(),
        steps=trainer.plan.steps,
        max_lr=trainer.plan.rate.lr,
    )


def save_progress(
    trainer: Trainer,
    checkpointer: Checkpointer,
    metrics: MetricsLogger | None,
    *,
    stopping: bool = False,
) -> None:
    """Save what the run has, if a save is due after this step. A collective call.

    It happens beside the next steps, unless `checkpoint.async_mode` is disabled.
    """
    last_step = trainer.plan.steps
    if not checkpointer.should_save(trainer.step, last_step, stopping=stopping):
        return
    if metrics is not None:
        metrics.sync()  # no complete checkpoint without the lines of its steps
    checkpointer.save(
        trainer.model_state,
        trainer.optimizer,
        progress_of(trainer),
        is_last=trainer.step == last_step,
        stopping=stopping,
    )


def make_up_validation(
    trainer: Trainer, metrics: MetricsLogger | None, losses_of: Callable[[Microbatch], Tensor]
) -> None:
    """Validate the loaded weights, if a stop has left that out. A collective call.

    Args:
        trainer: has just loaded them.
        metrics: of rank 0; adds the results to the line of their step.
        losses_of: as of `Validator.run`.
    """
    step = trainer.step
    lacks_it = on_rank_zero(
        lambda: metrics is not None and lacks_validation(metrics.run_folder, step)
    )
    if lacks_it and trainer.validator.is_due(step):
        with trainer.scale_context():
            results, _ = trainer.validator.run(losses_of)
            free_gathered(trainer.parts.values())
        if metrics is not None:
            metrics.amend(step, results)


@contextmanager
def saving_at_stop(
    trainer: Trainer, checkpointer: Checkpointer, metrics: MetricsLogger | None
) -> Iterator[None]:
    """Save the last step taken when all ranks stop, if this process has taken one."""
    first = trainer.step
    try:
        yield
    except Stopped:
        if trainer.step > first:
            save_progress(trainer, checkpointer, metrics, stopping=True)
        raise
