"""The table of published memory in docs/preflight.md is what preflight says today."""

from functools import partial

import pytest
from helpers.launching import ROOT
from helpers.published import RUNS, configure

from torchtrain.loss import sequence_losses
from torchtrain.metrics import GIB
from torchtrain.tools.preflight import activations
from torchtrain.tools.preflight.memory import estimate_memory
from torchtrain.tools.preflight.verdict import Verdict

OP = {
    "activation_checkpoint.mode": "selective",
    "activation_checkpoint.selective_ac_option": "op",
}
FULL = {"activation_checkpoint.mode": "full"}
WHOLE_LOSS = {"compile.components": "model"}
NO_CHUNK = 2**62
"""More logits than there are."""

ROWS = {
    "8B, 8 x H100": (82.4, OP),
    "8B, 8 x H100, compiled": (77.0, OP),
    "8B, 128 x H100": (67.0, OP),
    "8B, 128 x H100, compiled": (62.0, OP),
    "8B, 32 x H200, compiled, float8": (47.96, OP),
    "8B, 64 x H200, compiled, float8": (46.97, OP),
    "70B, 256 x H100, TP 8, compiled, float8": (71.9, FULL),
    "405B, 512 x H100, TP 8, PP 8 1F1B, compiled, async, float8": (82.5, FULL),
    "405B, 512 x H100, TP 8, PP 8 interleaved, compiled, async, float8": (72.7, FULL),
}
"""GiB that torchtitan's tables give, and how the runs recomputed."""


def predict(name, recomputation, more):
    """Return what is reserved on the rank that takes most, in GiB."""
    (run,) = (run for run in RUNS if run.name == name)
    config = configure(run.file, run.ranks, {**run.options, **recomputation, **more})
    ranks = estimate_memory(config, run.ranks)
    return max(Verdict.of(rank, 80).reserved for rank in ranks) / GIB


def as_cell(predicted, published):
    return f"{predicted:.1f} ({predicted / published - 1:+.0%})".replace("%", " %")


@pytest.fixture
def whole_loss(monkeypatch):
    """Traces are kept; those of another loss are not."""
    activations.trace_layers.cache_clear()
    monkeypatch.setattr(activations, "sequence_losses", partial(sequence_losses, chunk=NO_CHUNK))
    yield
    activations.trace_layers.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_the_docs_have_what_is_predicted(name, request):
    published, recomputation = ROWS[name]
    chunked = as_cell(predict(name, recomputation, {}), published)
    request.getfixturevalue("whole_loss")
    more = WHOLE_LOSS if "compiled" in name else {}
    whole = as_cell(predict(name, recomputation, more), published)
    row = f"| {published} | {chunked} | {'as before' if whole == chunked else whole} |\n"
    assert row in (ROOT / "docs" / "preflight.md").read_text()
