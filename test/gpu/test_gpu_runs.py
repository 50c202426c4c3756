"""Runs of the trainer on the device, started as a user starts them."""

import gzip
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
from helpers.launching import TIMEOUT_S, TINY, environment, launched, metrics
from helpers.sameness import assert_same_state, curve

from torchtrain.kernel_checks import find_device_facts

STEPS = 8
SAVED = 4
"""The step of the checkpoint in the midst of a run."""
BY_DEFAULT = dict.fromkeys(TINY) | {"job.config_file": TINY["job.config_file"]}
"""TINY undone: what ./run_llama_train.sh trains."""


@pytest.fixture(scope="module")
def small(device, data):
    """Options of a model whose steps take a moment on the device, in bits that can be repeated."""
    sizes = {
        "model.dim": 64,  # heads of 16, the least of FlexAttention on CUDA
        "training.seq_len": 64,
        "training.local_batch_size": 2,
        "training.global_batch_size": 16,
    }
    if device.type != "cpu":
        sizes |= {
            "model.dim": 512,
            "model.n_layers": 6,
            "model.n_heads": 8,
            "model.n_kv_heads": 4,
            "model.ffn_hidden_dim": 1536,
            "training.seq_len": 512,
        }
    numerics = {
        "training.mixed_precision_param": (
            "bfloat16" if find_device_facts(device).has_bf16 else "float32"
        ),
        "debug.deterministic": True,
    }
    return {**data, **sizes, **numerics, "training.steps": STEPS}


def saving(small, folder, **overrides):
    """Return the options of a run that saves at once after every fourth step."""
    return {
        **small,
        "job.dump_folder": folder,
        "checkpoint.enable": True,
        "checkpoint.interval": SAVED,
        "checkpoint.async_mode": "disabled",
        **overrides,
    }


def fault(folder, text):
    """Return options that make every rank execute `text` while it reads the config."""
    file = folder / "fault.py"
    file.write_text(textwrap.dedent(text))
    return {"experimental.custom_import": file}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small, ranks):
    """The folder of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    launched(ranks, saving(small, folder))
    return folder


def test_the_debug_run_learns(tmp_path, ranks, record_property):
    output = launched(ranks, BY_DEFAULT | {"job.dump_folder": tmp_path / "run"})
    lines = metrics(tmp_path / "run")
    first, last = lines[0]["loss"], lines[-1]["loss"]
    record_property("loss", f"{first:.4f} to {last:.4f}")
    record_property("tokens/s", f"{lines[-1]['tokens_per_second']:,.0f}")
    record_property("memory", f"{lines[-1]['memory_gib']:.2f} GiB")
    assert len(lines) == 30
    # On two CPU ranks 8.1800 and 6.1970. The uniform guess over 2,048 tokens is ln 2048 = 7.62;
    # initial weights and corpus depend on the kind of device and on Python's version.
    assert first == pytest.approx(8.18, abs=0.15)
    assert last == pytest.approx(6.2, abs=0.15)
    assert "after step 30 the model writes:" in output


def test_the_same_run_twice_has_the_same_bits(tmp_path, small, ranks, whole):
    launched(ranks, saving(small, tmp_path / "run"))
    assert curve(tmp_path / "run") == curve(whole)
    assert_same_state(tmp_path / "run", whole, STEPS, tmp_path)


KILL = """
import os
import signal
from torchtrain import attempts


def begin_step(step):
    if step == 7 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


attempts.begin_step = begin_step  # before train.py imports it
"""


def test_killed_and_resumed_is_the_run_that_was_not(tmp_path, small, ranks, whole):
    folder = tmp_path / "run"
    killed = saving(small, folder, **fault(tmp_path, KILL))
    output = launched(ranks, killed, expect=128 + 9)
    assert "SIGKILL" in output
    assert curve(folder) == curve(whole)[:6]
    output = launched(ranks, saving(small, folder))
    assert f"step-{SAVED}" in output
    assert curve(folder) == curve(whole)
    assert_same_state(folder, whole, STEPS, tmp_path)


def test_what_is_saved_beside_training_is_what_is_saved_at_once(
    tmp_path, device, small, ranks, whole
):
    mode = "async" if device.type == "cpu" else "async_with_pinned_mem"
    output = launched(ranks, saving(small, tmp_path / "run", **{"checkpoint.async_mode": mode}))
    assert "saves beside training" in output
    assert curve(tmp_path / "run") == curve(whole)
    for step in (SAVED, STEPS):
        assert_same_state(tmp_path / "run", whole, step, tmp_path)


def generate(run, **variables):
    """Return the 24 likeliest tokens after a prompt, in fp32, and how many come in a second."""
    options = ["--dtype", "float32", "--temperature", "0", "--max-new-tokens", "24", "--json"]
    command = [sys.executable, "-m", "torchtrain.tools.generate", "--checkpoint", str(run)]
    said = subprocess.check_output(
        [*command, "--prompt", "abc", *options],
        env=environment(1, **variables),
        text=True,
        timeout=TIMEOUT_S,
    )
    record = json.loads(said)
    return record["tokens"], record["tokens_per_second"]


def test_a_model_writes_on_the_device_what_it_writes_on_a_cpu(whole, record_property):
    tokens, speed = generate(whole)
    record_property("tokens/s", speed)
    assert len(tokens) > 0
    assert tokens == generate(whole, CUDA_VISIBLE_DEVICES="")[0]


def test_a_trace_and_a_memory_snapshot_are_written(tmp_path, device, small, ranks):
    on_cpu = device.type == "cpu"
    folder = tmp_path / "run"
    profiling = {
        "job.dump_folder": folder,
        "profiling.enable_profiling": True,
        "profiling.enable_memory_snapshot": not on_cpu,
        "profiling.profile_freq": 5,
    }
    launched(ranks, small | profiling)
    with gzip.open(folder / "profiling" / "traces" / "step-5" / "rank0.json.gz") as file:
        kinds = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert ("cpu_op" if on_cpu else "kernel") in kinds
    if not on_cpu:
        snapshot = (folder / "profiling" / "memory" / "step-5" / "rank0.pickle").read_bytes()
        assert pickle.loads(snapshot)["segments"]


def test_compiled_documents_are_compiled_once_and_have_the_same_bits_twice(
    tmp_path, device, small, ranks, record_property
):
    documents = {
        "training.document_masking": True,
        "experimental.custom_import": "torchtrain.tools.short_documents",
        "training.dataset": "short-documents",
        "training.dataset_path": None,
        "compile.enable": True,
        "compile.backend": "aot_eager" if device.type == "cpu" else "inductor",
    }
    given = small | documents
    output = launched(ranks, given | {"job.dump_folder": tmp_path / "a"}, TORCH_LOGS="recompiles")
    assert "Recompiling function" not in output
    launched(ranks, given | {"job.dump_folder": tmp_path / "b"})
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    first, *_, last = metrics(tmp_path / "a")
    record_property("first step", f"{first['step_time_s']:.1f} s")
    record_property("last step", f"{1e3 * last['step_time_s']:.0f} ms")


OUT_OF_MEMORY = """
import os
import torch
from torchtrain import attempts


def begin_step(step):
    if step == 3 and os.environ["RANK"] == "0":
        if torch.cuda.is_available():
            torch.empty(2**40, dtype=torch.uint8, device="cuda")
        raise torch.OutOfMemoryError("out of memory: as if")


attempts.begin_step = begin_step  # before train.py imports it
"""


def test_out_of_memory_is_said_once_and_leaves_a_snapshot(tmp_path, device, small, ranks):
    on_cpu = device.type == "cpu"
    folder = tmp_path / "run"
    full = {
        "job.dump_folder": folder,
        "profiling.enable_memory_snapshot": not on_cpu,
        **fault(tmp_path, OUT_OF_MEMORY),
    }
    output = launched(ranks, small | full, expect=1)
    assert output.count("OutOfMemoryError: ") == 1, output
    assert "rank 0 failed" in output
    assert [line["step"] for line in metrics(folder)] == [1, 2]
    if not on_cpu:
        file = folder / "profiling" / "memory" / "out-of-memory" / "rank0.pickle"
        assert any(pickle.loads(file.read_bytes())["device_traces"])
