"""Check a config without running it, and print the resolved plan in words.

    python -m torchtrain.config_manager [--world-size N] -- --job.config_file FILE ...

The status is 0, or 2 with a report.
"""

import argparse
import sys

from torchtrain.config.plans import RunPlan, Schedule, find_tokenizer, plan_run, plan_shape
from torchtrain.config.schema import Config
from torchtrain.config.sources import DataSource
from torchtrain.config_manager import parse_or_exit
from torchtrain.errors import UserError
from torchtrain.utils import plural


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
    plan = plan_run(config, given.world_size, tokenizer_size=find_tokenizer_size(config))
    lines = summarize(config, plan)
    lines += [f"note       {note}" for note in config.notes]
    print("\n".join(["The configuration is good.", *lines]))


def find_tokenizer_size(config: Config) -> int | None:
    """Return the size of the vocabulary where the run's length depends on it alone; else None."""
    from torchtrain.datasets.tokenizer import load_tokenizer

    is_ratio = str(config.training.tokens).endswith("x")
    if not is_ratio or plan_shape(config.model).vocab_size != 0:
        return None
    try:
        return load_tokenizer(find_tokenizer(config.model)).vocab_size
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        raise SystemExit(2) from None


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
    if plan.length.source:
        lines.append(f"length     {plural(plan.steps, 'step')}: {plan.length.source}")
    lines.append(f"lr         {_describe_schedule(plan.schedule, plan.rate.lr)}")
    if plan.rate.source:
        lines.append(f'lr         "auto" is {plan.rate.lr:g}: {plan.rate.source}')
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
