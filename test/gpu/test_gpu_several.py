"""What several devices do together, beside the parity table."""

import re
import time

import pytest
import torch
from helpers.launching import launched, metrics, run_with_a_stopped_rank

ENDS_WITHIN_S = 120


@pytest.mark.cuda(devices=2)
def test_a_stopped_rank_is_named_and_ends_the_run_in_time(
    tmp_path, data, device, ranks, record_property
):
    overrides = {
        **data,
        "job.dump_folder": tmp_path / "run",
        "training.local_batch_size": 1,
        "comm.train_timeout_seconds": 5 if device.type == "cpu" else 20,
    }
    started = time.monotonic()
    status, output = run_with_a_stopped_rank(ranks, overrides)
    seconds = time.monotonic() - started
    assert status == 1, output
    cause = re.search(rf"rank {ranks - 1} did not answer in step \d+ \(.*\) for \d+ s", output)
    assert cause is not None, output
    record_property("said", cause.group())
    record_property("whole run", f"{seconds:.0f} s")
    assert seconds < ENDS_WITHIN_S


FUSED = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")
"""What Inductor makes of a product beside a collective."""


@pytest.mark.cuda(devices=2)
def test_async_tensor_parallelism_is_fused_and_changes_no_loss(
    tmp_path, data, device, record_property
):
    on_cpu = device.type == "cpu"
    plain = {
        **data,
        "model.dim": 64 if on_cpu else 1024,
        "model.n_heads": 4 if on_cpu else 8,
        "training.seq_len": 64 if on_cpu else 512,
        "training.mixed_precision_param": "bfloat16",
        "parallelism.tensor_parallel_degree": 2,
        "compile.enable": True,
        "compile.backend": "aot_eager" if on_cpu else "inductor",
    }
    other = plain | {"parallelism.enable_async_tensor_parallel": True}
    if on_cpu:
        output = launched(2, other | {"job.dump_folder": tmp_path / "refused"}, expect=2)
        assert "enable_async_tensor_parallel needs CUDA" in output
        assert "Traceback" not in output
        record_property("on a CPU", "refused; compared without it")
        other = plain | {"compile.enable": False}
    elif not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("devices 0 and 1 cannot read each other's memory")
    launched(2, plain | {"job.dump_folder": tmp_path / "plain"})
    output = launched(
        2, other | {"job.dump_folder": tmp_path / "other"}, TORCH_LOGS="post_grad_graphs"
    )
    for before, after in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "other"), strict=True):
        # The parity tool's tolerance of bf16: a product is split, and its parts' sums rounded.
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-3)
    if not on_cpu:
        found = [name for name in FUSED if name in output]
        record_property("fused", ", ".join(found) or "nothing")
        assert found == list(FUSED)
