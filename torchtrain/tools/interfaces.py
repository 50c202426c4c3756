"""The network interface that ranks of several nodes talk over, where gloo would take a wrong one.

gloo listens at the address that a machine's own name has on that machine. Debian and Ubuntu make it
127.0.1.1, by /etc/hosts; where the name has none, gloo takes 127.0.0.1. On any other node that is
the other node itself, and its ranks find nobody there.

The way to node 0 leads over an interface that the others reach this machine by. Node 0 itself,
whose name may be its loopback too, needs the way to another node: so all tell each other how they
reach node 0, when they meet.
"""

import fcntl
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable, MutableMapping
from contextlib import suppress

from torchtrain.tools.nodes import Nodes

IFNAME = "GLOO_SOCKET_IFNAME"
"""PyTorch's variable for gloo's interface."""
NCCL_IFNAME = "NCCL_SOCKET_IFNAME"
"""NCCL's own."""
SIOCGIFADDR = 0x8915
"""Linux: the first IPv4 address of an interface, netdevice(7): the one that gloo listens at."""
ELSEWHERE = "198.51.100.1"
"""No machine's address (RFC 5737), for one that is not known: the default route leads there."""


def choose_interface(
    nodes: Nodes, ways: Iterable[str], environment: MutableMapping[str, str]
) -> None:
    """Have gloo take the interface that reaches the other nodes, where it would take the loopback.

    Args:
        nodes: as this one sees them.
        ways: for each node of the run, the address from which it reaches node 0, as `find_way`
            returns it there.
        environment: what the ranks will inherit.
    """
    ways = list(ways)
    if IFNAME in environment or all(map(is_loopback, ways)):  # all nodes are on this machine
        return
    name = socket.gethostname()
    own = find_address(name)
    if own and not is_loopback(own):
        return
    what = f"{own} to itself" if own else "without an address"
    for host in (nodes.address, *ways, ELSEWHERE):
        source = find_source(host)
        interface = find_interface(source) if source and not is_loopback(source) else None
        if interface:
            environment[IFNAME] = interface
            print(f"{IFNAME} = {interface}, for this machine's name, {name}, is {what}", flush=True)
            return
    print(
        f"warning: this machine's name, {name}, is {what}, and no interface is known to reach the "
        f"other nodes: set {IFNAME}, and for NCCL {NCCL_IFNAME}, or give the name its address in "
        "/etc/hosts",
        file=sys.stderr,
    )


def find_way(nodes: Nodes) -> str:
    """Return the address from which this node reaches node 0."""
    return find_source(nodes.address) or ELSEWHERE


def is_loopback(address: str) -> bool:
    """Return whether an address is one by which a machine reaches itself alone."""
    return ipaddress.ip_address(address).is_loopback


def find_address(host: str) -> str | None:
    """Return the first address of a host, as this machine sees it."""
    with suppress(OSError):
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    return None


def find_source(host: str) -> str | None:
    """Return the IPv4 address of this machine from which it reaches a host. Nothing is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect((host, 9))
        return str(asked.getsockname()[0])
    return None


def find_interface(address: str) -> str | None:
    """Return the interface with this first IPv4 address (Linux)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address, or another system
                answer = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
