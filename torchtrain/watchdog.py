"""A thread of each rank that detects hangs, and writes down where the ranks are.

It enters no collective. What the ranks' threads tell each other goes through the store in which the
ranks have met, so that a rank that waits for nobody writes its stacks too.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

from torchtrain.attempts import HANG, begin_step, connect_to_store
from torchtrain.config.schema import Comm
from torchtrain.hangs import (
    HANG_FOLDER,
    Position,
    count_entered,
    describe_hang,
    find_place,
    write_collectives,
    write_stacks,
)
from torchtrain.logging_utils import logger
from torchtrain.parallelisms.mesh import Mesh
from torchtrain.ranks import set_timeout

SUSPICION = "suspicion"
"""Key of the name of the hang that is being looked into."""
LONGEST_MARGIN_S = 30.0


class Unchanged:
    """For how long a value has been the same when it was looked at."""

    def __init__(self) -> None:
        self.value: object = None
        self.seconds = 0.0

    def look(self, value: object, passed_s: float) -> float:
        """Return the seconds for which it has been this value, `passed_s` after the last look."""
        self.seconds = self.seconds + passed_s if value == self.value else 0.0
        self.value = value
        return self.seconds


class Watchdog:
    """Watches the loop of this rank, and whether the next rank gives signs of life.

    Where a rank waits for others, nothing must take longer than the timeout of a collective; before
    that is up, all ranks write their stacks. Where it waits for a disk it may take hours; there a
    rank whose thread is silent for so long ends the run.

    Args:
        comm: the config's section.
        run_folder: `job.dump_folder`.
        mesh: of the ranks.
        loop: the function whose progress is watched.
    """

    def __init__(self, comm: Comm, run_folder: Path, mesh: Mesh, loop: Callable[..., None]) -> None:
        self.comm = comm
        self.folder = run_folder / HANG_FOLDER
        # The stages of a pipeline send different numbers of messages, which gloo counts too.
        pipeline = mesh.group("pp")
        world = dist.distributed_c10d._get_default_group()
        self.counted = [world, *(group for group in mesh.all_groups() if group is not pipeline)]
        self.loop = loop.__code__
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.timeout_s: float = comm.init_timeout_seconds
        self.tick_s = margin_of(min(comm.init_timeout_seconds, comm.train_timeout_seconds)) / 8
        """From one look to the next."""
        self.step = 0
        self._is_first = True
        self._warm: set[str] = set()
        self._ended = threading.Event()
        self._thread = 0
        self._beats = 0
        self._own = Unchanged()
        self._next = Unchanged()
        self._answered = ""
        self._suspected: Position | None = None
        self._pause_s = 0.0
        self._longest_pause_s = 0.0  # that was no hang

    def begin_step(self, step: int) -> None:
        """Note that a step begins."""
        self.step = step
        begin_step(step)

    def end_step(self) -> None:
        """After the first step, which warms up, hold collectives to the timeout of training."""
        if self._is_first:
            self._is_first = False
            self._hold_to(self.comm.train_timeout_seconds)

    @contextmanager
    def warming_up(self, what: str) -> Iterator[None]:
        """Give `what` as much time as the first step, but only once. All ranks call it together.

        What a run does later for the first time, a forward without gradients above all, is compiled
        only then. (A validation that is made up for before the first step does not count.)
        """
        is_warm = self._is_first or what in self._warm
        self._warm.add(what)
        if not is_warm:
            self._hold_to(self.comm.init_timeout_seconds)
        yield
        if not is_warm:
            self._hold_to(self.comm.train_timeout_seconds)

    def _hold_to(self, seconds: int) -> None:
        """Set the timeout of collectives, and of what is watched here."""
        set_timeout(seconds)
        self.timeout_s = seconds

    @property
    def margin_s(self) -> float:
        """How long before the timeout a hang is looked into."""
        return margin_of(self.timeout_s)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the loop has ended. One rank alone waits for nobody."""
        if self.world_size == 1:
            yield
            return
        self._thread = threading.get_ident()
        watch = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        watch.start()
        try:
            yield
        finally:
            self._ended.set()
            watch.join(self.margin_s)

    def _watch(self) -> None:
        """Look every `tick_s`."""
        store: dist.Store | None = None
        looked = time.monotonic()
        while not self._ended.wait(self.tick_s):
            # A rank that was stopped itself, as by Ctrl-Z, has not looked at the others meanwhile.
            passed_s = min(time.monotonic() - looked, self.timeout_s / 4)
            looked = time.monotonic()
            try:
                store = store or connect_to_store(timedelta(seconds=self.margin_s))
                if store is None:
                    return
                self._look(store, passed_s)
            except RuntimeError:  # the store is busy or gone: another connection at the next look
                store = None
            except Exception as fault:  # a thread that ended would pass for a silent rank
                logger.warning(f"the watchdog could not look: {fault!r}")
        if store is not None:
            with suppress(RuntimeError):
                store.set(f"beat/{self.rank}", "ended")

    def _look(self, store: dist.Store, passed_s: float) -> None:
        """Give a sign of life, and see whether others do and this rank moves."""
        self._beats += 1
        store.set(f"beat/{self.rank}", str(self._beats))
        position = self._find_position()
        waited_s = self._own.look(position, passed_s)
        self._take_back(store, position, passed_s)
        suspicion = read(store, SUSPICION)
        silent_s = self._look_at_next(store, passed_s)
        limit_s = max(self.timeout_s - self.margin_s, (self._longest_pause_s + self.timeout_s) / 2)
        if suspicion and suspicion != self._answered:
            self._answer(store, suspicion, position, waited_s)
            self._write(write_collectives, suspicion)
        elif position.is_patient and silent_s >= self.timeout_s:
            if not self._suspect(store, position, silent_s):
                time.sleep(self.margin_s)  # another rank was first, and says it
            os._exit(1)  # the loop may wait for a disk, or for that rank, for hours
        elif not position.is_patient and waited_s >= limit_s and not suspicion:
            suspicion = self._suspect(store, position, waited_s) or read(store, SUSPICION)
            # Last, since a device that hangs may keep it waiting.
            self._write(write_collectives, suspicion)

    def _find_position(self) -> Position:
        place = find_place(self.loop, self._thread)
        return Position(step=self.step, place=place, entered=count_entered(self.counted))

    def _look_at_next(self, store: dist.Store, passed_s: float) -> float:
        """Return for how long the next rank has given no sign of life."""
        beat = read(store, f"beat/{(self.rank + 1) % self.world_size}")
        silent_s = self._next.look(beat, passed_s)
        return 0.0 if beat == "ended" else silent_s

    def _suspect(self, store: dist.Store, position: Position, waited_s: float) -> str:
        """Have all ranks write down where they are, and one of them say who had not arrived.

        Returns:
            The name of the hang where this rank is the one, else "".
        """
        mine = f"{position.step}-{uuid.uuid4().hex}"
        suspicion = store.compare_set(SUSPICION, "", mine).decode()
        self._answer(store, suspicion, position, waited_s)
        if suspicion != mine:
            return ""
        self._suspected, self._pause_s = position, waited_s
        self._say_who(store, mine, position, waited_s)
        return mine

    def _say_who(self, store: dist.Store, mine: str, position: Position, waited_s: float) -> None:
        """Wait a little for the ranks' answers, and say who had not arrived."""
        keys = [f"{mine}/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + self.margin_s / 2
        while time.monotonic() < deadline and not store.check(keys):
            time.sleep(self.tick_s / 2)
        answers = {rank: read(store, key) for rank, key in enumerate(keys)}
        positions = {
            rank: Position.model_validate_json(text) for rank, text in answers.items() if text
        }
        folder = self.folder / f"step-{position.step}"
        verdict = describe_hang(positions, self.world_size, position, waited_s, folder)
        store.set(HANG, verdict)  # the launcher says it again when the ranks have ended
        logger.error(verdict)

    def _answer(
        self, store: dist.Store, suspicion: str, position: Position, waited_s: float
    ) -> None:
        """Tell where this rank is, and write its stacks."""
        self._answered = suspicion
        store.set(f"{suspicion}/{self.rank}", position.model_dump_json())
        self._write(partial(write_stacks, position=position, waited_s=waited_s), suspicion)

    def _write(self, write: Callable[[Path], None], suspicion: str) -> None:
        """Write to the folder of the step that hangs, if the disk has room."""
        with suppress(OSError, RuntimeError):
            write(self.folder / f"step-{suspicion.partition('-')[0]}")

    def _take_back(self, store: dist.Store, position: Position, passed_s: float) -> None:
        """Say that it was no hang, where this rank had suspected one and has moved since.

        A rank that has moved to its end has entered no more collectives.
        """
        self._pause_s += passed_s
        before = self._suspected
        if before is None or (before.step, before.entered) == (position.step, position.entered):
            return
        logger.warning(f"false alarm: training has resumed after {before}")
        self._suspected = None
        self._longest_pause_s = max(self._longest_pause_s, self._pause_s)
        store.delete_key(HANG)
        store.delete_key(SUSPICION)


def margin_of(timeout_s: float) -> float:
    """Return how long before a timeout a hang is looked into."""
    return min(timeout_s / 4, LONGEST_MARGIN_S)


def read(store: dist.Store, key: str) -> str:
    """Return the value of a key, or nothing where it has none yet."""
    return store.get(key).decode() if store.check([key]) else ""
