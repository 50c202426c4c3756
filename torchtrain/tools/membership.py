"""Which nodes train together, where their number may change (NNODES=MIN:MAX): the decisions alone.

Node 0 makes them, from what each node has said (`Presence`), and the others follow. No torch here,
and no waiting: a decision is a function of what is known at that moment.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Change = Literal["", "join", "broken"]
"""Why the ranks of an attempt are to end: not at all; since a node has come, after a save; or since
ranks are lost, for which the others would wait in vain."""


@dataclass(frozen=True)
class Limits:
    """How many nodes may train together, and for how long they wait for each other."""

    count: int
    """MAX, the number of nodes there can be."""
    usable: Sequence[int]
    """The numbers of nodes from MIN to MAX that can share the config, ascending."""
    max_restarts: int
    lost_s: float
    """A node that gives no sign of life for so long is lost."""
    last_call_s: float
    """How long the first attempt waits for further nodes, once enough are there."""
    timeout_s: float
    """How long nodes that are too few wait for others."""

    def largest(self, there: int) -> int:
        """Return the largest usable number of nodes out of so many, 0 if there is none."""
        return max((number for number in self.usable if number <= there), default=0)

    def describe(self) -> str:
        """Return the usable numbers in words."""
        *others, last = map(str, self.usable)
        return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True)
class Presence:
    """What is known of a node that has come."""

    launcher: str
    """Names its launcher: that of a node that is started again is another."""
    after: int
    """It waits for an attempt with a larger number."""
    cause: str = ""
    """Of what its ranks have ended; empty: they have not, or were told to."""
    is_guess: bool = False
    """Whether they may have ended for want of another node's."""
    way: str = ""
    """The address from which it reaches node 0."""
    silent_s: float = 0.0
    """For how long it has given no sign of life."""


@dataclass(frozen=True)
class Attempt:
    """Nodes that train together, until one is lost, a rank fails or a node comes."""

    number: int = -1
    launchers: dict[int, str] = field(default_factory=dict)
    """Of the nodes that take part, by node rank."""
    restarts: int = 0
    """How often ranks have been started again after a failure."""
    cause: str = ""
    """What has ended the attempt before, in words."""
    has_lost: bool = False
    """Whether that was the loss of a node."""
    is_restart: bool = False
    """Whether it counts as a restart: not the first attempt, nor where a node has come."""


@dataclass(frozen=True)
class Decision:
    """What is to happen now; nothing, where all is at its default."""

    change: Change = ""
    """To the attempt that runs."""
    attempt: Attempt | None = None
    """The next one, which begins."""
    over: str = ""
    """Why the run ends."""
    news: str = ""
    """What is waited for."""


class Membership:
    """Decides which nodes train together."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.attempt = Attempt()
        self.change: Change = ""
        self._too_few_since: float | None = None
        self._arrived = 0
        self._last_arrival = 0.0

    def decide(self, here: Mapping[int, Presence], now: float, step: int | None = None) -> Decision:
        """Return what is to happen.

        Args:
            here: the nodes that have come, by node rank.
            now: by `time.monotonic`.
            step: the one that the attempt is in, None: before its first.
        """
        alive = {rank: node for rank, node in here.items() if node.silent_s < self.limits.lost_s}
        members = self.attempt.launchers
        lost = [
            rank
            for rank, launcher in members.items()
            if rank not in alive or alive[rank].launcher != launcher
        ]
        waiting = [
            rank
            for rank, node in alive.items()
            if members.get(rank) != node.launcher or node.after >= self.attempt.number
        ]
        busy = [rank for rank in members if rank not in lost and rank not in waiting]
        self._note_change(alive, lost, waiting, busy)
        if busy:
            late = f"waiting for {name_nodes(busy)}, whose ranks have not ended yet"
            return Decision(self.change, news=late if self.change else "")
        return self._begin(alive, sorted(waiting), lost, now, step)

    def _note_change(
        self,
        alive: Mapping[int, Presence],
        lost: Collection[int],
        waiting: Collection[int],
        busy: Collection[int],
    ) -> None:
        """Note whether the ranks that run are to end."""
        members = self.attempt.launchers
        ended = [alive[rank] for rank in waiting if rank in members and rank not in lost]
        if lost or any(node.cause for node in ended) or (ended and self.change != "join"):
            self.change = "broken"
        elif busy and not ended and self.limits.largest(len(busy) + len(waiting)) > len(members):
            self.change = "join"

    def _begin(
        self,
        alive: Mapping[int, Presence],
        waiting: Sequence[int],
        lost: Sequence[int],
        now: float,
        step: int | None,
    ) -> Decision:
        """Begin the next attempt, if enough nodes are there."""
        if len(waiting) != self._arrived:
            self._arrived, self._last_arrival = len(waiting), now
        number = self.limits.largest(len(waiting))
        if number == 0:
            return self._wait_for_more(waiting, now)
        self._too_few_since = None
        is_first = self.attempt.number == -1
        called_s = now - self._last_arrival
        if is_first and number < max(self.limits.usable) and called_s < self.limits.last_call_s:
            return Decision(news=f"waiting for more nodes: {self._count(waiting)}")
        is_restart = not is_first and self.change != "join"
        restarts = self.attempt.restarts + is_restart
        cause = self._find_cause(alive, lost, step)
        if restarts > self.limits.max_restarts:
            used_up = f"started again {self.limits.max_restarts} times, as often as allowed"
            return Decision(over=f"{cause}; the ranks have been {used_up}")
        launchers = {rank: alive[rank].launcher for rank in waiting[:number]}
        self.attempt = Attempt(
            self.attempt.number + 1, launchers, restarts, cause, bool(lost), is_restart
        )
        self.change, self._arrived = "", 0
        return Decision(attempt=self.attempt)

    def _wait_for_more(self, waiting: Sequence[int], now: float) -> Decision:
        if self._too_few_since is None:
            self._too_few_since = now
        if now - self._too_few_since > self.limits.timeout_s:
            waited = "comm.init_timeout_seconds have passed"
            return Decision(over=f"{waited}, and {self._count(waiting)}")
        return Decision(news=f"waiting for more nodes: {self._count(waiting)}")

    def _count(self, waiting: Sequence[int]) -> str:
        nodes = "1 node is" if len(waiting) == 1 else f"{len(waiting)} nodes are"
        return f"{nodes} there; the config can be shared by {self.limits.describe()}"

    def _find_cause(
        self, alive: Mapping[int, Presence], lost: Sequence[int], step: int | None
    ) -> str:
        """Return what has ended the attempt, or that a node has come."""
        if lost:
            where = "before the first step" if step is None else f"in step {step}"
            return f"{name_nodes(lost)} {'was' if len(lost) == 1 else 'were'} lost {where}"
        members = self.attempt.launchers
        told = [alive[rank] for rank in members if rank in alive and alive[rank].cause]
        if self.change != "join":
            unknown = "the ranks have ended" if members else ""
            return min(told, key=lambda node: node.is_guess).cause if told else unknown
        come = [rank for rank in sorted(alive) if rank not in members]
        if not come:
            return "a node had come, and left again"
        return f"{name_nodes(come)} {'has' if len(come) == 1 else 'have'} come"


def name_nodes(ranks: Sequence[int]) -> str:
    """Return "node 3" or "nodes 1, 2"."""
    return f"{'node' if len(ranks) == 1 else 'nodes'} {', '.join(map(str, ranks))}"
