"""How long collectives take: bytes over the links that their ranks have.

Ranks are numbered through nodes, so a dimension of the mesh is a group of ranks that are a fixed
stride apart: the innermost, tensor parallelism, stays within a node, the outermost crosses them.

In a ring of n ranks, each sends (n - 1) / n of a tensor to gather it, or to reduce and scatter it,
and twice that to all-reduce it (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002).
"""

from dataclasses import dataclass
from typing import Literal

from torchtrain.config.layout import Degrees
from torchtrain.tools.preflight.devices import Device

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]

START_S = 15e-6
"""From the call of a collective to its first byte: launch and hand-shake of the kernels."""
HOP_S = 5e-6
"""For each further node of a ring: switches and network cards."""


@dataclass(frozen=True)
class Group:
    """Ranks along a dimension of the mesh."""

    size: int
    stride: int
    """From one rank of it to the next."""

    def per_node(self, device: Device) -> int:
        """Return how many of the ranks are in one node."""
        return max(1, min(self.size, device.devices_per_node // self.stride))

    def nodes(self, device: Device) -> int:
        """Return over how many nodes the ranks lie."""
        return -(-self.size // self.per_node(device))


@dataclass(frozen=True)
class Exchange:
    """A collective of the ranks of a group."""

    kind: Kind
    size: float
    """Bytes: of what is gathered, or is reduced and scattered or to all; else of what a rank has to
    send, to itself too."""

    def bytes_sent(self, ranks: int) -> float:
        """Return how much one rank sends to others."""
        if self.kind == "send":
            return self.size if ranks > 1 else 0.0
        return self.size * (ranks - 1) / ranks * (2 if self.kind == "all_reduce" else 1)


@dataclass(frozen=True)
class Links:
    """The links of a device as a run finds them."""

    device: Device
    node_share: float
    """Of a node's bandwidth, what collectives reach."""
    network_share: float
    """The same of the network's."""

    def seconds(self, exchange: Exchange, group: Group) -> float:
        """Return how long a collective takes; 0 for one rank."""
        if group.size == 1:
            return 0.0
        nodes = group.nodes(self.device)
        latency = START_S + HOP_S * (nodes - 1)
        sent = exchange.bytes_sent(group.size)
        node = self.device.node_bandwidth * self.node_share
        network = self.device.network_bandwidth * self.network_share
        here = group.per_node(self.device)
        if nodes == 1:
            return latency + sent / node
        if exchange.kind == "all_to_all":
            # To each rank its part: those of other nodes by the rank's own network card.
            away = sent * (group.size - here) / (group.size - 1)
            return latency + max(away / network, (sent - away) / node)
        if exchange.kind == "send":
            return latency + sent / network
        # A ring enters and leaves each node once, by the network cards of all its ranks there.
        return latency + sent / min(node, here * network)


@dataclass(frozen=True)
class Groups:
    """The groups of ranks that communicate in a step, as `parallelisms.mesh` arranges them."""

    tp: Group
    cp: Group
    ep: Group
    fsdp: Group
    """Ranks that shard a block's parameters."""
    fsdp_experts: Group
    """The same of its experts."""
    replicas: Group
    pp: Group


def list_groups(degrees: Degrees) -> Groups:
    """Return the groups of a layout."""
    stage = degrees.dp_replicate * degrees.dp_shard * degrees.cp * degrees.tp
    shard = degrees.dp_shard * degrees.cp
    return Groups(
        tp=Group(degrees.tp, 1),
        cp=Group(degrees.cp, degrees.tp),
        ep=Group(degrees.ep, 1),
        fsdp=Group(shard, degrees.tp),
        fsdp_experts=Group(degrees.expert_shard, degrees.ep),
        replicas=Group(degrees.dp_replicate, shard * degrees.tp),
        pp=Group(degrees.pp, stage),
    )
