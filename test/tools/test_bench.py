"""The benchmark: its figures by hand, its messages, and real runs of the smallest model."""

import json
import subprocess
import sys
from unittest.mock import patch

import pytest
from helpers.forking import on_ranks
from helpers.launching import ROOT

from torchtrain.errors import UserError
from torchtrain.tools.bench import scale
from torchtrain.tools.bench.__main__ import main
from torchtrain.tools.bench.products import measure_product
from torchtrain.tools.bench.runs import Setting, list_options, summarize
from torchtrain.tools.bench.scale import measure_scale
from torchtrain.tools.bench.sizes import SIZES, choose_sizes
from torchtrain.tools.bench.work import find_work

FP32 = Setting(device="cpu", ranks=1, dtype="float32", compiled=False)


def row(step, step_time_s, tokens_per_second, memory_gib=1.0, data_time_pct=0.0):
    return {
        "step": step,
        "step_time_s": step_time_s,
        "tokens_per_second": tokens_per_second,
        "memory_gib": memory_gib,
        "data_time_pct": data_time_pct,
    }


def test_figures_are_those_of_the_steps_between_warm_up_and_save():
    rows = [
        row(1, 9.0, None),
        row(2, 5.0, 20.0),
        row(3, 1.0, 100.0, data_time_pct=2.0),
        row(4, 1.5, 80.0, data_time_pct=4.0),
        row(5, 1.0, 100.0, memory_gib=3.0, data_time_pct=2.0),
        row(6, 4.0, 25.0),
    ]
    # 0.1 s pass between two steps; after step 5 another 2 s.
    arrivals = [20.0, 25.1, 26.2, 27.8, 28.9, 35.0]
    figures = summarize(rows, arrivals, saved_after=5)
    assert figures.tokens_per_second == 100.0
    assert figures.step_time_s == 1.0
    assert figures.data_time_pct == 2.0
    assert figures.memory_gib == 3.0
    assert figures.first_step_s == 20.0
    assert figures.save_stall_s == pytest.approx(2.0)


@pytest.mark.parametrize("name", SIZES)
def test_each_size_is_a_valid_run(name):
    work = find_work(SIZES[name], FP32)
    assert work.flops_per_token > 6 * work.shape.vocab_size * work.shape.dim


def test_work_of_the_36m_model_by_hand():
    work = find_work(SIZES["36M"], FP32)
    weights = 8 * (4 * 512 * 512 + 3 * 512 * 1536) + 8192 * 512
    assert work.flops_per_token == 6 * weights + 12 * 8 * 512 * 512


def test_sizes_are_those_of_the_device():
    assert list(choose_sizes(None, "cpu")) == ["host", "debug", "36M", "125M"]
    assert list(choose_sizes(None, "cuda")) == ["host", "36M", "125M", "1B", "8B-blocks"]
    assert list(choose_sizes("1B, host", "cpu")) == ["1B", "host"]
    with pytest.raises(UserError, match=r"--sizes: '36m' is none of host, .*; did you mean 36M\?"):
        choose_sizes("36m", "cpu")


def test_options_of_the_trainer_replace_the_sizes(tmp_path):
    setting = Setting(
        device="cpu", ranks=2, dtype="float32", compiled=True, options=("--training.seq_len", "64")
    )
    options = list_options(SIZES["host"], setting, tmp_path)
    assert options[-2:] == ["--training.seq_len", "64"]
    assert options.count("--training.seq_len") == 1
    assert options[options.index("--training.global_batch_size") + 1] == "2"
    assert options[options.index("--compile.enable") + 1] == "true"


def test_speed_of_a_product_counts_multiplications_and_additions():
    import torch

    a, b = torch.ones(64, 32), torch.ones(32, 16)
    assert 0 < measure_product(a, b) < 1e15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds and --ranks must be at least 1"),
        (["--sizes", "7B"], "--sizes: '7B' is none of"),
        (["--scale", "8,many"], "--scale '8,many': must be numbers of ranks"),
        (["--against", "no-such-commit"], "--against: git worktree failed"),
        (["--sizes", "host", "--", "--training.sq_len", "8"], "training.sq_len"),
    ],
)
def test_what_cannot_be_is_one_message(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_run_is_measured():
    command = [sys.executable, "-m", "torchtrain.tools.bench", "--sizes", "host", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--dtype", "float32", "--device", "cpu", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["sizes"]["host"]
    assert figures["tokens_per_second"] > 0
    assert figures["first_step_s"] > figures["step_time_s"]
    peak = max(figures["products_flops"].values())
    assert figures["share_of_peak"] == pytest.approx(figures["model_flops"] / peak)
    assert "ratios" not in figures


def measure_here(ranks, layout):
    print(json.dumps(scale.measure_rank(ranks, layout)))


def in_a_fork(ranks, layout):
    """Do what a process of its own does, without the time that its start takes."""
    return json.loads(on_ranks(1, measure_here, ranks, layout).splitlines()[-1])


@pytest.mark.slow
def test_a_rank_of_many_is_set_up_without_the_others():
    (fsdp,) = measure_scale("4")  # too few for the other layout
    assert (fsdp["ranks"], fsdp["layout"]) == (4, "FSDP")
    assert fsdp["step_s"] > 0
    with patch.object(scale, "_in_own_process", in_a_fork):
        (fsdp, hsdp) = measure_scale("16")
    assert (fsdp["ranks"], fsdp["layout"]) == (16, "FSDP")
    assert (hsdp["ranks"], hsdp["layout"]) == (16, "HSDP of 8")
    assert hsdp["step_s"] > 0
