"""The meeting of a run's nodes, before any of them starts its ranks.

torchrun's own static rendezvous waits in silence, does not hear Ctrl-C, and knows nothing of a node
whose configuration was refused. So the launchers meet first, in the store that torchrun then uses:
node 0 serves it at MASTER_ADDR:MASTER_PORT, each node leaves a word in it (`READY` and its way to
node 0, or why it will not come), and each waits for the words of all others, saying so.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread

from torch.distributed import TCPStore

from torchtrain.errors import PeerFault, UserError
from torchtrain.tools.interfaces import ELSEWHERE, find_way
from torchtrain.tools.nodes import Nodes

READY = "ready at "
REFUSED = "was refused"  # its configuration has a fault, which it prints
STOPPED = "was stopped"

POLL_S = 0.2
ANNOUNCE_S = 10.0
"""How often a node says what it waits for."""
FAREWELL_S = 3.0
"""How long a node that will not come tries to tell the others."""
STORE_TIMEOUT_S = 30.0
"""How long what listens may take to answer as node 0's store: a node that is busy takes seconds."""
NAME_S = 30.0
"""How long node 0 waits until its name has an address: that of a Kubernetes pod may come late."""


@contextmanager
def all_nodes(nodes: Nodes, timeout_s: float) -> Iterator[list[str]]:
    """Wait until every node is here, and keep the store that they met in until the block ends.

    Yields the `find_way` of every node, for `choose_interface`.

    Raises:
        UserError: the port is taken, or node 0 cannot be reached where it should be.
        PeerFault: another node was refused or stopped, or did not come in time.
    """
    if not nodes.meet_here:
        if nodes.count > 1:
            print(f"waiting for {nodes.count} nodes", flush=True)
        yield [] if nodes.count == 1 else [ELSEWHERE] * nodes.count
        return
    waiting = Waiting(nodes.endpoint, deadline=time.monotonic() + timeout_s)
    store = serve(nodes) if nodes.rank == 0 else connect(nodes, waiting)
    try:
        store.set(_key(nodes.rank), READY + find_way(nodes))
        words = _wait_for_words(store, nodes, waiting)
    except BaseException as fault:
        with suppress(RuntimeError):
            if not isinstance(fault, PeerFault):
                store.set(_key(nodes.rank), STOPPED)
            if nodes.rank == 0:
                time.sleep(5 * POLL_S)  # the store ends with this process: let the others read it
        raise
    yield [word.removeprefix(READY) for word in words]
    del store


def tell_refused(nodes: Nodes) -> None:
    """Tell the nodes that wait already that this one's configuration was refused."""
    with suppress(UserError, PeerFault, RuntimeError):
        if nodes.rank == 0:
            store = serve(nodes)
            store.set(_key(0), REFUSED)
            time.sleep(FAREWELL_S)
        else:
            waiting = Waiting(nodes.endpoint, deadline=time.monotonic() + FAREWELL_S, silent=True)
            connect(nodes, waiting).set(_key(nodes.rank), REFUSED)


@dataclass
class Waiting:
    """How long a node waits, and when it last said so."""

    endpoint: str
    deadline: float
    silent: bool = False
    announced: str = ""
    announced_at: float = 0.0

    def turn(self, what: str, detail: str) -> None:
        """Wait a little longer for `what`; say so when that changes and every ANNOUNCE_S seconds.

        Raises:
            PeerFault: the deadline has passed.
        """
        now = time.monotonic()
        if now > self.deadline:
            raise PeerFault(
                f"{what} did not reach {self.endpoint} within comm.init_timeout_seconds: {detail}"
            )
        is_news = what != self.announced or now - self.announced_at >= ANNOUNCE_S
        if is_news and not self.silent:
            self.announced = what
            self.announced_at = now
            print(f"waiting for {what} at {self.endpoint}: {detail}", flush=True)
        time.sleep(POLL_S)


def _key(rank: int) -> str:
    return f"torchtrain/node-{rank}"


def serve(nodes: Nodes) -> TCPStore:
    """Open node 0's store."""
    require_free_port(nodes)
    _wait_for_address(nodes)
    try:
        return _open_store(nodes)
    except RuntimeError as error:
        raise UserError(
            f"MASTER_ADDR = {nodes.address!r}: node 0 cannot reach itself at {nodes.endpoint}. "
            "It must be the address of node 0 as all nodes see it."
        ) from error


def require_free_port(nodes: Nodes) -> None:
    """Check that node 0's store can be served on this node.

    Raises:
        UserError: it cannot, as where another program has the port.
    """
    try:
        socket.create_server(("", nodes.port)).close()
    except OSError as error:
        raise UserError(
            f"MASTER_PORT = {nodes.port}: {_reason(error)} on this node. "
            "Set another, the same on all nodes."
        ) from None


def _wait_for_address(nodes: Nodes) -> None:
    """Wait until node 0's name has an address, but not for ever: the name can be wrong."""
    deadline = time.monotonic() + NAME_S
    is_told = False
    while time.monotonic() < deadline:
        try:
            socket.getaddrinfo(nodes.address, nodes.port)
            return
        except OSError as error:
            if not is_told:
                print(f"waiting for an address of {nodes.address}: {_reason(error)}", flush=True)
            is_told = True
        time.sleep(POLL_S)


def _open_store(nodes: Nodes) -> TCPStore:
    return TCPStore(
        nodes.address,
        nodes.port,
        is_master=nodes.rank == 0,
        timeout=timedelta(seconds=STORE_TIMEOUT_S),
        wait_for_workers=False,
        multi_tenant=True,  # torchrun finds this server again by its port
    )


def connect(nodes: Nodes, waiting: Waiting) -> TCPStore:
    """Wait for node 0's store."""
    while True:
        try:
            # Not yet the store's own connection, which waits deaf to Ctrl-C.
            socket.create_connection((nodes.address, nodes.port), timeout=1).close()
            break
        except OSError as error:
            reason = _reason(error)
        waiting.turn("node 0", reason)
    stores: list[TCPStore] = []

    def open_store() -> None:
        with suppress(RuntimeError):
            stores.append(_open_store(nodes))

    # In a thread, since another program's silence would hold up the constructor for ever.
    thread = Thread(target=open_store, daemon=True)
    thread.start()
    thread.join(min(STORE_TIMEOUT_S, waiting.deadline - time.monotonic()))
    if not stores:
        raise UserError(f"{nodes.endpoint}: what listens there does not answer as node 0")
    return stores[0]


def _reason(error: OSError) -> str:
    """Return the system's words for an error of a socket, without Python's additions."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return error.strerror or str(error)


def _wait_for_words(store: TCPStore, nodes: Nodes, waiting: Waiting) -> list[str]:
    """Wait until every node is ready. Returns the words of all."""
    while True:
        words = {rank: _word(store, rank) for rank in range(nodes.count)}
        for rank, word in words.items():
            if word is not None and not word.startswith(READY):
                fault = PeerFault(f"node {rank} {word}; this node ends too")
                fault.is_user_error = word == REFUSED
                raise fault
        absent = [str(rank) for rank, word in words.items() if word is None]
        if not absent:
            return [word for word in words.values() if word is not None]
        noun = "node" if len(absent) == 1 else "nodes"
        waiting.turn(f"{len(absent)} {noun}", f"node rank {', '.join(absent)} of {nodes.count}")


def _word(store: TCPStore, rank: int) -> str | None:
    """Return what a node has said, None if nothing yet."""
    try:
        if not store.check([_key(rank)]):
            return None
        return store.get(_key(rank)).decode()
    except RuntimeError:
        raise PeerFault("node 0 has left; this node ends too") from None
