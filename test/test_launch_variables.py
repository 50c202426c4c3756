"""What launchers leave in the environment: a rank, a process on its own, or a message."""

import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from helpers.launching import find_free_port

from torchtrain import attempts, ranks
from torchtrain.config_manager import parse_or_exit
from torchtrain.errors import PeerFault, UserError
from torchtrain.launch_variables import check_place
from torchtrain.tools.command import report_faults

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MASTER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
ONE_OF_FOUR = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **MASTER}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*NAMES, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def setting(monkeypatch):
    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.fixture
def taken_port():
    with socket.create_server(("", find_free_port())) as server:
        yield str(server.getsockname()[1])


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize("left_out", ["nothing", "LOCAL_RANK"])
def test_a_rank_that_has_all_it_needs_is_let_through(left_out):
    check_place(without(ONE_OF_FOUR, left_out))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (without(ONE_OF_FOUR, "RANK"), "WORLD_SIZE = 4, but RANK is not set. "),
        (
            without(ONE_OF_FOUR, *MASTER),
            "WORLD_SIZE = 4, but MASTER_ADDR, MASTER_PORT are not set. ",
        ),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE = 4, but RANK, MASTER_ADDR, MASTER_PORT are not set. "),
        ({**ONE_OF_FOUR, "MASTER_ADDR": ""}, "WORLD_SIZE = 4, but MASTER_ADDR is not set. "),
        ({**ONE_OF_FOUR, "RANK": "4"}, "RANK = 4: must be below WORLD_SIZE = 4. "),
        ({**ONE_OF_FOUR, "LOCAL_RANK": "8"}, "LOCAL_RANK = 8: must be below WORLD_SIZE = 4. "),
        (
            without(ONE_OF_FOUR, "WORLD_SIZE"),
            "RANK = 3: must be below WORLD_SIZE (1, since it is not set). ",
        ),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK = 1: must be below WORLD_SIZE (1, since it is not set)"),
        ({**ONE_OF_FOUR, "RANK": "${SLURM_PROCID}"}, "RANK = '${SLURM_PROCID}': must be a whole "),
        ({**ONE_OF_FOUR, "RANK": "-1"}, "RANK = '-1': must be a whole number >= 0. "),
        (
            {"TORCHELASTIC_MAX_RESTARTS": ""},
            "TORCHELASTIC_MAX_RESTARTS = '': must be a whole number >= 0. ",
        ),
        ({"RANK": ""}, "RANK = '': must be a whole number >= 0. "),
        ({**ONE_OF_FOUR, "MASTER_PORT": "none"}, "MASTER_PORT = 'none': must be a whole number "),
        ({**ONE_OF_FOUR, "MASTER_PORT": "65536"}, "MASTER_PORT = 65536: must be at most 65535"),
    ],
)
def test_a_rank_that_cannot_be_is_told_why_before_torch_is_imported(
    setting, capsys, variables, said
):
    setting(variables)
    with pytest.raises(SystemExit) as ended:
        parse_or_exit(["--parallelism.data_parallel_shard_degree", "-1"])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {said}")
    assert printed.count("\n") == 1


def test_the_launcher_that_knows_the_world_size_is_no_rank(setting):
    setting({"RANK": "7", "LOCAL_RANK": "7"})
    parse_or_exit([], world_size=2)


def test_a_command_that_uses_a_model_says_it_too(setting, capsys):
    setting({"RANK": "one"})
    assert report_faults(lambda: None) == 2
    assert capsys.readouterr().err.startswith("error: RANK = 'one': must be a whole number >= 0")


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "1"},
        {"RANK": "0"},
        {"LOCAL_RANK": "0", "RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "a.node.that.has.gone"},
        {"MASTER_ADDR": "localhost", "MASTER_PORT": "none"},
        {"TORCHELASTIC_RUN_ID": "gone", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        {"TORCHELASTIC_RUN_ID": "gone", "WORLD_SIZE": "1", "RANK": "0"},
    ],
    ids=str,
)
def test_a_process_on_its_own_goes_on_as_one(setting, variables):
    setting(variables)
    check_place(variables)
    ranks.join_process_group(60)
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    assert attempts.end_for_good(0) == 0
    dist.destroy_process_group()


def test_a_process_on_its_own_needs_no_port(setting, taken_port):
    setting({**ONE_OF_FOUR, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    setting({"MASTER_PORT": taken_port})
    ranks.join_process_group(60)
    assert dist.get_world_size() == 1
    dist.destroy_process_group()


def test_a_taken_port_is_one_message(setting, taken_port):
    setting({**ONE_OF_FOUR, "RANK": "0", "MASTER_PORT": taken_port})
    with pytest.raises(UserError) as caught:
        attempts.meet(timedelta(seconds=20))
    expected = f"MASTER_PORT = {taken_port}: address already in use on this node. "
    assert str(caught.value) == f"{expected}Set another, the same for all ranks"


def test_a_port_of_a_program_that_never_answers_is_told_and_given_up(setting, monkeypatch, caplog):
    monkeypatch.setattr(attempts, "PATIENCE_S", 0.1)
    monkeypatch.setattr(attempts, "ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        setting({**ONE_OF_FOUR, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        with pytest.raises(PeerFault) as caught:
            attempts.meet(timedelta(seconds=1))
    assert not caught.value.is_user_error  # a node that stands still looks the same
    place = f"MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port}"
    assert caplog.messages == [
        f"{place}: what listens there does not answer. If it is another program, set a port that "
        "is free on that node, the same for all ranks",
        f"the ranks did not meet at {place}: what listens there never answered",
    ]


def test_ranks_that_come_late_are_waited_for(setting, monkeypatch):
    """The first finds its own store, as often as it looks, and the next one that store."""
    monkeypatch.setattr(attempts, "PATIENCE_S", 0.05)
    looks = []
    both_looked = threading.Event()

    def rendezvous(url, timeout):
        assert both_looked.wait(timeout=60)
        yield "store", 0, 4

    is_silent = attempts._is_silent

    def look(address, port):
        looks.append(is_silent(address, port))
        if len(looks) == 2:
            both_looked.set()
        return looks[-1]

    monkeypatch.setattr(attempts.dist, "rendezvous", rendezvous)
    monkeypatch.setattr(attempts, "_is_silent", look)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    setting({**ONE_OF_FOUR, "RANK": "0", "MASTER_PORT": str(store.port)})
    assert attempts._rendezvous(timedelta(seconds=60)) == ("store", 0, 4)
    assert looks == [False, False]


def test_a_timeout_of_the_rendezvous_itself_ends_it(setting, monkeypatch):
    def rendezvous(url, timeout):
        raise TimeoutError("as of a socket")

    monkeypatch.setattr(attempts.dist, "rendezvous", rendezvous)
    setting({**ONE_OF_FOUR, "RANK": "0", "MASTER_PORT": "1"})
    with pytest.raises(TimeoutError, match="as of a socket"):
        attempts._rendezvous(timedelta(seconds=60))


def test_ranks_that_do_not_come_are_one_message(setting, caplog):
    port = find_free_port()
    setting({**ONE_OF_FOUR, "RANK": "0", "MASTER_PORT": str(port)})
    with pytest.raises(PeerFault) as caught:
        attempts.meet(timedelta(seconds=1))
    assert not caught.value.is_user_error  # under torchrun a further attempt may mend it
    (line,) = caplog.messages
    assert line.startswith(
        f"the ranks did not meet at MASTER_ADDR:MASTER_PORT = localhost:{port}: "
    )
    assert "1/4 clients joined" in line
