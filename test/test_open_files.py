"""A run of many ranks and the limit of open files."""

import os
import resource
from unittest.mock import patch

import pytest
import torch.distributed as dist
from helpers.forking import on_ranks, run_trainer
from helpers.launching import environment, options

from torchtrain import open_files
from torchtrain.errors import UserError
from torchtrain.open_files import allow_open_files
from torchtrain.ranks import join_process_group, patient_group
from torchtrain.tools import launch

NO_LIMIT = resource.RLIM_INFINITY
NEEDED = "each of 600 ranks needs at least 1,206 open files for its connections to the others"
ALLOWED = "and a process may have 1,024 here: have the hard limit raised (ulimit -Hn; "


@pytest.fixture
def limits(monkeypatch):
    """The soft and the hard limit, in place of this process'."""
    found = [1024, 20_000]
    monkeypatch.setattr(open_files.resource, "getrlimit", lambda _: tuple(found))
    monkeypatch.setattr(
        open_files.resource, "setrlimit", lambda _, new: found.__setitem__(0, new[0])
    )
    return found


@pytest.mark.parametrize(
    ("ranks", "soft", "hard", "raised", "warns"),
    [
        (8, 1024, 20_000, 1024, False),
        (99, 1024, 1024, 1024, False),  # 5 x 102 + 512 are 1,022
        (100, 1024, 20_000, 1027, False),
        (100, 1024, 1024, 1024, True),
        (512, 1024, 20_000, 3087, False),
        (512, 1024, 2048, 2048, True),
        (509, 1024, 1024, 1024, True),  # two groups, and nothing else
        (4096, 1024, NO_LIMIT, 21_007, False),
        (4096, NO_LIMIT, NO_LIMIT, NO_LIMIT, False),
    ],
)
def test_the_soft_limit_is_raised_as_far_as_needed(limits, ranks, soft, hard, raised, warns):
    limits[:] = soft, hard
    warning = allow_open_files(ranks)
    assert limits == [raised, hard]
    assert warns == (warning is not None)
    if warning:
        assert f"each of {ranks} ranks may need up to" in warning
        assert f"a process may have {hard:,} here" in warning


def test_a_hard_limit_below_any_runs_needs_is_refused(limits):
    limits[:] = 1024, 1024
    with pytest.raises(UserError, match="each of 510 ranks needs at least 1,026 open files"):
        allow_open_files(510)


def test_the_launcher_says_it_before_any_rank_exists(limits, capfd, data):
    limits[:] = 1024, 1024
    with patch.dict(os.environ, environment(600), clear=True):
        assert launch.main(options({**data, "training.global_batch_size": 600})) == 2
    error = capfd.readouterr().err
    assert f"{NEEDED}, {ALLOWED}" in error
    assert error.count("\n") == 1


def be_one_of_600(arguments):
    """A rank that torchrun has started without our launcher."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    os.environ["WORLD_SIZE"] = "600"
    return run_trainer(arguments)


@pytest.mark.slow
def test_without_our_launcher_the_first_rank_of_a_node_says_it(tmp_path, data):
    given = {**data, "training.global_batch_size": 600, "job.dump_folder": tmp_path / "run"}
    printed = on_ranks(2, be_one_of_600, options(given), expect=2, timeout_s=60)
    assert printed.startswith(f"error: {NEEDED}, {ALLOWED}")
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


def count_open_files():
    return len(os.listdir("/proc/self/fd"))


def make_groups():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    join_process_group(60)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (5 * 7 + 512, hard)
    before = count_open_files()
    group = patient_group()
    assert count_open_files() - before == dist.get_world_size() + open_files.GROUP_FILES
    assert patient_group() is group, "each caller would open as many again"
    assert patient_group("checkpoint") is not group
    assert patient_group("checkpoint") is patient_group("checkpoint")
    dist.barrier()  # a rank that has left would refuse one that is still connecting
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_group_costs_a_file_per_rank_and_three_and_each_thread_has_one():
    on_ranks(4, make_groups, timeout_s=60)
