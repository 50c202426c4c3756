"""The network interface that ranks of several nodes talk over, where gloo would take a wrong one.

gloo listens at the address that a machine's own name has on that machine. Debian and Ubuntu make it
127.0.1.1, by /etc/hosts; where the name has none, gloo takes 127.0.0.1. On any other node that is
the other node itself, and its ranks find nobody there.
"""

import fcntl
import ipaddress
import socket
import struct
from collections.abc import MutableMapping
from contextlib import suppress

from torchtrain.tools.nodes import Nodes

IFNAME = "GLOO_SOCKET_IFNAME"
"""PyTorch's variable for gloo's interface."""
SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface, netdevice(7)."""


def choose_interface(nodes: Nodes, environment: MutableMapping[str, str]) -> None:
    """Have gloo take the interface that reaches node 0, where it would take the loopback."""
    if nodes.count == 1 or IFNAME in environment:
        return
    name = socket.gethostname()
    own = find_address(name)
    if own is not None and not ipaddress.ip_address(own).is_loopback:
        return
    here = find_source(nodes.address)
    if here is None or ipaddress.ip_address(here).is_loopback:
        return  # all nodes are on this machine, or node 0 has no address yet
    if interface := find_interface(here):
        environment[IFNAME] = interface
        what = f"{own} to itself" if own else "without an address"
        print(f"{IFNAME} = {interface}, for this machine's name, {name}, is {what}", flush=True)


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
    """Return the interface with this IPv4 address (Linux)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address, or another system
                answer = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
