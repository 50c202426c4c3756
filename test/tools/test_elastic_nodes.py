"""Nodes that come and go: they meet in node 0's store, and the run goes on with those there are."""

import json
import logging
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from unittest.mock import patch

import pytest
from helpers import launching
from helpers.forking import train
from helpers.launching import TIMEOUT_S, environment, metrics, options
from helpers.quick import running
from helpers.runs import STEPS, saving
from torch.distributed.elastic.rendezvous import (
    RendezvousParameters,
    rendezvous_handler_registry,
)

from torchtrain.attempts import STEP
from torchtrain.errors import PeerFault, UserError
from torchtrain.logging_utils import logger
from torchtrain.tools import elastic, launch, launch_checks
from torchtrain.tools.elastic import ElasticMeeting, RunOver
from torchtrain.tools.nodes import Nodes

CURVE = ("loss", "max_loss", "grad_norm", "lr", "tokens_seen")
TOLERANCE = 2e-5
"""By how much losses may differ on another number of ranks, relative to themselves."""


class Place:
    """A port, and the nodes that meet there within this process."""

    def __init__(self, port, count=2, usable=(1, 2)):
        self.port, self.count, self.usable = port, count, list(usable)
        self.pool = ThreadPoolExecutor(8)
        self.meetings = []

    def come(self, rank, config="same", lost_s=60, last_call_s=1):
        """A node's meeting, in which it gives signs of life; lost after so many without."""
        node = Nodes(self.count, rank, "127.0.0.1", self.port, static=True, least=1)
        meeting = ElasticMeeting(node, self.usable, 3, 60.0, config)
        conf = {"keep_alive_max_attempt": lost_s, "last_call_timeout": last_call_s}
        self.meetings.append(meeting)
        return meeting.join(
            RendezvousParameters("torchtrain", node.endpoint, "run", 1, self.count, **conf)
        )

    def meet(self, *meetings):
        """What each learns of the next attempt: its place and how many take part."""
        waits = [self.pool.submit(meeting.next_rendezvous) for meeting in meetings]
        infos = [wait.result(timeout=60) for wait in waits]
        return [(info.rank, info.world_size) for info in infos]


@pytest.fixture
def place(free_port):
    place = Place(free_port)
    yield place
    for meeting in reversed(place.meetings):  # node 0 last
        meeting.leave(1)
    place.pool.shutdown()


def wait_for_change(meeting):
    deadline = time.monotonic() + 60
    while not (change := meeting.find_change()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return change


def until_over(meeting):
    """How the run has ended on another node, for a node that waits."""
    with pytest.raises(RunOver) as caught:
        meeting.next_rendezvous()
    meeting.leave(caught.value.status)
    return caught.value.status, str(caught.value)


def test_before_each_attempt_the_interface_is_chosen_that_reaches_its_nodes(place, monkeypatch):
    chosen = []
    monkeypatch.setattr(elastic, "find_way", lambda nodes: f"10.0.0.{nodes.rank}")
    monkeypatch.setattr(elastic, "choose_interface", lambda nodes, ways, _: chosen.append(ways))
    place.count = 3
    first, third = place.come(0), place.come(2)
    assert place.meet(first, third) == [(0, 2), (1, 2)]
    assert chosen == [["10.0.0.0", "10.0.0.2"]] * 2
    third.leave(1)
    assert first._find_ways() == ["10.0.0.0"]


def test_a_node_that_is_started_again_takes_its_place(place):
    first, second = place.come(0), place.come(1)
    assert place.meet(first, second) == [(0, 2), (1, 2)]
    assert first.num_nodes_waiting() == second.num_nodes_waiting() == 0
    first._base.set(STEP, "0 8")
    second._left.set()  # its launcher is killed: no word, no more signs of life
    again = place.come(1, lost_s=8)
    waits = place.pool.submit(again.next_rendezvous)
    assert wait_for_change(first) == wait_for_change(second) == "broken"
    assert first.num_nodes_waiting() == 1
    assert place.meet(first) == [(0, 2)]
    assert waits.result(timeout=60).rank == 1
    assert first.attempt == again.attempt
    assert first.attempt.cause == "node 1 was lost in step 8"


def test_a_node_without_a_sign_of_life_is_lost_and_may_join_again(place):
    first, second = place.come(0, lost_s=4), place.come(1)
    assert place.meet(first, second) == [(0, 2), (1, 2)]
    second._left.set()
    assert wait_for_change(first) == "broken"
    assert place.meet(first) == [(0, 1)]
    assert first.attempt.cause == "node 1 was lost before the first step"
    assert second.find_change() == "broken"  # where it was only held up, it finds that out
    assert second._find_newest().launchers.keys() == {0}


def test_a_node_that_comes_is_taken_when_the_ranks_have_saved(place):
    first = place.come(0)
    assert place.meet(first) == [(0, 1)]
    second = place.come(1)
    waits = place.pool.submit(second.next_rendezvous)
    assert wait_for_change(first) == "join"
    assert place.meet(first) == [(0, 2)]
    assert waits.result(timeout=60).world_size == 2
    assert (first.attempt.cause, first.attempt.is_restart) == ("node 1 has come", False)
    assert first.num_nodes_waiting() == 0


def test_a_node_that_is_not_needed_waits_and_ends_with_the_others(place, capsys):
    place.count = 3
    first, second, third = (place.come(rank) for rank in range(3))
    assert place.meet(first, second) == [(0, 2), (1, 2)]
    over = place.pool.submit(until_over, third)
    said = ""
    while elastic.WAITS not in said:
        said += capsys.readouterr().out
        time.sleep(0.05)
    second.leave(0)
    first.leave(0)
    assert over.result(timeout=60) == (0, elastic.DONE)


def test_a_node_that_is_stopped_ends_the_run_and_one_that_waits_does_not(place):
    place.count = 3
    first, second, third = (place.come(rank) for rank in range(3))
    assert place.meet(first, second) == [(0, 2), (1, 2)]
    third.leave(143)
    assert not first.is_closed()
    second.leave(143)
    assert first.is_closed()
    assert until_over(first) == (143, "node 1 was stopped by SIGTERM; this node ends too")


def test_a_node_with_another_config_or_one_too_many_is_refused(place):
    place.come(0)
    with pytest.raises(UserError, match="config or NGPU of node 1 is not that of node 0"):
        place.come(1, config="another")
    place.come(1)
    with pytest.raises(UserError, match="NODE_RANK = 1: this node takes part in the run already"):
        place.come(1)


def test_without_node_0_the_others_end(place):
    first, second = place.come(0), place.come(1)
    assert place.meet(first, second) == [(0, 2), (1, 2)]
    place.meetings.remove(first)
    first._left.set()
    del first._base, first._store  # and with them the server
    with pytest.raises(PeerFault, match=r"node 0, where the nodes meet \(127.0.0.1:\d+\), is lost"):
        second.find_change()


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (143, "was stopped by SIGTERM"),
        (75, "was stopped at the end of its time"),
        (1, "has ended with exit status 1"),
        (255, "has ended with exit status 255"),
    ],
)
def test_how_a_node_has_ended_is_said(status, text):
    assert elastic.describe(status) == text


def node(rank, port, nodes="1:2"):
    """What this node's environment says."""
    return {
        "NNODES": nodes,
        "NODE_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MAX_RESTARTS": "3",
        "RDZV_CONF": "keep_alive_max_attempt=5",  # seconds until a node is lost: half the default
    }


@pytest.mark.parametrize(
    ("given", "overrides", "text"),
    [
        ({"NNODES": "3:2"}, {}, "NNODES = '3:2': must be a whole number at least 1, or MIN:MAX"),
        ({"RDZV_BACKEND": "c10d"}, {}, "RDZV_BACKEND = 'c10d': must be left out with NNODES"),
        ({"MAX_RESTARTS": "0"}, {}, "NNODES = 1:2 needs MAX_RESTARTS"),
        ({}, {"training.global_batch_size": -1}, "NNODES = 1:2 needs training.global_batch_size"),
        ({}, {"checkpoint.enable": False}, "MAX_RESTARTS = 3 needs checkpoint.enable"),
    ],
)
def test_what_cannot_be_elastic_is_one_line(capfd, data, given, overrides, text):
    with patch.dict(os.environ, environment(1) | node(0, 1) | given, clear=True):
        assert launch.main(options({**data, "checkpoint.enable": True, **overrides})) == 2
    error = capfd.readouterr().err
    assert error.startswith(text)
    assert error.count("\n") == 1


def test_the_numbers_of_nodes_that_divide_the_batch_are_found(capsys, data):
    nodes = Nodes(6, 0, "127.0.0.1", 1, static=True, least=2)
    given = options({**data, "training.global_batch_size": 24})
    assert launch_checks.find_usable(given, nodes, processes=1) == [2, 3, 4, 6]
    assert "of 2 to 6 nodes, this config can be shared by 2, 3, 4, 6" in capsys.readouterr().out
    assert launch_checks.find_usable(given, nodes, processes=4) == [2, 3, 6]
    capsys.readouterr()
    assert launch_checks.find_usable(given, Nodes(5, 0, "", 1, static=True, least=5), 1) == [5]
    assert not capsys.readouterr().out  # that it is refused says the config check


LOSS_AND_RETURN = """
import os
import signal
import time
from pathlib import Path

from torchtrain import attempts

real = attempts.begin_step
is_first = os.environ.get("TORCHTRAIN_ATTEMPT") == "0"


def begin_step(step):
    real(step)
    if is_first and step == 8 and os.environ.get("RANK") == "1":
        os.kill(os.getppid(), signal.SIGKILL)  # the launcher, and with it this rank
        os.kill(os.getpid(), signal.SIGKILL)
    while step == 9 and os.environ["WORLD_SIZE"] == "1" and not Path(FILE).exists():
        time.sleep(0.1)


attempts.begin_step = begin_step  # before train.py imports it
"""


def read_until(process, text):
    """What a launch prints until a line has this in it."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"ended without {text!r}:\n{''.join(lines)}")


@pytest.mark.slow
def test_a_node_is_lost_and_comes_back_and_the_curve_is_one(tmp_path, data, free_port):
    train(2, saving(data, tmp_path / "untouched"))
    go_on = tmp_path / "go-on"
    fault = tmp_path / "fault.py"
    fault.write_text(LOSS_AND_RETURN.replace("FILE", repr(str(go_on))))
    given = saving(data, tmp_path / "run", **{"experimental.custom_import": fault})
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(running(1, given, **node(rank, free_port))) for rank in (0, 1)
        )
        output = read_until(first, "restart 1 of 3: goes on after step 5; 2 steps taken again")
        lost = "node 1 was lost in step 8; all ranks are started again on 1 of 2 nodes"
        assert f"{lost} (restart 1 of 3)" in output
        assert second.wait(timeout=TIMEOUT_S) == -signal.SIGKILL
        back = stack.enter_context(running(1, given, **node(1, free_port)))
        output = read_until(first, "a node has come: the ranks save, and start again with it")
        go_on.touch()
        output, _ = first.communicate(timeout=TIMEOUT_S)
        assert first.returncode == 0, output
        assert "node 1 has come; all ranks are started again on 2 of 2 nodes" in output
        assert "restart on 2 of 2 nodes: goes on after step 9; 0 steps taken again" in output
        output, _ = back.communicate(timeout=TIMEOUT_S)
        assert back.returncode == 0, output
    ours, theirs = metrics(tmp_path / "run"), metrics(tmp_path / "untouched")
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for mine, untouched in zip(ours, theirs, strict=True):
        for key in CURVE:
            assert mine[key] == pytest.approx(untouched[key], rel=TOLERANCE), (mine["step"], key)
    superseded = (tmp_path / "run" / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in superseded] == [6, 7]


@pytest.mark.slow
def test_a_stop_of_one_launcher_stops_all_nodes_with_a_save(tmp_path, data, free_port):
    given = saving(
        data, tmp_path / "run", **{"training.steps": 100000, "checkpoint.interval": 9999}
    )
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(running(1, given, **node(rank, free_port))) for rank in (0, 1)
        )
        read_until(first, "step      3/")
        second.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [143, 143], outputs
    assert "started again" not in outputs[0]
    step = re.search(r"stopped by SIGTERM after step (\d+)", outputs[0])[1]
    assert (tmp_path / "run" / "checkpoint" / f"step-{step}" / "complete.json").exists()


@pytest.mark.slow
def test_the_loss_of_node_0_ends_the_run_with_a_line(tmp_path, data, free_port):
    given = saving(data, tmp_path / "run", **{"training.steps": 100000})
    lost = running(1, given, **node(0, free_port))
    # Not a fork: it is to import torch such that this does not warn.
    ends = launching.running(1, given, **node(1, free_port))
    with lost as first, ends as second:
        read_until(first, "step      1/")
        first.kill()
        output, _ = second.communicate(timeout=TIMEOUT_S)
    assert second.returncode == 1, output
    *_, last = output.splitlines()
    where = f"node 0, where the nodes meet (127.0.0.1:{free_port})"
    assert last == f"{where}, is lost; this node ends too"
    assert "TCPStore.cpp" not in output


@pytest.mark.parametrize(
    ("given", "overrides", "status", "text"),
    [
        (
            {"NNODES": "2:4"},
            {"comm.init_timeout_seconds": 1},
            1,
            "comm.init_timeout_seconds have passed, and 1 node is there; "
            "the config can be shared by 2 or 4",
        ),
        ({"RDZV_CONF": "last_call_timeout=soon"}, {}, 2, "'last_call_timeout'"),
    ],
)
def test_too_few_nodes_end_with_one_message(
    capfd, monkeypatch, tmp_path, data, free_port, given, overrides, status, text
):
    # A launcher silences torchrun's log, and has its own handlers.
    monkeypatch.setattr(logging.root.manager, "disable", logging.root.manager.disable)
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.setattr(logger, "handlers", logger.handlers.copy())
    variables = environment(1) | node(0, free_port) | given
    handlers = rendezvous_handler_registry._registry  # that of this process, not a launcher's
    with patch.dict(os.environ, variables, clear=True), patch.dict(handlers):
        assert launch.main(options(saving(data, tmp_path / "run", **overrides))) == status
    captured = capfd.readouterr()
    assert text in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
