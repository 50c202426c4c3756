"""What a config may leave to a published rule: the run's length, and its learning rate.

Length: 20 tokens per parameter train the best model that a given computation can (Hoffmann et al.
2022, arXiv:2203.15556), who count the embedding in, as Pearce & Song 2024 (arXiv:2406.12907) show.

Rate: Step Law (Li et al. 2025, arXiv:2503.04715). For N parameters beside the vocabulary's and D
tokens, the best rate is 1.79 N^-0.713 D^0.307, at the best batch, of 0.58 D^0.571 tokens. A smaller
batch takes a lower rate, by the square root of its share (Malladi et al. 2022, arXiv:2205.10287). A
larger one takes the same: beyond the best batch the best rate rises no longer, and then falls (Li
et al. 2024, arXiv:2405.14578). The law's runs decayed by a cosine to 1e-5, whatever their largest
rate was; where the last rate is a share of the largest, the best largest one may be lower.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from torchtrain.catalog.parameters import ParameterCount
from torchtrain.config.schema import MOST_TOKENS, Optimizer, Training
from torchtrain.config.toml import quoted
from torchtrain.errors import UserError

# What the runs that Step Law was fitted to had, about.
FITTED_PARAMETERS = (60e6, 1.1e9)
FITTED_TOKENS = (1e9, 100e9)
FITTED_OPTIMIZER = "AdamW"
FITTED_LAST_RATE = 1e-5


@dataclass(frozen=True)
class Length:
    """How long a run is."""

    steps: int
    source: str = ""
    """How `training.tokens` gives them, in words; empty where `training.steps` does."""


@dataclass(frozen=True)
class Rate:
    """The largest learning rate of a run."""

    lr: float
    source: str = ""
    """How "auto" gives it, in words; empty where `optimizer.lr` is a number."""


def find_tokens(training: Training, count: ParameterCount | None) -> int:
    """Return the tokens that `training.tokens` asks for.

    Args:
        training: with `tokens` set.
        count: of the model; None where it is not known.

    Raises:
        UserError: it is a multiple of an unknown number, or of the wrong size.
    """
    text = str(training.tokens)
    factor = Fraction(text.removesuffix("x"))
    given = f"training.tokens = {quoted(training.tokens)}"
    if text.endswith("x"):
        if count is None:
            raise UserError(
                f"{given}: the parameters of a model class of your own are not known here; give "
                "the number of tokens"
            )
        factor *= count.active
    tokens = math.ceil(factor)
    if not 1 <= tokens <= MOST_TOKENS:
        # Not how many: the config check, which knows no tokenizer, counts fewer parameters.
        much = "too many" if tokens else "no"
        raise UserError(f"{given} is {much} tokens; it must be 1 to {MOST_TOKENS:,} of them")
    return tokens


def plan_length(training: Training, count: ParameterCount | None, global_batch: int) -> Length:
    """Return the steps of the run: those given, or as many as see the tokens that are asked for.

    Args:
        training: the section.
        count: of the model, its vocabulary known; None where it is not known.
        global_batch: sequences per step.

    Raises:
        UserError: as `find_tokens`.
    """
    if training.tokens is None:
        return Length(training.steps)
    tokens = find_tokens(training, count)
    per_step = global_batch * training.seq_len
    steps = -(-tokens // per_step)
    source = f"training.tokens = {quoted(training.tokens)}"
    if count is not None and str(training.tokens).endswith("x"):
        what = "active parameters" if count.active < count.total else "parameters"
        source += f" of {count.active:,} {what}, embedding counted (arXiv:2203.15556)"
    return Length(steps, f"{source}: {tokens:,} tokens, {per_step:,} per step")


def plan_rate(
    optimizer: Optimizer,
    count: ParameterCount | None,
    tokens: int,
    tokens_per_step: int,
    min_lr_factor: float,
) -> Rate:
    """Return the largest learning rate: the one given, or Step Law's, to three digits.

    Three, since the law is no more exact, and the last bits of a power differ between machines.

    Args:
        optimizer: the section.
        count: of the model; None where it is not known.
        tokens: those of the whole schedule.
        tokens_per_step: those of a global batch.
        min_lr_factor: the last rate as a share of the largest.

    Raises:
        UserError: "auto" for an unknown number of parameters.
    """
    if not isinstance(optimizer.lr, str):
        return Rate(optimizer.lr)
    if count is None:
        raise UserError(
            'optimizer.lr = "auto": the parameters of a model class of your own are not known '
            "here; give a number"
        )
    best_batch = 0.58 * tokens**0.571
    share = min(1.0, tokens_per_step / best_batch)
    lr = float(f"{1.79 * count.inner**-0.713 * tokens**0.307 * math.sqrt(share):.3g}")
    source = (
        f"Step Law (arXiv:2503.04715) for {count.inner:,} parameters beside embedding and output, "
        f"{tokens:,} tokens, a batch of {tokens_per_step:,} tokens (best: {best_batch:,.0f})"
    )
    if share < 1:
        source += f", times {math.sqrt(share):.2f} for so small a batch (arXiv:2205.10287)"
    limits = _list_extrapolations(optimizer.name, count, tokens, lr * min_lr_factor)
    if limits:
        source += f"; extrapolated: the law was fitted to {', '.join(limits)}"
    return Rate(lr, source)


def _list_extrapolations(
    optimizer: str, count: ParameterCount, tokens: int, last_rate: float
) -> list[str]:
    """Return in which ways the run is none of those that the law was fitted to."""
    limits = []
    for number, (least, most), what in (
        (count.inner, FITTED_PARAMETERS, "parameters"),
        (tokens, FITTED_TOKENS, "tokens"),
    ):
        if not least <= number <= most:
            limits.append(f"{least:,.0f} to {most:,.0f} {what}")
    if optimizer != FITTED_OPTIMIZER:
        limits.append(f"{FITTED_OPTIMIZER}, not {optimizer}")
    if not FITTED_LAST_RATE / 2 <= last_rate <= FITTED_LAST_RATE * 2:
        limits.append(f"a last rate of {FITTED_LAST_RATE:g}, not {last_rate:.3g}")
    return limits
