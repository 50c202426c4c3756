"""The nodes of a run: what their environment may say, and how they wait for each other."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from torchtrain.errors import PeerFault, UserError
from torchtrain.tools import meeting
from torchtrain.tools.interfaces import ELSEWHERE
from torchtrain.tools.meeting import all_nodes, tell_refused
from torchtrain.tools.nodes import Nodes, read_nodes


def node(rank, count, port):
    return Nodes(count=count, rank=rank, address="127.0.0.1", port=port, static=True)


def come(node, timeout_s=60, together=None):
    """What ended this node's wait; node 0 keeps the store until all are `together`."""
    try:
        with all_nodes(node, timeout_s):
            if together is not None:
                together.wait(timeout_s)
            return "all are here"
    except (UserError, PeerFault) as fault:
        return fault


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"NNODES": "two"}, "NNODES = 'two': must be a whole number at least 1"),
        ({"NNODES": "0"}, "NNODES = '0': must be"),
        ({"NNODES": "0:2"}, "NNODES = '0:2': must be a whole number at least 1, or MIN:MAX"),
        ({"NNODES": "2:"}, "NNODES = '2:': must be a whole number at least 1, or MIN:MAX"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK = '2': must be a whole number from 0 to 1"),
        ({"NODE_RANK": "-1"}, "NODE_RANK = '-1': must be"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT = '65536': must be a whole number from 1 to 65535"),
        ({"RDZV_ENDPOINT": "somewhere"}, "RDZV_ENDPOINT = 'somewhere': must be HOST:PORT"),
    ],
)
def test_an_impossible_node_is_refused(variables, text):
    with pytest.raises(UserError, match=f"^{text}"):
        read_nodes({f"PET_{name}": value for name, value in variables.items()})


def test_nodes_are_read_as_torchrun_reads_them():
    nodes = read_nodes({"PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "here"})
    assert nodes == Nodes(count=3, rank=2, address="here", port=29500, static=True)
    assert nodes.meet_here
    assert not read_nodes({}).meet_here
    elastic = read_nodes({"PET_NNODES": "1:4", "PET_NODE_RANK": "3"})
    assert (elastic.least, elastic.count, elastic.meet_here) == (1, 4, False)
    torchruns = read_nodes({"PET_NNODES": "4", "PET_NODE_RANK": "7", "PET_RDZV_BACKEND": "c10d"})
    assert (torchruns.count, torchruns.meet_here, torchruns.is_elastic) == (4, False, False)
    assert read_nodes({"PET_RDZV_ENDPOINT": "there:2"}).endpoint == "there:2"


def test_nodes_start_when_all_are_here(capsys, free_port):
    together = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(come, node(rank, 3, free_port), 60, together) for rank in (2, 0)]
        said = ""
        while "waiting for 1 node at" not in said:
            said += capsys.readouterr().out
            assert not any(wait.done() for wait in waits)
        assert f"at 127.0.0.1:{free_port}: node rank 1 of 3" in said
        waits.append(pool.submit(come, node(1, 3, free_port), 60, together))
        assert [wait.result() for wait in waits] == ["all are here"] * 3


def test_each_node_learns_how_all_reach_node_0(monkeypatch, free_port):
    monkeypatch.setattr(meeting, "find_way", lambda nodes: f"10.0.0.{nodes.rank}")
    together = threading.Barrier(3)

    def learn(rank):
        with all_nodes(node(rank, 3, free_port), 60) as ways:
            together.wait(60)
            return ways

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(learn, range(3))) == [["10.0.0.0", "10.0.0.1", "10.0.0.2"]] * 3


def test_of_nodes_that_meet_elsewhere_the_way_is_not_known():
    with all_nodes(node(0, 1, 29500), 60) as ways:
        assert ways == []
    torchruns = read_nodes({"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d"})
    with all_nodes(torchruns, 60) as ways:
        assert ways == [ELSEWHERE] * 2


@pytest.mark.parametrize("refused", [0, 1])
def test_a_wait_ends_when_another_node_was_refused(refused, monkeypatch, free_port):
    monkeypatch.setattr(meeting, "FAREWELL_S", 30.0)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(come, node(1 - refused, 2, free_port))
        tells = threading.Thread(
            target=tell_refused, args=[node(refused, 2, free_port)], daemon=True
        )
        tells.start()
        fault = waits.result()
    assert str(fault) == f"node {refused} was refused; this node ends too"
    assert fault.is_user_error


def test_a_wait_ends_when_another_node_was_stopped(monkeypatch, free_port):
    wait_for_words = meeting._wait_for_words

    def stop_node_1(store, nodes, waiting):
        if nodes.rank == 1:
            raise KeyboardInterrupt
        return wait_for_words(store, nodes, waiting)

    monkeypatch.setattr(meeting, "_wait_for_words", stop_node_1)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(come, node(0, 2, free_port))
        with pytest.raises(KeyboardInterrupt):
            come(node(1, 2, free_port))
        fault = waits.result()
    assert str(fault) == "node 1 was stopped; this node ends too"
    assert not fault.is_user_error


def test_a_node_that_does_not_come_ends_the_wait(free_port):
    absent = "within comm.init_timeout_seconds"
    assert absent in str(come(node(0, 2, free_port), timeout_s=0))
    assert absent in str(come(node(1, 2, free_port), timeout_s=0))


def test_node_0_waits_for_its_own_address(monkeypatch, capsys, free_port):
    """That of a pod is known some seconds after the pod has started."""
    real, tries = socket.getaddrinfo, []

    def find_late(host, *rest, **options):
        tries.append(host)
        if len(tries) < 4:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", find_late)
    meeting.serve(node(0, 2, free_port))
    assert len(tries) >= 4
    said = "waiting for an address of 127.0.0.1: name or service not known\n"
    assert capsys.readouterr().out.lower() == said
    tries.clear()
    monkeypatch.setattr(meeting, "NAME_S", 0.0)
    meeting.serve(node(0, 2, free_port))
    assert not tries, "it does not wait for ever"


def test_another_programs_port_is_one_message(monkeypatch):
    monkeypatch.setattr(meeting, "STORE_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken, silent = come(node(0, 2, port)), come(node(1, 2, port))
    assert isinstance(taken, UserError)
    assert str(taken).startswith(f"MASTER_PORT = {port}: address already in use on this node")
    assert isinstance(silent, UserError)
    assert str(silent) == f"127.0.0.1:{port}: what listens there does not answer as node 0"
