"""The meeting of nodes that may come and go: torchrun's rendezvous, for NNODES=MIN:MAX.

torchrun's own dynamic rendezvous takes every node that comes, whatever the config can be divided
over. In ours, node 0 decides (`Membership`). It serves the store at MASTER_ADDR:MASTER_PORT, in
which each node says that it is there and gives signs of life, and reads which nodes train together.
"""

import hashlib
import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import cast

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from torchtrain.attempts import CHANGE, STEP, of_attempt
from torchtrain.catalog.identity import MAY_DIFFER_PER_NODE
from torchtrain.config_manager import JobConfig
from torchtrain.errors import TRY_AGAIN, PeerFault, UserError
from torchtrain.tools.interfaces import choose_interface, find_way
from torchtrain.tools.meeting import Waiting, connect, serve
from torchtrain.tools.membership import Attempt, Change, Limits, Membership, Presence
from torchtrain.tools.nodes import Nodes

BACKEND = "torchtrain"
"""Name of this rendezvous among torchrun's."""
ROOM = "torchtrain/nodes"
"""Prefix of the keys by which nodes tell of themselves."""
POLL_S = 0.2
LOOK_S = 0.5
"""How often a node that trains looks whether others have come or gone."""
ANNOUNCE_S = 60.0
"""How often a node that waits says the same again."""
FAREWELL_S = 30.0
"""How long node 0, whose store ends with it, waits for the others to read why."""
STORE_TIMEOUT_S = 30.0
WAITS = "the other nodes train; this node waits until it is needed"
DONE = "the other nodes have ended the run: it is done"
# torchrun's names for what --rdzv-conf can set, and our defaults in seconds.
BEAT, BEATS, LAST_CALL = "keep_alive_interval", "keep_alive_max_attempt", "last_call_timeout"
DEFAULTS = {BEAT: 1, BEATS: 10, LAST_CALL: 30}


class RunOver(Exception):
    """The run has ended on another node; `status` is its exit status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class Silence:
    """For how long a node has given no sign of life."""

    last: tuple[str, str]
    seconds: float = 0.0


class ElasticMeeting(RendezvousHandler):
    """Where this node meets the others before each attempt.

    Args:
        nodes: as this one sees them.
        usable: the numbers of nodes that can share the config, ascending.
        max_restarts: MAX_RESTARTS.
        timeout_s: how long to wait for node 0, and node 0 for enough others.
        config: a digest of what must be the same on all nodes.
    """

    def __init__(
        self, nodes: Nodes, usable: list[int], max_restarts: int, timeout_s: float, config: str
    ) -> None:
        self.nodes = nodes
        self.attempt = Attempt()
        """The last one that this node has taken part in."""
        self.cause, self.is_guess = "", False
        """Of what its ranks have ended, and whether another node's may have ended before."""
        self._launcher = uuid.uuid4().hex
        self._usable, self._max_restarts, self._timeout_s = usable, max_restarts, timeout_s
        self._config = config
        self._membership: Membership | None = None
        self._silences: dict[int, Silence] = {}
        self._looked = time.monotonic()
        self._change: Change = ""
        self._news, self._said, self._said_at = "", "", 0.0
        self._has_joined = False
        self._left = Event()

    def join(self, parameters: RendezvousParameters) -> "ElasticMeeting":
        """Open node 0's store, and begin to give signs of life there.

        Raises:
            UserError: node 0's config is another, or this node is there already.
            PeerFault: node 0 does not come.
        """
        try:
            conf = [parameters.get_as_int(name, value) or 0 for name, value in DEFAULTS.items()]
        except ValueError as fault:
            raise UserError(f"RDZV_CONF: {fault}") from None
        for name, value in zip(DEFAULTS, conf, strict=True):
            if value < (name != LAST_CALL):
                raise UserError(f"RDZV_CONF: {name} = {value} is too small; the least is 1")
        beat_s, beats, last_call_s = map(float, conf)
        waiting = Waiting(self.nodes.endpoint, deadline=time.monotonic() + self._timeout_s)
        self._base = serve(self.nodes) if self.nodes.rank == 0 else connect(self.nodes, waiting)
        self._base.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
        self._store = PrefixStore(ROOM, self._base)
        with self._node_0_lives():
            if self.nodes.rank == 0:
                self._open(
                    Limits(
                        count=self.nodes.count,
                        usable=self._usable,
                        max_restarts=self._max_restarts,
                        lost_s=beat_s * beats,
                        last_call_s=last_call_s,
                        timeout_s=self._timeout_s,
                    )
                )
            self._check_place(beat_s * beats / 2)
            self._store.set(f"beat/{self.nodes.rank}", f"{self._launcher} 0")
        self._has_joined = True
        Thread(target=self._keep_alive, args=(beat_s,), daemon=True).start()
        return self

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the next attempt that this node takes part in.

        Raises:
            RunOver: there will be none.
            PeerFault: node 0 is lost.
        """
        with self._node_0_lives():
            number, way = self.attempt.number, find_way(self.nodes)
            presence = Presence(self._launcher, number, self.cause, self.is_guess, way)
            self._store.set(f"here/{self.nodes.rank}", json.dumps(asdict(presence)))
            while not self._is_called():
                self._raise_if_over()
                self._announce()
                time.sleep(POLL_S)
            choose_interface(self.nodes, self._find_ways(), os.environ)
        self.cause, self._change, self._said = "", "", ""
        return RendezvousInfo(
            PrefixStore(f"torchtrain/rendezvous-{self.attempt.number}", self._base),
            list(self.attempt.launchers).index(self.nodes.rank),
            len(self.attempt.launchers),
            RendezvousStoreInfo(self.nodes.address, self.nodes.port),
        )

    def num_nodes_waiting(self) -> int:
        """Return whether torchrun's agent is to start its ranks again, as the number of nodes."""
        if not self._change and time.monotonic() - self._looked > LOOK_S:
            self.find_change()
        return int(bool(self._change))

    def find_change(self) -> Change:
        """Return why the ranks of this attempt are to end, if they are.

        Raises:
            PeerFault: node 0 is lost.
        """
        with self._node_0_lives():
            self._decide()
            self._looked = time.monotonic()
            own = of_attempt(self._base, str(self.attempt.number))
            if own.check([CHANGE]):
                self._change = cast(Change, own.get(CHANGE).decode())
            elif self._find_newest().number > self.attempt.number:
                self._change = "broken"  # the others have taken this node for lost
        return self._change

    def leave(self, status: int) -> None:
        """Tell the others that this node ends, and with it the run, if it takes part in it."""
        self._left.set()
        rank = self.nodes.rank
        if not self._has_joined:
            return
        with suppress(RuntimeError):
            is_member = self._find_newest().launchers.get(rank) == self._launcher
            if is_member or rank == 0:
                status = status or int(not is_member)
                text = f"node {rank} {describe(status)}; this node ends too"
                text = text if status else DONE
                self._store.compare_set("over", "", json.dumps([status, text]))
            self._store.set(f"here/{rank}", "-")
            self._store.set(f"beat/{rank}", "-")
            deadline = time.monotonic() + FAREWELL_S
            while rank == 0 and self._has_others() and time.monotonic() < deadline:
                time.sleep(POLL_S)

    def get_backend(self) -> str:
        """Return the name of this rendezvous."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Say that the ranks meet in the same store."""
        return True

    def get_run_id(self) -> str:
        """Return what torchrun names the run by: it has one store."""
        return self.nodes.endpoint

    def is_closed(self) -> bool:
        """Return whether the run has ended on a node."""
        return bool(read(self._store, "over"))

    def set_closed(self) -> None:
        """Do nothing: see `leave`."""

    def shutdown(self) -> bool:
        """Do nothing: see `leave`."""
        return True

    def _open(self, limits: Limits) -> None:
        """Make what node 0 reads of the others, and say what they must share."""
        self._membership = Membership(limits)
        for rank in range(limits.count):
            for name in ("here", "beat"):
                self._store.compare_set(f"{name}/{rank}", "", "-")
        self._store.set("config", self._config)

    def _check_place(self, patience_s: float) -> None:
        """Check that this node belongs to the run, and is not there yet.

        A launcher that was killed a moment ago has left its signs of life, but gives no more.
        """
        rank = self.nodes.rank
        if self._store.get("config").decode() != self._config:
            raise UserError(
                f"the config or NGPU of node {rank} is not that of node 0; all nodes of a run need "
                "the same, since any of them can be lost"
            )
        before = read(self._store, f"beat/{rank}")
        deadline = time.monotonic() + patience_s
        while before not in ("", "-") and time.monotonic() < deadline:
            if read(self._store, f"beat/{rank}") != before:
                raise UserError(f"NODE_RANK = {rank}: this node takes part in the run already")
            time.sleep(POLL_S)

    def _keep_alive(self, beat_s: float) -> None:
        """Give signs of life over a connection of this thread's own."""
        address, port = self.nodes.address, self.nodes.port
        timeout = timedelta(seconds=STORE_TIMEOUT_S)
        count = 0
        while not self._left.wait(beat_s):
            with suppress(RuntimeError):  # another connection; that node 0 is lost, all find
                store = PrefixStore(ROOM, TCPStore(address, port, is_master=False, timeout=timeout))
                while not self._left.wait(beat_s):
                    count += 1
                    store.set(f"beat/{self.nodes.rank}", f"{self._launcher} {count}")

    def _is_called(self) -> bool:
        """Return whether an attempt has begun that this node takes part in."""
        self._decide()
        newest = self._find_newest()
        is_new = newest.number > self.attempt.number
        if not is_new or newest.launchers.get(self.nodes.rank) != self._launcher:
            self._news = read(self._store, "news")
            if newest.launchers and self._launcher not in newest.launchers.values():
                self._news = self._news or WAITS
            return False
        self.attempt = newest
        return True

    def _find_newest(self) -> Attempt:
        """Return the last attempt that has begun."""
        if not (text := read(self._store, "attempt")):
            return Attempt()
        values = json.loads(text)
        launchers = {int(rank): launcher for rank, launcher in values.pop("launchers").items()}
        return Attempt(launchers=launchers, **values)

    def _decide(self) -> None:
        """Decide what is to happen, on node 0, and tell the others."""
        if self._membership is None:
            return
        here = self._see()
        if self.is_closed():  # looked at last: who ends the run says so before it leaves
            return
        before, number = self._membership.change, str(self._membership.attempt.number)
        decision = self._membership.decide(here, time.monotonic(), self._find_step(number))
        if decision.change not in ("", before):
            of_attempt(self._base, number).set(CHANGE, decision.change)
        if decision.attempt is not None:
            self._store.set("attempt", json.dumps(asdict(decision.attempt)))
        if decision.over:
            self._store.compare_set("over", "", json.dumps([1, decision.over]))
        if decision.news != self._news:
            self._news = decision.news
            self._store.set("news", decision.news)

    def _see(self) -> dict[int, Presence]:
        """Return the nodes that have come and not left, as far as node 0 knows."""
        assert self._membership is not None
        limits = self._membership.limits
        keys = [f"{name}/{rank}" for name in ("here", "beat") for rank in range(limits.count)]
        values = [value.decode() for value in self._store.multi_get(keys)]
        # A launcher that was stopped itself for a while has not looked at the others meanwhile.
        passed_s = min(time.monotonic() - self._looked, limits.lost_s / 4)
        self._looked = time.monotonic()
        seen = {}
        for rank, pair in enumerate(
            zip(values[: limits.count], values[limits.count :], strict=True)
        ):
            silence = self._silences.get(rank)
            if silence is None or silence.last != pair:
                silence = self._silences[rank] = Silence(pair)
            else:
                silence.seconds += passed_s
            if pair[0] != "-":
                silent_s = 0.0 if rank == self.nodes.rank else silence.seconds
                seen[rank] = Presence(**json.loads(pair[0]) | {"silent_s": silent_s})
        return seen

    def _has_others(self) -> bool:
        """Return whether node 0 knows of another one that is not lost."""
        assert self._membership is not None
        others = [node for rank, node in self._see().items() if rank != self.nodes.rank]
        return any(node.silent_s < self._membership.limits.lost_s for node in others)

    def _find_ways(self) -> list[str]:
        """Return how each node of this attempt reaches node 0, but for one that has left since."""
        here = [read(self._store, f"here/{rank}") for rank in self.attempt.launchers]
        return [json.loads(text)["way"] for text in here if text != "-"]

    def _find_step(self, number: str) -> int | None:
        """Return the step that the attempt of this number is in, None: before its first."""
        if not self._base.check([STEP]):
            return None
        attempt, step = self._base.get(STEP).decode().split()
        return int(step) if attempt == number else None

    def _raise_if_over(self) -> None:
        if over := read(self._store, "over"):
            status, text = json.loads(over)
            raise RunOver(status, text)

    def _announce(self) -> None:
        """Say what is waited for when that changes, and every ANNOUNCE_S seconds."""
        is_due = time.monotonic() - self._said_at > ANNOUNCE_S
        if self._news and (self._news != self._said or is_due):
            self._said, self._said_at = self._news, time.monotonic()
            print(self._news, flush=True)

    @contextmanager
    def _node_0_lives(self) -> Iterator[None]:
        """Say what it means that the store does not answer."""
        try:
            yield
        except PeerFault:
            raise
        except RuntimeError:
            raise PeerFault(
                f"node 0, where the nodes meet ({self.nodes.endpoint}), is lost; this node ends too"
            ) from None


@contextmanager
def registered(meeting: ElasticMeeting) -> Iterator[Callable[[int], None]]:
    """Let torchrun find the meeting by the name BACKEND; yield how to leave it, with a status.

    A node that ends in another way leaves it too.
    """
    rendezvous_handler_registry.register(BACKEND, meeting.join)
    try:
        yield meeting.leave
    except BaseException:
        meeting.leave(1)
        raise


def digest_config(config: JobConfig, processes: int) -> str:
    """Return a digest of what must be the same on all nodes: the config and NGPU."""
    values = {
        f"{section}.{key}": value
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
        if f"{section}.{key}" not in MAY_DIFFER_PER_NODE
    }
    text = json.dumps([processes, values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def describe(status: int) -> str:
    """Return how a node has ended, by its exit status."""
    if status == TRY_AGAIN:
        return "was stopped at the end of its time"
    with suppress(ValueError):
        return f"was stopped by {signal.Signals(status - 128).name}"
    return f"has ended with exit status {status}"


def read(store: Store, key: str) -> str:
    """Return the value of a key, or nothing where it has none yet."""
    return store.get(key).decode() if store.check([key]) else ""
