"""Which network interface gloo takes where a machine's own name is its loopback."""

import socket

import pytest

from torchtrain.tools import interfaces
from torchtrain.tools.interfaces import (
    ELSEWHERE,
    IFNAME,
    choose_interface,
    find_interface,
    find_source,
    find_way,
)
from torchtrain.tools.nodes import Nodes

TWO = Nodes(2, 1, "there", 29500, static=True)
NODE_0 = Nodes(2, 0, "here", 29500, static=True)
PEER = "10.0.0.8"
LOCAL = "127.0.0.1"


@pytest.fixture
def machine(monkeypatch):
    """A machine `here`, which sees its own name as `own`, with an interface eth0 to a network.

    It reaches `there` and PEER from `source`, and all else, by its default route, from `default`.
    """

    def machine(own, source="10.0.0.7", default=None):
        sources = {"here": own, own: own, LOCAL: LOCAL, "there": source, PEER: source}
        interface = {"10.0.0.7": "eth0", "172.16.0.7": "eth1"}
        monkeypatch.setattr(socket, "gethostname", lambda: "here")
        monkeypatch.setattr(interfaces, "find_address", {"here": own}.get)
        monkeypatch.setattr(interfaces, "find_source", lambda host: sources.get(host, default))
        monkeypatch.setattr(interfaces, "find_interface", interface.get)

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
    choose_interface(TWO, [LOCAL, "10.0.0.7"], environment)
    assert environment == {IFNAME: "eth0"}
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("ways", [["127.0.1.1", PEER], ["127.0.1.1", LOCAL, PEER]])
def test_node_0_takes_the_way_to_another_machine(machine, capsys, ways):
    """As do other nodes on its machine, which reach it by the loopback too."""
    machine("127.0.1.1", default="172.16.0.7")
    environment = {}
    choose_interface(NODE_0, ways, environment)
    assert environment == {IFNAME: "eth0"}
    assert capsys.readouterr().out.startswith("GLOO_SOCKET_IFNAME = eth0, for this machine's name")


@pytest.mark.parametrize(
    ("source", "ways"),
    [(None, ["127.0.1.1", ELSEWHERE]), (None, [ELSEWHERE] * 2), ("10.0.0.9", ["127.0.1.1", PEER])],
    ids=["unknown", "torchrun's own meeting", "not the first address of an interface"],
)
def test_where_no_way_is_known_it_is_the_default_route_or_the_user_is_asked(
    machine, capsys, source, ways
):
    machine("127.0.1.1", source, default="172.16.0.7")
    environment = {}
    choose_interface(NODE_0, ways, environment)
    assert environment == {IFNAME: "eth1"}
    machine("127.0.1.1", source)
    environment = {}
    choose_interface(NODE_0, ways, environment)
    assert not environment
    said = capsys.readouterr().err
    assert said.startswith("warning: this machine's name, here, is 127.0.1.1 to itself, and no ")
    assert "set GLOO_SOCKET_IFNAME, and for NCCL NCCL_SOCKET_IFNAME, or" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("own", "ways", "before"),
    [
        ("10.0.0.7", ["10.0.0.7", PEER], {}),
        ("127.0.1.1", [LOCAL, LOCAL], {}),
        ("127.0.1.1", ["127.0.1.1", PEER], {IFNAME: "ib0"}),
        ("127.0.1.1", [], {}),
    ],
    ids=["a good name", "all on one machine", "set", "one node"],
)
def test_else_gloo_is_left_alone(machine, capsys, own, ways, before):
    machine(own)
    environment = dict(before)
    choose_interface(TWO, ways, environment)
    assert environment == before
    assert capsys.readouterr() == ("", "")


def test_the_way_to_node_0():
    assert find_way(Nodes(2, 1, "127.0.0.1", 29500, static=True)) == "127.0.0.1"
    assert find_way(Nodes(2, 1, "::1", 29500, static=True)) == ELSEWHERE


def test_addresses_and_interfaces_of_this_machine():
    assert find_source("127.0.0.1") == "127.0.0.1"
    assert find_interface("127.0.0.1") in dict(map(reversed, socket.if_nameindex()))
    assert find_interface("203.0.113.5") is None
    assert interfaces.find_address("127.0.0.2") == "127.0.0.2"
