"""Check a config without running it, and print the resolved plan in words.

    python -m torchtrain.config_manager [--world-size N] -- --job.config_file FILE ...

The status is 0, or 2 with a report.
"""

import argparse
import sys

from torchtrain.config.plans import RunPlan, Schedule, plan_run
from torchtrain.config.schema import Config
from torchtrain.config.sources import DataSource
from torchtrain.config_manager import parse_or_exit


def main(arguments: list[str]) -> None:
    """Check the config of a run of so many ranks, and print what follows from it."""
    parser = argparse.ArgumentParser(
        prog="torchtrain check-config",
        usage="%(prog)s [--world-size N] -- [--SECTION.KEY VALUE ...]",
        description="Check a config, given by train.py's options, without running it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--world-size", type=int, default=1, metavar="N", help="ranks of the run (default: 1)"
    )
    given, rest = parser.parse_known_args(arguments)
    if given.world_size < 1:
        parser.error(f"--world-size {given.world_size}: must be at least 1")
    trainer_options = [argument for argument in rest if argument != "--"]
    config = parse_or_exit(trainer_options, given.world_size)
    lines = summarize(config, plan_run(config, given.world_size))
    lines += [f"note       {note}" for note in config.notes]
    print("\n".join(["The configuration is good.", *lines]))


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


if __name__ == "__main__":
    main(sys.argv[1:])
