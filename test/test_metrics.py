"""What the user sees of a step: the line, metrics.jsonl, TensorBoard, Weights & Biases."""

import logging
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import forking
from helpers.forking import in_group
from helpers.logged import FixedStopwatch, log, metrics_logger, records, summary

import train
from torchtrain.bad_numbers import StepGuard
from torchtrain.config.schema import Metrics, Training
from torchtrain.errors import NonFinite, UserError
from torchtrain.logging_utils import init_logging, logger
from torchtrain.loss import BatchLoss
from torchtrain.metrics import (
    StepSummary,
    Stopwatch,
    find_peak_flops,
    find_slowest,
    measure_running,
    peak_memory_gib,
    reset_peak_memory,
)


@pytest.fixture
def lines(capsys):
    yield lambda: capsys.readouterr().out.splitlines()
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


def test_the_line_of_each_step(tmp_path, lines):
    log(metrics_logger(tmp_path), range(1, 4))
    # The first step's warm-up says nothing of throughput or of the time left.
    assert lines() == [
        "step 1/6  loss 6.9000  norm 1.250  lr 8.00e-04  mem 0.50GiB  data 0%",
        "step 2/6  loss 6.8000  norm 1.250  lr 8.00e-04  tok/s 50  "
        "eta 0:00:08  mem 0.50GiB  data 5%",
        "step 3/6  loss 6.7000  norm 1.250  lr 8.00e-04  tok/s 50  "
        "eta 0:00:06  mem 0.50GiB  data 5%",
    ]


def test_metrics_jsonl_by_hand(tmp_path, lines):
    metrics = metrics_logger(
        tmp_path, Metrics(log_freq=3), resumed_step=4, peak_flops=1e4, total=20
    )
    init_logging()
    step_times = [50.0, 2.0, 3.0, 1.0, 5.0]
    data_times = [40.0, 0.5, 0.25, 0.25, 1.0]
    for step, step_time, data_time in zip(range(5, 10), step_times, data_times, strict=True):
        given = summary(step, data_time_s=data_time, loss=float(step), memory_gib=step / 8)
        metrics.log(given, FixedStopwatch(step_time), {})
    assert records(tmp_path) == [
        {
            "step": 6,
            "loss": 6.0,
            "max_loss": 8.0,
            "grad_norm": 1.25,
            "lr": 8e-4,
            "tokens_seen": 600,
            "memory_gib": 0.75,
            # The window is step 6 alone: step 5 was the process's first.
            "tokens_per_second": 100 / 2.0,
            "mfu": 50 * 10 / 1e4,
            "data_time_pct": 25.0,
            "step_time_s": 2.0,
        },
        {
            "step": 9,
            "loss": 9.0,
            "max_loss": 8.0,
            "grad_norm": 1.25,
            "lr": 8e-4,
            "tokens_seen": 900,
            "memory_gib": 1.125,
            # Steps 7, 8 and 9: 300 tokens in 9 s, of which 1.5 s waited for data.
            "tokens_per_second": 300 / 9.0,
            "mfu": 300 / 9.0 * 10 / 1e4,
            "data_time_pct": 100 * 1.5 / 9.0,
            "step_time_s": 3.0,
        },
    ]


def test_a_processs_first_step_has_no_throughput(tmp_path, lines):
    log(metrics_logger(tmp_path, peak_flops=1e4), [1])
    (record,) = records(tmp_path)
    assert record["tokens_per_second"] is None
    assert record["mfu"] is None
    assert record["step_time_s"] == 50.0
    assert record["data_time_pct"] == 100 * 0.1 / 50


def test_mfu_is_unknown_where_the_peak_is(tmp_path, lines):
    log(metrics_logger(tmp_path), [1, 2])
    assert records(tmp_path)[1]["mfu"] is None
    log(metrics_logger(tmp_path, peak_flops=1e4), [1, 2])
    assert "mfu 5.0%" in lines()[-1]


def test_between_full_lines_nothing_is_printed(tmp_path, lines):
    log(metrics_logger(tmp_path, Metrics(log_freq=3), log_lr=False), range(1, 6))
    printed = lines()
    assert len(printed) == 1
    assert printed[0].startswith("step 3/6  loss 6.7000")
    assert "lr 8.00e-04" in printed[0]
    assert "tok/s 50" in printed[0], "the window is the two steps after the first"
    assert [record["step"] for record in records(tmp_path)] == [3]


def test_log_lr_prints_step_and_rate_between_full_lines(tmp_path, lines):
    log(metrics_logger(tmp_path, Metrics(log_freq=3)), range(1, 6))
    printed = lines()
    assert [printed[at] for at in (0, 1, 3, 4)] == [
        f"step {step}/6  lr 8.00e-04" for step in (1, 2, 4, 5)
    ]
    assert "loss" in printed[2]


def test_the_last_step_is_always_logged(tmp_path, lines):
    log(metrics_logger(tmp_path, Metrics(log_freq=4)), range(1, 7))
    assert [record["step"] for record in records(tmp_path)] == [4, 6]


def test_a_validated_step_is_logged_with_its_results(tmp_path, lines):
    results = {"val_loss": 3.5, "val_bits_per_byte": None}
    log(metrics_logger(tmp_path, Metrics(log_freq=4)), [2], validated=results)
    (record,) = records(tmp_path)
    assert record["val_loss"] == 3.5
    assert record["val_bits_per_byte"] is None
    (line,) = lines()
    assert "loss 6.8000  val_loss 3.5000  norm" in line
    assert "bits/byte" not in line


EVERYTHING = {"val_loss": 2.3456, "val_bits_per_byte": 0.9876}


def log_everything(folder, **changes):
    metrics = metrics_logger(folder, peak_flops=1e4, total=1000)
    log(metrics, [1], added={"router/max_load": 1.375}, **changes)
    log(metrics, [999], EVERYTHING, added={"router/max_load": 1.375}, **changes)


def test_a_line_drops_its_last_columns_instead_of_wrapping(tmp_path, lines, monkeypatch):
    log_everything(tmp_path)
    *_, line = lines()
    assert line == (
        "step  999/1000  loss -92.9000  val_loss 2.3456  bits/byte 0.9876  norm 1.250  "
        "lr 8.00e-04  tok/s 50"
    )
    assert len(line) <= 100
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns in (200, 120, 80, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        log_everything(tmp_path)
        *_, narrower = lines()
        plain = re.sub(r"\x1b\[\d*[mK]", "", narrower)
        assert len(plain) <= columns
        assert plain[:40].rstrip() == line[: len(plain[:40].rstrip())]
        assert ("router/max_load 1.375" in plain) == (columns == 200)
    assert records(tmp_path)[-1]["router/max_load"] == 1.375, "the file lacks nothing"


def test_an_added_metric_stays_where_the_last_columns_go(tmp_path, lines):
    added = {"router/max_load": 1.375, "router/layer_3/max_load": 1.0}
    log(metrics_logger(tmp_path, total=1000), [1, 999], loss=2.5, added=added)
    *_, line = lines()
    assert line == (
        "step  999/1000  loss 2.5000  norm 1.250  lr 8.00e-04  tok/s 50  "
        "router/max_load 1.375  eta 0:00:02"
    )
    assert len(line) <= 100, "memory and data do not fit any more"
    assert records(tmp_path)[-1]["router/layer_3/max_load"] == 1.0


def test_every_column_of_the_trainers_own_fits_100_columns(tmp_path, lines):
    log(metrics_logger(tmp_path, total=1000), [1, 999], grad_norm=12.345, memory_gib=7.25)
    for line in lines():
        assert len(line) <= 100
        assert line.endswith(("data 5%", "data 0%"))


def test_colors_on_a_terminal_unless_turned_off(tmp_path, lines, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    log(metrics_logger(tmp_path), [1])
    assert "\x1b[" in lines()[0]
    log(metrics_logger(tmp_path, Metrics(disable_color_printing=True)), [1])
    assert "\x1b[" not in lines()[0]
    monkeypatch.setenv("NO_COLOR", "1")
    log(metrics_logger(tmp_path), [1])
    assert "\x1b[" not in lines()[0]


def test_a_metric_that_is_not_a_number_is_null(tmp_path, lines):
    bad = {"a/nan": float("nan"), "a/inf": float("inf")}
    log(metrics_logger(tmp_path), [1], {"val_loss": float("inf")}, added=bad)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"a/nan": null, "a/inf": null, "val_loss": null' in text


def read_tensorboard(folder):
    """Return (step, value) of each scalar by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_has_groups_and_the_same_numbers(tmp_path, lines):
    section = Metrics(enable_tensorboard=True)
    metrics = metrics_logger(tmp_path, section, peak_flops=1e4)
    log(metrics, [1, 2], EVERYTHING, added={"router/max_load": 1.375})
    scalars = read_tensorboard(tmp_path / "tb")
    assert {tag: values[-1] for tag, values in scalars.items()} == {
        "loss/loss": (2, pytest.approx(6.8)),
        "loss/max_loss": (2, 8.0),
        "validation/val_loss": (2, pytest.approx(2.3456)),
        "validation/val_bits_per_byte": (2, pytest.approx(0.9876)),
        "optimizer/grad_norm": (2, 1.25),
        "optimizer/lr": (2, pytest.approx(8e-4)),
        "throughput/tokens_seen": (2, 200.0),
        "throughput/tokens_per_second": (2, 50.0),
        "throughput/mfu": (2, pytest.approx(0.05)),
        "throughput/step_time_s": (2, 2.0),
        "throughput/data_time_pct": (2, 5.0),
        "memory/memory_gib": (2, 0.5),
        "router/max_load": (2, 1.375),
    }


def test_tensorboard_is_one_curve_after_a_resume(tmp_path, lines):
    config = Metrics(enable_tensorboard=True, save_tb_folder="curves")
    log(metrics_logger(tmp_path, config), range(1, 6))
    log(metrics_logger(tmp_path, config, resumed_step=3), range(4, 7))
    steps = [step for step, _ in read_tensorboard(tmp_path / "curves")["loss/loss"]]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_wandb_without_the_package_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        metrics_logger(tmp_path, Metrics(enable_wandb=True))


class WandbError(Exception):
    """What wandb's own errors inherit from."""


def wandb_without_a_key():
    def refuse(**_):
        raise WandbError("No API key configured.")

    return SimpleNamespace(Error=WandbError, login=refuse, init=refuse)


def test_an_error_of_wandb_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb_without_a_key())
    with pytest.raises(UserError, match=r"^metrics\.enable_wandb = true: No API key configured\.$"):
        metrics_logger(tmp_path, Metrics(enable_wandb=True))


def test_wandb_gets_the_same_numbers_and_continues_the_same_run(tmp_path, monkeypatch, lines):
    calls = []
    logged = []

    class Run:
        def log(self, scalars, step):
            logged.append((step, scalars["loss/loss"], scalars["router/max_load"]))

        def finish(self):
            calls.append("finish")

    class Package:
        @staticmethod
        def init(**arguments):
            assert arguments["config"] == {"training": {"steps": 6}}
            calls.append(arguments["id"])
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Package)
    for resumed in (0, 1):
        metrics = metrics_logger(tmp_path, Metrics(enable_wandb=True), resumed_step=resumed)
        log(metrics, [resumed + 1], added={"router/max_load": 1.375})
    assert logged == [(1, 6.9, 1.375), (2, 6.8, 1.375)]
    assert calls[0] == calls[2]
    assert calls[1] == calls[3] == "finish"


def test_a_stopwatch_by_hand(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    stopwatch = Stopwatch()
    now[0] += 1
    for waited in (2, 4):
        with stopwatch.waiting_for_data():
            now[0] += waited
    now[0] += 8
    with stopwatch.paused():
        now[0] += 16
    assert stopwatch.data_time_s == 2 + 4
    assert stopwatch.elapsed() == 1 + 2 + 4 + 8


def test_a_ranks_own_time_is_what_it_runs_and_what_it_waits_for_data(monkeypatch):
    now, ran = [100.0], [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("torchtrain.metrics.measure_running", lambda: ran[0])
    stopwatch = Stopwatch()
    ran[0] += 1
    for waited in (4, 8):
        with stopwatch.waiting_for_data():
            now[0] += waited
            ran[0] += 2  # of them: they count once
        ran[0] += 16
    now[0] += 1000  # in collectives
    assert stopwatch.own_time_s == 4 + 8 + 1 + 2 * 16


def test_a_thread_that_computes_runs():
    before = measure_running()
    until = time.thread_time() + 0.05
    while time.thread_time() < until:
        pass
    assert measure_running() - before >= 0.05


def test_the_slowest_rank_of_a_window_and_its_excess_over_the_median():
    assert find_slowest([[1.0, 2.0], [3.0, 4.0]], 100.0) == {
        "slowest_rank": 1,
        "slowest_rank_excess_pct": 2.0,
    }
    # Rank 2 is the slowest of one step, rank 1 of both together: 9, 15, 10, 12; the median is 10.
    assert find_slowest([[1.0, 7.0, 8.0, 4.0], [8.0, 8.0, 2.0, 8.0]], 50.0) == {
        "slowest_rank": 1,
        "slowest_rank_excess_pct": 10.0,
    }
    assert find_slowest([[3.0], [4.0]], 100.0) == {}, "one rank has nobody to wait for it"
    assert find_slowest([(), ()], 100.0) == {}


HELD_UP = """
import os
import time

import train
from torchtrain.datasets.loader import DataLoader

read, compute = DataLoader.step_batches, train.forward_backward


def slow_disk(loader, step):
    if os.environ["RANK"] == "1" and step <= 3:
        time.sleep(0.5)
    return read(loader, step)


def slow_core(trainer, microbatches):
    until = time.thread_time() + 0.5
    while os.environ["RANK"] == "0" and trainer.step >= 3 and time.thread_time() < until:
        pass
    return compute(trainer, microbatches)


DataLoader.step_batches, train.forward_backward = slow_disk, slow_core
"""


@pytest.mark.slow
def test_the_rank_that_holds_up_the_others_is_named(tmp_path, data):
    file = tmp_path / "held_up.py"
    file.write_text(HELD_UP)
    folder = tmp_path / "run"
    given = {"job.dump_folder": folder, "experimental.custom_import": file, "training.steps": 5}
    forking.train(2, {**data, **given})
    lines = records(folder)
    assert [line["slowest_rank"] for line in lines] == [1, 1, 1, 0, 0]
    assert all(0 < line["slowest_rank_excess_pct"] <= 100 for line in lines)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says it there")
def test_peak_memory_is_what_the_kernel_says():
    status = Path("/proc/self/status").read_text()
    (kib,) = re.findall(r"VmHWM:\s*(\d+) kB", status)
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(int(kib) / 2**20, rel=0.01)


def test_peak_memory_of_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 3 * 2**30)
    assert peak_memory_gib(torch.device("cuda:0")) == 3.0


def test_the_peak_of_an_accelerator_begins_anew(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", reset.append)
    reset_peak_memory(torch.device("cpu"))
    assert reset == [], "it has none"
    reset_peak_memory(torch.device("cuda:3"))
    assert reset == [torch.device("cuda:3")]


class Device:
    """An accelerator of this name."""

    def __init__(self, name):
        self.name = name

    def get_device_name(self, device):
        return self.name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("NVIDIA GB300", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", 1307e12),
        ("AMD Instinct MI325X", 1307e12),
        ("a GPU of tomorrow", None),
    ],
)
def test_the_peak_goes_by_the_devices_name(monkeypatch, name, expected):
    monkeypatch.setattr(torch, "get_device_module", lambda device: Device(name))
    device = torch.device("cuda:0")
    assert find_peak_flops(device, torch.bfloat16) == expected
    assert find_peak_flops(device, torch.float32) is None, "the table is bf16's"
    assert find_peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_a_given_peak_counts_before_the_devices(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: Device("NVIDIA H100"))
    assert find_peak_flops(torch.device("cuda:0"), torch.bfloat16, 500.0) == 500e12
    assert find_peak_flops(torch.device("cpu"), torch.float32, 0.5) == 0.5e12


def step_of_this_rank(rank, **changes):
    """Return what `combine_ranks` gives four ranks, two per stage of a pipeline."""
    # The first stage's ranks have no loss; of the last stage's each has a part of it.
    own = {
        "loss": [0.0, 0.0, 4.5, 2.5][rank],
        "max_loss": [0.0, 0.0, 3.75, 9.25][rank],
        "grad_norm": 1.5,
        "memory": [1.0, 4.0, 2.0, 3.0][rank],
        "data_time": [0.25, 0.125, 0.5, 0.375][rank],
        "signal": 0,
        **changes,
    }
    trainer = SimpleNamespace(
        device=torch.device("cpu"),
        metric_sources=[],
        step=6,
        tokens_seen=600,
        tokens_per_step=100,
        plan=SimpleNamespace(degrees=SimpleNamespace(ranks_per_stage=2)),
        optimizer=SimpleNamespace(param_groups=[{"lr": 3e-4}]),
    )
    stopwatch = SimpleNamespace(data_time_s=own["data_time"], own_time_s=float(10 * rank))
    train.peak_memory_gib = lambda device: own["memory"]
    return train.combine_ranks(
        trainer,
        BatchLoss(
            torch.tensor(own["loss"], dtype=torch.float64),
            torch.tensor(own["max_loss"], dtype=torch.float64),
            torch.tensor(90),
        ),
        torch.tensor(own["grad_norm"], dtype=torch.float32),
        stopwatch,
        SimpleNamespace(find_reason=lambda: own["signal"], listen=lambda: None),
    )


class Samples:
    """A loader of 8 samples per step."""

    def samples_before(self, step):
        return 8 * (step - 1)


def combine_by_hand():
    rank = dist.get_rank()
    summary, stopped_by = step_of_this_rank(rank)
    assert stopped_by == 0
    assert summary == StepSummary(
        step=7,
        loss=3.5,  # the sum of the parts, over the two ranks of the stage
        max_loss=9.25,
        valid_labels=90,
        grad_norm=1.5,
        lr=3e-4,
        tokens_seen=700,
        memory_gib=4.0,  # rank 1's
        data_time_s=0.5,  # rank 2's
        own_times_s=[0.0, 10.0, 20.0, 30.0],
    )
    loss = torch.tensor(summary.loss)
    assert not StepGuard(Training(), Samples(), {}).judge(summary, loss).skipped

    # Each rank has its own signal, or none: all stop after the same step, for the same reason.
    _, stopped_by = step_of_this_rank(rank, signal=[0, 2, 15, 0][rank])
    assert stopped_by == 15
    _, stopped_by = step_of_this_rank(rank, signal=2 if rank == 3 else 0)
    assert stopped_by == 2

    for value in (float("nan"), float("inf")):
        for changed in ("loss", "grad_norm"):
            on_one = {changed: value} if rank == 3 else {}
            summary, _ = step_of_this_rank(rank, **on_one)
            with pytest.raises(NonFinite, match=r"step 7: loss .* on global samples 48 to 55"):
                StepGuard(Training(), Samples(), {}).judge(summary, loss)


@pytest.mark.slow
def test_a_step_of_four_ranks_by_hand():
    in_group(4, combine_by_hand, timeout_s=60)
