"""The host waits for the device once in each step, as PyTorch counts it."""

import pytest
from helpers.forking import on_ranks
from helpers.launching import options
from helpers.waits import wait_once_a_step

SETTLED = 2  # steps after which nothing is set up or compiled any more


@pytest.mark.parametrize("log_freq", [1, 10])
def test_a_step_waits_once(data, tmp_path, log_freq):
    given = {"metrics.log_freq": log_freq, "training.local_batch_size": 4}
    given |= {"training.steps": 8, "job.dump_folder": tmp_path}
    on_ranks(1, wait_once_a_step, {"one rank": options({**data, **given})}, SETTLED)


@pytest.mark.cuda(devices=2)
def test_a_step_waits_once_on_two_devices(data, tmp_path):
    runs = {}
    for degree in ("tensor", "context", "pipeline"):
        given = {f"parallelism.{degree}_parallel_degree": 2, "training.steps": 8}
        runs[degree] = options({**data, **given, "job.dump_folder": tmp_path / degree})
    on_ranks(2, wait_once_a_step, runs, SETTLED)
