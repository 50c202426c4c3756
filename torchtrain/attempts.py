"""The attempts of one launch: torchrun starts all ranks again when one has died (--max-restarts).

What they tell each other, and the launcher, lies in torchrun's store, which outlives the ranks.
Without torchrun there is one attempt, and nothing to tell.
"""

import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import TypeVar

import torch.distributed as dist

from torchtrain.errors import PeerFault, UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import plural

T = TypeVar("T")

ATTEMPT = "TORCHTRAIN_ATTEMPT"
"""The environment variable that names an attempt, equal on all its nodes; the launcher sets it."""
ENDED = "torchtrain/ended"
"""Key of the exit status of an attempt that no other can mend: a user error, a stop, not finite."""
STEP = "torchtrain/step"
"""Key of the attempt that last began a step, and that step."""
HANG = "hang"
"""Key of the line that says who had not arrived, among those of one attempt."""
CHANGE = "change"
"""Key, among those of one attempt, that is set where nodes have come or gone: the launcher then
sends SIGTERM to its ranks, and no user."""
RESTART = "TORCHTRAIN_RESTART"
"""The environment variable by which the launcher names the start of an attempt."""
PATIENCE_S = 30.0
"""How long a rank waits for the others before it asks whether a store answers at all."""
ANSWER_S = 30.0
"""How long that may take: a store of many ranks is busy."""


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return the store in which the ranks of this attempt meet, this rank and the world size.

    Raises:
        UserError: MASTER_PORT is taken.
        PeerFault: the ranks did not meet, which is said; or an earlier attempt has ended for good,
            and torchrun started one more all the same (our launcher does not).
    """
    try:
        store, rank, world_size = _rendezvous(timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _explain(error) from error
    store.set_timeout(timeout)
    if store.check([ENDED]):
        status = int(store.get(ENDED))
        fault = PeerFault(f"an earlier attempt ended for good, with exit status {status}")
        fault.is_user_error = status == 2
        logger.warning(str(fault))
        raise fault
    # The addresses that ranks leave there for each other are those of the dead in the next attempt.
    return dist.PrefixStore(f"attempt-{name_attempt()}", store), rank, world_size


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Meet the others, in a thread, since PyTorch waits forever for a program that never answers.

    Raises:
        PeerFault: it has not answered in all that time. A node that stands still looks the same, so
            a further attempt may mend it.
    """
    others = _in_thread(lambda: next(dist.rendezvous("env://", timeout=timeout)))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = f"MASTER_ADDR:MASTER_PORT = {address}:{port}"
    is_told = False
    deadline = time.monotonic() + timeout.total_seconds() + PATIENCE_S  # PyTorch's own comes first
    while not futures.wait([others], PATIENCE_S).done:
        if time.monotonic() > deadline:
            logger.error(f"the ranks did not meet at {place}: what listens there never answered")
            raise PeerFault(f"the ranks did not meet at {address}:{port}")
        if not is_told and _is_silent(address, port) and not others.done():
            logger.error(
                f"{place}: what listens there does not answer. If it is another program, set a "
                "port that is free on that node, the same for all ranks"
            )
            is_told = True
    return others.result()


def _is_silent(address: str, port: int) -> bool:
    """Return whether connections are taken there, and no store answers."""
    try:
        socket.create_connection((address, port), timeout=ANSWER_S).close()
    except OSError:
        return False
    connect = partial(dist.TCPStore, address, port, is_master=False, wait_for_workers=False)
    probe = _in_thread(lambda: connect(timeout=timedelta(seconds=ANSWER_S)))
    return not futures.wait([probe], ANSWER_S).done


def _in_thread(action: Callable[[], T]) -> futures.Future[T]:
    """Do it in a thread that ends with the process at the latest."""
    result: futures.Future[T] = futures.Future()

    def act() -> None:
        try:
            result.set_result(action())
        except Exception as error:
            result.set_exception(error)

    Thread(target=act, daemon=True).start()
    return result


def _explain(error: RuntimeError) -> UserError | PeerFault:
    """Return the fault where the ranks did not meet; say what only this rank may know."""
    port = os.environ["MASTER_PORT"]
    if "EADDRINUSE" in str(error):
        return UserError(
            f"MASTER_PORT = {port}: address already in use on this node. Set another, the same for "
            "all ranks"
        )
    place = f"{os.environ['MASTER_ADDR']}:{port}"
    cause = str(error).splitlines()[0]
    logger.error(f"the ranks did not meet at MASTER_ADDR:MASTER_PORT = {place}: {cause}")
    return PeerFault(f"the ranks did not meet at {place}")


def find_store() -> dist.Store | None:
    """Return torchrun's store, that of the process group without its prefixes; None if none is."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not dist.is_initialized():
        return None
    return _without_prefixes(dist.distributed_c10d._get_default_store())


def connect_to_store(timeout: timedelta) -> dist.Store | None:
    """Return a connection to the process group's store for one thread; None if it has no server.

    A connection that another thread uses can be busy for as long as that waits for a key.
    """
    store = _without_prefixes(dist.distributed_c10d._get_default_store())
    if not isinstance(store, dist.TCPStore):
        return None
    connection = dist.TCPStore(store.host, store.port, is_master=False, timeout=timeout)
    return of_attempt(connection)


def of_attempt(store: dist.Store, name: str | None = None) -> dist.PrefixStore:
    """Return the part of a store in which the ranks of an attempt, by default this, tell of it."""
    return dist.PrefixStore(f"torchtrain/{name or name_attempt()}", store)


def _without_prefixes(store: dist.Store) -> dist.Store:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def name_attempt() -> str:
    """Return what tells this attempt from all others of its launch."""
    return os.environ.get(ATTEMPT, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def end_for_good(status: int) -> int:
    """Leave word that a further attempt would not mend how this one ends; return its status.

    SIGTERM is not for good where it came from the launcher, which starts all ranks again on other
    nodes. One from a user at the same moment is taken for it; to the launcher, it is not.
    """
    store = find_store()
    if store is not None:
        with suppress(RuntimeError):  # the launcher has gone already
            is_stop = status == 128 + signal.SIGTERM
            if not (is_stop and of_attempt(store).check([CHANGE])):
                store.set(ENDED, str(status))
    return status


def begin_step(step: int) -> None:
    """Leave word, from rank 0, of the step that this attempt is in."""
    if max_restarts() == 0 or dist.get_rank() != 0:
        return
    store = find_store()
    if store is not None:
        store.set(STEP, f"{name_attempt()} {step}")


def log_restart(done: int) -> None:
    """Say where a further attempt goes on: after step `done`, which its checkpoint holds."""
    store = find_store()
    if store is None or (restarts_so_far() == 0 and RESTART not in os.environ):
        return
    again = 0
    if store.check([STEP]):
        again = max(0, int(store.get(STEP).split()[1]) - 1 - done)
    where = f"goes on after step {done}" if done else "begins at step 1"
    name = os.environ.get(RESTART, f"restart {restarts_so_far()} of {max_restarts()}")
    logger.info(f"{name}: {where}; {plural(again, 'step')} taken again")


def restarts_so_far() -> int:
    """Return how often torchrun has started the ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def max_restarts() -> int:
    """Return how often torchrun may start the ranks again."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
