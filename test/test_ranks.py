"""What the ranks agree on, and how they fail together."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from helpers.forking import in_group, on_ranks
from helpers.launching import options

import train
from torchtrain.config_manager import JobConfig
from torchtrain.errors import PeerFault, SharedUserError, UserError
from torchtrain.ranks import (
    first_on_each_node,
    gather_rows,
    gathered,
    on_rank_zero,
    patient_group,
    require_equal,
    require_equal_config,
    set_timeout,
    together,
)


def fail_on(ranks, fault):
    if dist.get_rank() in ranks:
        raise fault(f"no disk on {dist.get_rank()}")
    return dist.get_rank() * 10


def fail_together():
    rank = dist.get_rank()
    assert together(lambda: fail_on([], OSError)) == rank * 10
    # The lowest rank that failed has the cause; each other one is told whether it is a user's.
    with pytest.raises(OSError if rank == 1 else PeerFault, match="no disk on 1") as caught:
        together(lambda: fail_on([1, 3], OSError))
    if rank != 1:
        assert str(caught.value) == "rank 1 failed: no disk on 1"
        assert not caught.value.is_user_error
    with pytest.raises(UserError if rank == 2 else PeerFault) as caught:
        together(lambda: fail_on([2], UserError))
    assert rank == 2 or caught.value.is_user_error


def decide_on_rank_zero():
    rank = dist.get_rank()
    assert on_rank_zero(lambda: {"decided by": rank}) == {"decided by": 0}
    with pytest.raises(OSError if rank == 0 else PeerFault, match="no disk on 0"):
        on_rank_zero(lambda: fail_on([0], OSError))


def take_turns(folder):
    """Two nodes of two ranks: the first of each acts before any other."""
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = str(rank % 2)

    def act():
        seen = {path.name for path in folder.iterdir()}
        if rank % 2:
            assert {"0", "2"} <= seen
        else:
            assert not {"1", "3"} & seen
        (folder / str(rank)).touch()
        return rank

    assert first_on_each_node(act, patient_group()) == rank


def compare():
    rank = dist.get_rank()
    assert gathered(rank) == [0, 1, 2, 3]
    rows = gather_rows(torch.tensor([rank, 10 * rank]))
    assert rows.tolist() == [[0, 0], [1, 10], [2, 20], [3, 30]]
    assert gather_rows(torch.empty(0)).shape == (4, 0)
    require_equal("the same", "the corpus")
    expected = "the corpus differs between ranks: a on rank 0, b on rank 2"
    with pytest.raises(SharedUserError, match=expected):
        require_equal("b" if rank > 1 else "a", "the corpus")


def compare_configs():
    rank = dist.get_rank()
    config = {"data": {"cache_folder": f"/scratch/{rank}"}, "optimizer": {"lr": 1e-3, "eps": 1}}
    require_equal_config(config, ["data.cache_folder"])
    config["optimizer"]["lr"] = 2e-3 if rank == 3 else 1e-3
    config["optimizer"]["eps"] = [1, 2, None, 2][rank]
    with pytest.raises(SharedUserError) as caught:
        require_equal_config(config, ["data.cache_folder"])
    assert str(caught.value).splitlines()[1:] == [
        "  optimizer.eps = 1 on rank 0, 2 on ranks 1, 3, None on rank 2",
        "  optimizer.lr = 0.001 on ranks 0 to 2, 0.002 on rank 3",
    ]


def timeout_of(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def shorten_timeouts():
    groups = [dist.group.WORLD, dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = [group for group in groups if dist.get_rank(group) >= 0]
    assert len(own) == 2
    patient = patient_group()
    set_timeout(7)
    assert [timeout_of(group) for group in own] == [7, 7]
    assert timeout_of(patient) == 6 * 3600


def agree_and_fail(folder):
    fail_together()
    decide_on_rank_zero()
    take_turns(folder)
    compare()
    compare_configs()
    shorten_timeouts()


@pytest.mark.slow
def test_four_ranks_agree_and_fail_together(tmp_path):
    in_group(4, agree_and_fail, tmp_path, timeout_s=60)


def run_with(arguments_by_rank):
    rank = int(os.environ["RANK"])
    return train.main(JobConfig().parse_args(arguments_by_rank[rank]))


# What rank 1 is given otherwise, and how the message tells it.
DIFFERENCES = {
    "optimizer.lr": (0.002, "optimizer.lr = 0.0008 on rank 0, 0.002 on rank 1"),
    "training.max_norm": (0.5, "training.max_norm = 1.0 on rank 0, 0.5 on rank 1"),
    "training.mixed_precision_param": (
        "bfloat16",
        "training.mixed_precision_param = 'float32' on rank 0, 'bfloat16' on rank 1",
    ),
    "parallelism.tensor_parallel_degree": (
        2,
        "parallelism.tensor_parallel_degree = 1 on rank 0, 2 on rank 1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("keys", [list(DIFFERENCES)[:3], list(DIFFERENCES)[3:]], ids=str)
def test_nodes_with_different_configs_do_not_train(tmp_path, data, keys):
    given = {**data, "job.dump_folder": tmp_path / "run"}
    changed = {key: DIFFERENCES[key][0] for key in keys}
    arguments = [options(given), options({**given, **changed})]
    printed = on_ranks(2, run_with, arguments, expect=2, timeout_s=60)
    assert printed.splitlines() == [
        "error: the ranks were given different configs; all nodes of a run need the same",
        *(f"  {DIFFERENCES[key][1]}" for key in sorted(keys)),
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_may_differ_per_node_may(tmp_path, data):
    given = {**data, "job.dump_folder": tmp_path / "run", "training.steps": 1}
    own_cache = {**given, "data.cache_folder": tmp_path / "cache"}
    on_ranks(2, run_with, [options(given), options(own_cache)], timeout_s=60)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1
