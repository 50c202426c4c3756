"""The resolved plan in words, as the config check prints it."""

from torchtrain.config.plans import RunPlan, Schedule
from torchtrain.config.schema import Config
from torchtrain.config.sources import DataSource


def summarize(config: Config, plan: RunPlan) -> list[str]:
    """Return what a run of a checked config would do, a line per subject."""
    lines = [
        f"model      {config.model.name} {config.model.flavor}: {plan.shape.describe()}",
        f"layout     {plan.describe_layout()}",
        f"batch      {plan.batch.describe(config.training.seq_len)}",
        f"data       {_describe_sources(plan.sources)}",
    ]
    if plan.validation.sources:
        held_out = config.validation.dataset is None
        sources = _describe_sources(plan.validation.sources)
        lines.append(f"validation {'held out of ' if held_out else ''}{sources}")
    lines.append(f"lr         {_describe_schedule(plan.schedule, config.optimizer.lr)}")
    return lines


def _describe_sources(sources: list[DataSource]) -> str:
    if len(sources) == 1:
        return sources[0].name
    return ", ".join(f"{source.name} {float(source.share):.3g}" for source in sources)


def _describe_schedule(schedule: Schedule, max_lr: float) -> str:
    return (
        f"at most {max_lr:g}; {schedule.total_steps} steps: {schedule.warmup_steps} of "
        f"warm-up, {schedule.stable_steps} stable, {schedule.decay_steps} of "
        f"{schedule.decay_type} decay"
    )
