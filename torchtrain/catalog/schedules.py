"""The pipeline schedules, as data: how each splits a model into stages, and what it needs.

No torch here: the config check reads it. The names are PyTorch's
(https://docs.pytorch.org/docs/stable/distributed.pipelining.html), and so are the numbers of
microbatches that the schedules accept.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from torchtrain.errors import UserError
from torchtrain.utils import plural


@dataclass(frozen=True)
class Schedule:
    """An order in which ranks pass microbatches forward and backward through their stages."""

    stages_per_rank: Literal["one", "several", "two"]
    """"two" form a V: rank r has stage r and the r-th from the end; rank 0 has first and last."""
    splits_backward: bool = False
    """Whether the weights' gradients wait, to fill the time in which a rank would be idle."""
    microbatches: Literal["any", "stages", "rounds"] = "any"
    """"stages": at least one per stage; "rounds": as many in each round of about one per rank."""


SCHEDULES = {
    "GPipe": Schedule(stages_per_rank="one"),
    "1F1B": Schedule(stages_per_rank="one", microbatches="stages"),
    "Interleaved1F1B": Schedule(stages_per_rank="several", microbatches="rounds"),
    "InterleavedZeroBubble": Schedule(
        stages_per_rank="several", splits_backward=True, microbatches="rounds"
    ),
    "ZBVZeroBubble": Schedule(stages_per_rank="two", splits_backward=True),
    "DualPipeV": Schedule(stages_per_rank="two", splits_backward=True, microbatches="stages"),
}


def default_stages(schedule: str, ranks: int) -> int:
    """Return the fewest stages, over all ranks, that the schedule accepts."""
    return ranks if SCHEDULES[schedule].stages_per_rank == "one" else 2 * ranks


def split_evenly(
    layer_names: list[str], stages: int, first_less: int, last_less: int
) -> list[list[str]]:
    """Return each stage's layer names: equal numbers of blocks, but fewer in the first and last.

    Args:
        layer_names: embedding, blocks, final norm and output (`ModelShape.layer_names`).
        stages: the number of stages.
        first_less: blocks that the embedding counts for.
        last_less: blocks that norm and output count for.

    Raises:
        UserError: there are too few blocks.
    """
    embedding, blocks, head = layer_names[:1], layer_names[1:-2], layer_names[-2:]
    share, rest = divmod(len(blocks) + first_less + last_less, stages)
    counts = [share + 1 if stage < rest else share for stage in range(stages)]
    counts[0] -= first_less
    counts[-1] -= last_less
    if min(counts) < 0 or 0 in counts[1:-1]:
        lighter = ""
        if first_less or last_less:
            lighter = f", with {first_less} fewer in the first and {last_less} in the last"
        raise UserError(f"too few layers, {len(blocks)}, for {stages} pipeline stages{lighter}")
    following = iter(blocks)
    split = [list(islice(following, count)) for count in counts]
    split[0] = embedding + split[0]
    split[-1] = split[-1] + head
    return split


def check_split(stages: list[list[str]], layer_names: list[str]) -> None:
    """Check that the stages have all layers of the model, each once and in order.

    Raises:
        UserError: names those that are missing, unknown, given twice or out of order.
    """
    given = [name for stage in stages for name in stage]
    problems = {
        "unknown": [name for name in given if name not in layer_names],
        "given twice": [name for name, times in Counter(given).items() if times > 1],
        "missing": [name for name in layer_names if name not in given],
    }
    if not any(problems.values()):
        pairs = zip(given, layer_names, strict=True)
        problems["out of order"] = [name for name, expected in pairs if name != expected][:1]
    texts = [f"{problem}: {', '.join(names[:4])}" for problem, names in problems.items() if names]
    if texts:
        raise UserError(
            f"{'; '.join(texts)}; the model's layers are, in order: {layer_names[0]} to "
            f"{', '.join(layer_names[-3:])}"
        )


def check_stages(schedule: str, stages: int, ranks: int) -> None:
    """Check that the schedule can run so many stages on so many ranks.

    Raises:
        UserError: says how many it accepts.
    """
    per_rank = SCHEDULES[schedule].stages_per_rank
    fits = stages == default_stages(schedule, ranks)
    accepted = f"{default_stages(schedule, ranks)}, {per_rank} per rank"
    if per_rank == "several":
        fits = stages % ranks == 0 and stages >= 2 * ranks
        accepted = f"{2 * ranks}, {3 * ranks} or a higher multiple of {ranks}"
    if not fits:
        raise UserError(f"{stages} stages on {ranks} pipeline ranks; {schedule} accepts {accepted}")


def check_microbatches(schedule: str, microbatches: int, stages: int, ranks: int) -> None:
    """Check that the schedule can run so many microbatches.

    Raises:
        UserError: says how many it accepts.
    """
    needs = SCHEDULES[schedule].microbatches
    given = plural(microbatches, "microbatch")
    if needs == "stages" and microbatches < stages:
        raise UserError(f"{given} for {stages} stages; {schedule} needs at least one per stage")
    rounds = max(1, microbatches // ranks)
    if needs == "rounds" and microbatches % rounds:
        raise UserError(
            f"{given} on {ranks} pipeline ranks; {schedule} accepts up to "
            f"{2 * ranks - 1}, or multiples of {ranks}, or another number that its {rounds} rounds "
            "can share equally"
        )


def stages_of(rank: int, schedule: str, stages: int, ranks: int) -> list[int]:
    """Return the numbers of the stages that a pipeline rank has, in forward order."""
    if SCHEDULES[schedule].stages_per_rank == "two":
        return [rank, stages - 1 - rank]
    return list(range(rank, stages, ranks))
