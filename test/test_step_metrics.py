"""Metrics by name: each reduction over ranks, by hand, and what happens where ranks disagree."""

import pytest
import torch
import torch.distributed as dist
from helpers.forking import in_group, train
from helpers.launching import metrics as read_metrics
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrain.errors import PeerFault, SharedUserError, UserError
from torchtrain.step_metrics import (
    FIRST_GATHER,
    MetricSource,
    StepMetrics,
    find_metric_sources,
)

CPU = torch.device("cpu")


def reduce_by_hand():
    rank = dist.get_rank()
    by_rank = [0.5, -4.0, 3.0, 8.0]
    metrics = StepMetrics()
    # In another order on each rank: names decide, not positions.
    reductions = ["sum", "max", "min", "mean"]
    for reduce in reductions[rank:] + reductions[:rank]:
        metrics.add(f"test/{reduce}", by_rank[rank], reduce=reduce)
    # Rank r adds r + 1 values; the largest and the smallest stand neither first nor last.
    for value in [1, 3, 0, 2][: rank + 1]:
        metrics.add("several/sum", value, reduce="sum")
        metrics.add("several/max", torch.tensor([10 * rank + value]), reduce="max")
        metrics.add("several/min", torch.tensor(-value, dtype=torch.bfloat16), reduce="min")
        metrics.add("several/mean", float(rank), reduce="mean")
    assert metrics.reduce(CPU) == {
        "test/sum": 7.5,
        "test/max": 8.0,
        "test/min": -4.0,
        "test/mean": 1.875,
        "several/sum": 1 + (1 + 3) + (1 + 3 + 0) + (1 + 3 + 0 + 2),
        "several/max": 33.0,
        "several/min": -3.0,
        # One value 0, two values 1, three values 2, four values 3.
        "several/mean": (0 + 2 + 6 + 12) / 10,
    }


def lose_no_digit():
    """fp64 sums in rank order: (1e16 + 1) - 1e16 is 0, and 1e16 - 1e16 + 1 is 1."""
    rank = dist.get_rank()
    metrics = StepMetrics()
    metrics.add("a/one_first", [1e16, 1.0, -1e16, 0.0][rank], reduce="sum")
    metrics.add("a/one_last", [1e16, -1e16, 1.0, 0.0][rank], reduce="sum")
    metrics.add("a/nan", float("nan") if rank == 2 else 1.0, reduce="max")
    reduced = metrics.reduce(CPU)
    assert reduced["a/one_first"] == 0.0
    assert reduced["a/one_last"] == 1.0
    assert reduced["a/nan"] != reduced["a/nan"], "one rank's NaN is seen by all"


def reduce_many():
    count = 2 * FIRST_GATHER + 5
    metrics = StepMetrics()
    for number in range(count):
        metrics.add(f"many/{number:03}", number * (dist.get_rank() + 1), reduce="sum")
    assert metrics.reduce(CPU) == {f"many/{number:03}": number * 10.0 for number in range(count)}


def disagree():
    rank = dist.get_rank()
    # One rank more than the first collective holds, one rank nothing: neither may hang.
    metrics = StepMetrics()
    for number in range(FIRST_GATHER + 5 if rank == 1 else 2):
        metrics.add(f"m/{number:03}", 0, reduce="sum")
    with pytest.raises(SharedUserError, match=r"only rank 0 has nothing; only rank 1 has m/002"):
        metrics.reduce(CPU)
    metrics = StepMetrics()
    metrics.add("a/b", 0, reduce="sum" if rank == 2 else "max")
    with pytest.raises(
        SharedUserError, match=r"only rank 0 has a/b \(max\); only rank 2 has a/b \(sum\)"
    ):
        metrics.reduce(CPU)


class Broken(MetricSource):
    def add_metrics(self, metrics):
        metrics.add("broken/value", 1, reduce="sum")
        raise RuntimeError("no such buffer")


class Sound(MetricSource):
    def add_metrics(self, metrics):
        metrics.add("broken/value", 1, reduce="sum")


def one_fails():
    rank = dist.get_rank()
    metrics = StepMetrics()
    metrics.collect([Broken() if rank == 1 else Sound()])
    expected = RuntimeError if rank == 1 else PeerFault
    with pytest.raises(expected, match="no such buffer"):
        metrics.reduce(CPU)


def everything_on_four_ranks():
    reduce_by_hand()
    lose_no_digit()
    reduce_many()
    disagree()
    one_fails()


@pytest.mark.slow
def test_reductions_over_four_ranks_by_hand_and_differences_that_do_not_hang():
    in_group(4, everything_on_four_ranks, timeout_s=60)


class Operations(TorchDispatchMode):
    """Counts the operations on tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min"])
def test_thousands_of_ranks_cost_one_of_them_no_more_operations_than_two(reduce):
    counts = []
    for ranks in (2, 4096):
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        metrics = StepMetrics()
        metrics.add("test/value", 3.0, reduce=reduce)
        with Operations() as operations:
            reduced = metrics.reduce(CPU)
        dist.destroy_process_group()
        assert reduced == {"test/value": 3.0 * ranks if reduce == "sum" else 3.0}
        counts.append(operations.count)
    assert counts[0] == counts[1] > 0


def test_one_process_alone(alone):
    metrics = StepMetrics()
    assert metrics.reduce(CPU) == {}
    metrics.add("a/b", torch.tensor(0.1, dtype=torch.float64, requires_grad=True), reduce="mean")
    assert metrics.reduce(CPU) == {"a/b": 0.1}


def test_reductions_that_cannot_be():
    metrics = StepMetrics()
    with pytest.raises(UserError, match="'average' is not one of sum, mean, max, min"):
        metrics.add("a/b", 1, reduce="average")
    metrics.add("a/b", 1, reduce="sum")
    with pytest.raises(UserError, match="'a/b' was added with reduce = 'sum' and with 'max'"):
        metrics.add("a/b", 1, reduce="max")


@pytest.mark.parametrize("name", ["loss", "/loss", "mine/", ""])
def test_a_users_metric_is_named_by_group(alone, name):
    class Wrong(MetricSource):
        def add_metrics(self, metrics):
            metrics.add(name, 1, reduce="sum")

    metrics = StepMetrics()
    metrics.collect([Wrong()])
    with pytest.raises(UserError, match=f"metric '{name}': its name must be group/name"):
        metrics.reduce(CPU)


def test_sources_are_modules_of_the_model_and_the_optimizer():
    class Block(nn.Module, MetricSource):
        pass

    class Descent(torch.optim.SGD, MetricSource):
        pass

    block = Block()
    parts = [nn.Sequential(nn.Linear(2, 2), nn.Sequential(block))]
    plain = torch.optim.SGD(parts[0].parameters())
    own = Descent(parts[0].parameters())
    assert find_metric_sources(parts, plain) == [block]
    assert find_metric_sources(parts, own) == [block, own]


USERS_FILE = '''
"""A Llama that says how large its logits get, and how often they were computed."""

from torchtrain.catalog.models import ModelShape, register_model
from torchtrain.models.llama import Transformer
from torchtrain.step_metrics import MetricSource

SMALL = ModelShape(32, 2, 4, 2, 64, 0)
register_model("watched", {"small": SMALL}, "watched_llama:WatchedLlama")


class WatchedLlama(Transformer, MetricSource):
    def __init__(self, shape):
        super().__init__(shape)
        self.largest = 0.0
        self.calls = 0

    def forward(self, tokens, documents=None):
        logits = super().forward(tokens, documents)
        self.largest = max(self.largest, logits.detach().abs().max().item())
        self.calls += 1
        return logits

    def add_metrics(self, metrics):
        metrics.add("logits/largest", self.largest, reduce="max")
        metrics.add("logits/calls", self.calls, reduce="sum")
        self.largest = 0.0
        self.calls = 0
'''


@pytest.mark.slow
def test_a_users_file_adds_metrics_to_a_run(tmp_path, data):
    (tmp_path / "watched_llama.py").write_text(USERS_FILE)
    shape = ("model.dim", "model.n_layers", "model.n_heads", "model.n_kv_heads")
    given = {
        **data,
        **dict.fromkeys((*shape, "model.ffn_hidden_dim"), None),
        "experimental.custom_import": tmp_path / "watched_llama.py",
        "model.name": "watched",
        "model.flavor": "small",
        "training.steps": 2,
        "training.local_batch_size": 2,  # of 8 sequences: 2 microbatches on each of 2 ranks
        "metrics.enable_tensorboard": True,
    }
    printed = train(2, {**given, "job.dump_folder": tmp_path / "two"})
    train(1, {**given, "job.dump_folder": tmp_path / "one"})
    two = read_metrics(tmp_path / "two")
    one = read_metrics(tmp_path / "one")
    for lines in (one, two):
        assert [line["logits/calls"] for line in lines] == [4.0, 4.0]
    for mine, expected in zip(two, one, strict=True):
        assert mine["logits/largest"] == pytest.approx(expected["logits/largest"], rel=1e-5)
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert f"logits/largest {two[-1]['logits/largest']:.4g}  logits/calls 4" in printed
    (events,) = (tmp_path / "two" / "tb").glob("events*")
    assert b"logits/largest" in events.read_bytes()
