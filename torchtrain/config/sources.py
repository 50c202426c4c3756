"""The data sources of a run: where the documents to train and to validate on come from."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from torchtrain.config.schema import Config, Data, Training, Validation
from torchtrain.config.toml import quoted
from torchtrain.errors import UserError

MIXTURE_PERIOD = 100_000
"""Most samples after which a mixture's pattern of sources may repeat: it is kept as a table."""

# A decimal number, or a quotient of two whole numbers.
WEIGHT = re.compile(r"\d{1,18}(\.\d{1,18})?|\d{1,18}/0*[1-9]\d{0,17}", re.ASCII)


@dataclass(frozen=True)
class DataSource:
    """One source of documents, and its share of the samples."""

    dataset: str
    path: str | None
    share: Fraction = Fraction(1)
    """Fraction of the samples; all shares add up to 1."""
    held_out_share: float = 0.0
    """Fraction of its documents that is held out for validation."""
    side: Literal["training", "validation"] = "training"
    """Which documents are meant: those that are left, or those held out."""
    option: str = "training.dataset"
    """The option that names it, for messages: data.mixture or one ending in .dataset."""

    @property
    def name(self) -> str:
        """The source as data.mixture names it."""
        return self.dataset if self.path is None else f"{self.dataset} {self.path}"


def plan_sources(
    training: Training, data: Data, validation: Validation | None = None
) -> list[DataSource]:
    """Return the data sources of the samples; weights are exact fractions, and so are the shares.

    Where `validation` names no documents of its own, a part of each source is held out.

    Raises:
        UserError: a faulty entry of data.mixture, a source named twice, too fine weights.
    """
    held_out_share = 0.0
    if validation is not None and validation.enable and validation.dataset is None:
        held_out_share = validation.held_out_share
    option = "training.dataset"
    shares = {(training.dataset, training.dataset_path): Fraction(1)}
    if data.mixture is not None:
        option = "data.mixture"
        shares = _parse_mixture(data.mixture)
    return [
        DataSource(dataset, path, share, held_out_share, option=option)
        for (dataset, path), share in shares.items()
    ]


def _parse_mixture(mixture: list[str]) -> dict[tuple[str, str | None], Fraction]:
    """Return the share of each dataset and path."""
    weights: dict[tuple[str, str | None], Fraction] = {}
    for entry in mixture:
        dataset, path, weight = _parse_entry(entry)
        if (dataset, path) in weights:
            name = entry.rpartition("=")[0].strip()
            raise UserError(f"data.mixture: {quoted(name)} is listed twice; add up its weights")
        weights[dataset, path] = weight
    total = sum(weights.values())
    shares = {source: weight / total for source, weight in weights.items()}
    _check_period(list(shares.values()))
    return shares


def _parse_entry(entry: str) -> tuple[str, str | None, Fraction]:
    """Return dataset, path and weight of one entry of data.mixture."""
    source, _, number = entry.rpartition("=")
    words = source.split(maxsplit=1)
    number = number.strip()
    weight = Fraction(number) if WEIGHT.fullmatch(number) else Fraction(0)
    if not words or weight == 0:
        raise UserError(
            f'data.mixture: {quoted(entry)} must be "dataset = weight" or "dataset path = weight", '
            "with a weight > 0 such as 0.7, 7 or 7/10"
        )
    path = words[1].strip() if len(words) > 1 else None
    return words[0], path, weight


def _check_period(shares: Sequence[Fraction]) -> None:
    if math.lcm(*(share.denominator for share in shares)) <= MIXTURE_PERIOD:
        return
    near = [max(1, round(share * MIXTURE_PERIOD / 10)) for share in shares]
    raise UserError(
        f"data.mixture: these weights need more than {MIXTURE_PERIOD:,} samples to come out "
        f"exactly. Nearby weights that do not: {', '.join(str(weight) for weight in near)}"
    )


def plan_validation_sources(config: Config) -> list[DataSource]:
    """Return the data sources of the documents to validate on; none without validation.

    Raises:
        UserError: as `plan_sources`.
    """
    validation = config.validation
    if not validation.enable:
        return []
    if validation.dataset is not None:
        path = validation.dataset_path
        return [DataSource(validation.dataset, path, option="validation.dataset")]
    sources = plan_sources(config.training, config.data, validation)
    return [replace(source, side="validation") for source in sources]
