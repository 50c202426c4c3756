"""Pipeline parallelism as data: which schedules there are, what each asks for, and how a model is cut into stages.

No torch here: the config check uses it. The schedules' names are PyTorch's
(https://docs.pytorch.org/docs/stable/distributed.pipelining.html), as are the numbers of microbatches they take.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from torchtrain.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """An order in which the ranks pass microbatches forward and backward through their stages."""

    stages_a_rank: Literal["one", "several", "two"]
    """"two" are laid out as a V: rank r has stage r and the r-th from the end, so rank 0 has the first and the last."""
    splits_backward: bool = False
    """Whether the gradients of the weights wait, to fill the time in which a rank would be idle."""
    microbatches: Literal["any", "stages", "rounds"] = "any"
    """"stages": at least as many as stages; "rounds": the same number in each round of about one a rank."""


SCHEDULES = {
    "GPipe": Schedule("one"),
    "1F1B": Schedule("one", microbatches="stages"),
    "Interleaved1F1B": Schedule("several", microbatches="rounds"),
    "InterleavedZeroBubble": Schedule("several", splits_backward=True, microbatches="rounds"),
    "ZBVZeroBubble": Schedule("two", splits_backward=True),
    "DualPipeV": Schedule("two", splits_backward=True, microbatches="stages"),
}


def default_stages(schedule: str, ranks: int) -> int:
    """Stages of all ranks where nothing else is said: as few as the schedule takes."""
    return ranks if SCHEDULES[schedule].stages_a_rank == "one" else 2 * ranks


def cut_evenly(pieces: list[str], stages: int, first_less: int, last_less: int) -> list[list[str]]:
    """The pieces of each stage: equal numbers of layers, but fewer where the embedding and the output are.

    Args:
        pieces: embedding, layers, final norm and output (`ModelShape.layer_names`).
        stages: how many there shall be.
        first_less: layers that the embedding stands for.
        last_less: the same of final norm and output.

    Raises:
        UserError: there are too few layers.
    """
    embedding, layers, head = pieces[:1], pieces[1:-2], pieces[-2:]
    share, more = divmod(len(layers) + first_less + last_less, stages)
    counts = [share + (stage < more) for stage in range(stages)]
    counts[0] -= first_less
    counts[-1] -= last_less
    if min(counts) < 0 or 0 in counts[1:-1]:
        raise UserError(
            f"{len(layers)} layers are too few for {stages} pipeline stages"
            + (
                f", the first {first_less} and the last {last_less} layers lighter"
                if first_less or last_less
                else ""
            )
        )
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    cut = [layers[end - count : end] for count, end in zip(counts, ends, strict=True)]
    return [embedding + cut[0], *cut[1:-1], cut[-1] + head]


def check_cut(parts: list[list[str]], pieces: list[str]) -> None:
    """See that the parts are the model's pieces, each once and in their order.

    Raises:
        UserError: names those that are missing, unknown, given twice or out of order.
    """
    given = [piece for part in parts for piece in part]
    faults = {
        "unknown": [piece for piece in given if piece not in pieces],
        "given twice": [piece for piece, times in Counter(given).items() if times > 1],
        "missing": [piece for piece in pieces if piece not in given],
    }
    texts = [f"{what}: {', '.join(found[:4])}" for what, found in faults.items() if found]
    if not texts and given != pieces:
        texts = [f"out of order: {next(a for a, b in zip(given, pieces, strict=True) if a != b)}"]
    if texts:
        raise UserError(
            f"{'; '.join(texts)}; the model's pieces are, in order: {pieces[0]} to {', '.join(pieces[-3:])}"
        )


def check_stages(schedule: str, stages: int, ranks: int) -> None:
    """See that the schedule can run so many stages on so many ranks.

    Raises:
        UserError: says how many it takes.
    """
    multiple = stages % ranks == 0 and stages >= 2 * ranks
    fits, takes = {
        "one": (stages == ranks, f"{ranks}, one a rank"),
        "two": (stages == 2 * ranks, f"{2 * ranks}, two a rank"),
        "several": (multiple, f"{2 * ranks}, {3 * ranks} or a higher multiple of {ranks}"),
    }[SCHEDULES[schedule].stages_a_rank]
    if not fits:
        raise UserError(f"{stages} stages on {ranks} pipeline ranks; {schedule} takes {takes}")


def check_microbatches(schedule: str, microbatches: int, stages: int, ranks: int) -> None:
    """See that the schedule can run so many microbatches.

    Raises:
        UserError: says how many it takes.
    """
    needs = SCHEDULES[schedule].microbatches
    if needs == "stages" and microbatches < stages:
        raise UserError(
            f"{microbatches} microbatches for {stages} stages; {schedule} takes at least one a stage"
        )
    rounds = max(1, microbatches // ranks)
    if needs == "rounds" and microbatches % rounds:
        raise UserError(
            f"{microbatches} microbatches on {ranks} pipeline ranks; {schedule} takes up to {2 * ranks - 1}, or "
            f"multiples of {ranks}, or another number that its {rounds} rounds can share equally"
        )


def stages_of(rank: int, schedule: str, stages: int, ranks: int) -> list[int]:
    """The stages that a rank of the pipeline has, in the order of the forward."""
    if SCHEDULES[schedule].stages_a_rank == "two":
        return [rank, stages - 1 - rank]
    return list(range(rank, stages, ranks))
