"""Which network interface gloo takes where a machine's own name is its loopback."""

import socket

import pytest

from torchtrain.tools import interfaces
from torchtrain.tools.interfaces import IFNAME, choose_interface, find_interface, find_source
from torchtrain.tools.nodes import Nodes

TWO = Nodes(2, 1, "there", 29500, static=True)


@pytest.fixture
def machine(monkeypatch):
    """A machine `here`, which reaches `there` from 10.0.0.7; `own` is how it sees its own name."""

    def machine(own, source="10.0.0.7"):
        monkeypatch.setattr(socket, "gethostname", lambda: "here")
        monkeypatch.setattr(interfaces, "find_address", {"here": own}.get)
        monkeypatch.setattr(interfaces, "find_source", {"there": source}.get)
        monkeypatch.setattr(interfaces, "find_interface", {"10.0.0.7": "eth0"}.get)

    return machine


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("127.0.1.1", "GLOO_SOCKET_IFNAME = eth0, for this machine's name, here, is 127.0.1.1 to "),
        ("::1", "GLOO_SOCKET_IFNAME = eth0, for this machine's name, here, is ::1 to itself\n"),
        (None, "GLOO_SOCKET_IFNAME = eth0, for this machine's name, here, is without an address\n"),
    ],
)
def test_a_machine_that_is_its_own_loopback_takes_the_way_to_node_0(machine, capsys, own, said):
    machine(own)
    environment = {}
    choose_interface(TWO, environment)
    assert environment == {IFNAME: "eth0"}
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize(
    ("own", "source", "nodes", "before"),
    [
        ("10.0.0.7", "10.0.0.7", TWO, {}),
        ("127.0.1.1", "127.0.0.1", TWO, {}),
        ("127.0.1.1", None, TWO, {}),
        ("127.0.1.1", "10.0.0.8", TWO, {}),
        ("127.0.1.1", "10.0.0.7", TWO, {IFNAME: "ib0"}),
        ("127.0.1.1", "10.0.0.7", Nodes(1, 0, "there", 29500, static=True), {}),
    ],
    ids=["a good name", "all on one machine", "no way", "no interface", "set", "one node"],
)
def test_else_gloo_is_left_alone(machine, capsys, own, source, nodes, before):
    machine(own, source)
    environment = dict(before)
    choose_interface(nodes, environment)
    assert environment == before
    assert not capsys.readouterr().out


def test_addresses_and_interfaces_of_this_machine():
    assert find_source("127.0.0.1") == "127.0.0.1"
    assert find_interface("127.0.0.1") in dict(map(reversed, socket.if_nameindex()))
    assert find_interface("203.0.113.5") is None
    assert interfaces.find_address("127.0.0.2") == "127.0.0.2"
