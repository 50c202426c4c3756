"""torchrun's agent, which starts the ranks of a node, with judgment about starting them again.

torchrun starts all ranks again whenever one has failed, as often as --max-restarts allows. Ours
says why, and leaves it at the failure where a further attempt would end the same: after a user
error, a number that is not finite, a stop, or the third crash in a row at the same step.
"""

import math
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import api as processes_api
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.launcher import api

from torchtrain.attempts import ATTEMPT, ENDED, HANG, RESTART, STEP, of_attempt
from torchtrain.errors import TRY_AGAIN, PeerFault
from torchtrain.tools.elastic import ElasticMeeting
from torchtrain.tools.standby import Standbys

EXIT_BARRIER_S = 10.0
"""How long a node whose ranks are done waits for the others' to be, where nodes may come and go."""
SAME_STEP = 3
"""How many crashes in a row at the same step end the run."""
STORE_TIMEOUT_S = 5.0
GRACE_S = 5.0
"""How long the other ranks have to say what they died of, before all are started again."""
STOPPING_S = 30.0
"""How long the other ranks have to end after the first, where all were asked to stop."""
STANDBY_AFTER_S = 20.0
"""How long an attempt has run before the ranks of the next one make their imports beside it."""
POLL_S = 0.1
STOPPED_BY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


@dataclass
class Failure:
    """How the first rank of an attempt that failed ended; the others failed for want of it."""

    rank: int
    exit_code: int
    """As Python gives it: -n if signal n ended the rank."""
    timeout: str = ""
    """Which collective took too long, if NCCL's watchdog said so before it ended the rank."""

    @property
    def status(self) -> int:
        """The exit status that a shell would give."""
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code

    @property
    def is_stop(self) -> bool:
        return self.status in [TRY_AGAIN, *(128 + number for number in STOPPED_BY)]

    def __str__(self) -> str:
        if self.exit_code >= 0:
            return f"rank {self.rank} failed with exit status {self.exit_code}"
        try:
            name = signal.Signals(-self.exit_code).name
        except ValueError:
            name = f"signal {-self.exit_code}"
        if name == "SIGABRT" and self.timeout:
            return f"rank {self.rank} was ended by NCCL's watchdog ({name}): {self.timeout}"
        return f"rank {self.rank} was ended by {name}"


@dataclass
class Word:
    """What the ranks of an attempt have left in the store."""

    step: int | None = None
    """The one that it was in; None: before its first, or nobody knows."""
    ended_for_good: bool = False
    hang: str = ""
    """Who had not arrived, in words; empty: nobody was waited for in vain."""


@dataclass
class Outcome:
    """What became of the attempts of one launch, as far as this node knows."""

    failure: Failure | None = None
    """The last attempt's, if it failed."""
    steps: list[int | None] = field(default_factory=list)
    """In which step each attempt failed; None: before its first, or nobody knows."""
    hang: str = ""
    """The cause of the last failure, if it was that a rank was waited for in vain."""
    is_told: bool = False
    """Whether the last failure has been printed."""
    at_stop: dict[int, int | None] = field(default_factory=dict)
    """How each rank of this node has ended after it was asked to stop; None: it had not."""

    @property
    def is_repeated(self) -> bool:
        """Whether the last attempts have all failed in the same step."""
        last = self.steps[-SAME_STEP:]
        return len(last) == SAME_STEP and len(set(last)) == 1

    def report(self) -> int:
        """Return the exit status of a launch that failed; name the rank if it has not done so."""
        if self.failure is None:
            return 1
        if (self.failure.exit_code < 0 or self.hang) and not self.is_told:
            say(f"{self.hang or self.failure}; the others were stopped")
        return self.failure.status

    def find_status(self, number: int) -> int:
        """Return the exit status of a launch that signal `number` was to stop.

        A save is complete on all ranks or on none. So where one has ended as it was asked to,
        others failed for want of it; where none has, they could not save, and the status is that of
        the one that failed first.
        """
        failures = [Failure(rank, code) for rank, code in self.at_stop.items() if code]
        if not failures or any(each.is_stop or each.exit_code == -number for each in failures):
            return 128 + number
        first = min(failures, key=lambda failure: failure.exit_code >= 0)
        if first.exit_code < 0:
            say(f"{first} after the launch was asked to stop")
        return first.status

    @property
    def cause(self) -> str:
        """What ended the last attempt, and where."""
        step = self.steps[-1]
        where = "before the first step" if step is None else f"in step {step}"
        return self.hang or f"{self.failure} {where}"


class Handler(SubprocessHandler):
    """A rank's process: one that waits for that, or a new one."""

    def __init__(self, *args: Any, standbys: Standbys, **options: Any) -> None:
        self._standbys = standbys
        super().__init__(*args, **options)

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[bytes]:
        is_redirected = self._stdout is not None or self._stderr is not None
        if is_redirected:
            self._standbys.give_up()
        taken = self._standbys.take(list(args), env)
        if taken is not None:
            return taken
        if self._stderr is None:
            self._stderr = os.fdopen(os.dup(self._standbys.errors.sink), "w")
        return super()._popen(args, env)


class Agent(LocalElasticAgent):
    """torchrun's agent; `outcome` is told how each attempt failed."""

    def __init__(self, *args: Any, outcome: Outcome, standbys: Standbys, **options: Any) -> None:
        super().__init__(*args, **options)
        self._outcome = outcome
        self._standbys = standbys
        self._standbys_due = math.inf
        """When the ranks of the next attempt are to make their imports."""
        handler = self._worker_group.spec.rdzv_handler
        self._meeting = handler if isinstance(handler, ElasticMeeting) else None
        if self._meeting is not None:  # the others may be waiting for a node that came at the end
            self._exit_barrier_timeout = EXIT_BARRIER_S
        self._stopped: SignalException | None = None

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Do as torchrun does, but note first who has failed before torchrun ends the others."""
        if self._remaining_restarts > 0 and time.monotonic() > self._standbys_due:
            self._standbys.start()
        processes = self._processes(worker_group)
        failed_first = {rank for rank, process in processes.items() if process.poll()}
        word = self._ask_store(worker_group) if failed_first else Word()
        if failed_first and not word.ended_for_good and self._nodes_change():
            return RunResult(state=WorkerState.HEALTHY)  # torchrun then asks for it too
        may_restart = self._remaining_restarts > 0 and not word.ended_for_good
        if failed_first and (may_restart or word.hang):  # else they may have work to finish
            end_ranks(processes.values())
        result = super()._monitor_workers(worker_group)
        if result.is_failed() and result.failures:
            self._outcome.failure = find_first(result.failures, failed_first)
            self._standbys.errors.drain()
            timeouts = self._standbys.errors.timeouts
            self._outcome.failure.timeout = timeouts.get(self._outcome.failure.rank, "")
            word = word if failed_first else self._ask_store(worker_group)
            self._outcome.hang = word.hang
            if worker_group.spec.max_restarts > 0:
                self._judge(self._outcome.failure, word, worker_group.spec.max_restarts)
        return result

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, *args: Any, **options: Any
    ) -> None:
        """Pass the signal on to the ranks and wait for them, before torchrun ends what is left.

        torchrun would give them half a minute, which may be too short for the save at a stop. A
        Ctrl-C meanwhile ends all of them at once.
        """
        processes = list(self._processes(self._worker_group).values())
        number: signal.Signals | None = death_sig
        while number is not None:
            try:
                send(number, processes)
                wait_for_ranks(processes)
                number = None
            except SignalException as again:
                if again.sigval == signal.SIGINT:
                    self._note_ends()
                    send(signal.SIGKILL, processes)
                    raise
                number, self._stopped = again.sigval, again
        self._note_ends()
        super()._shutdown(death_sig, *args, **options)

    def _note_ends(self) -> None:
        """Note how the ranks have ended by themselves, before any of them is killed."""
        if not self._outcome.at_stop:
            ranks = self._processes(self._worker_group)
            self._outcome.at_stop = {rank: process.poll() for rank, process in ranks.items()}

    def _nodes_change(self) -> bool:
        """Return whether the ranks are to end since nodes have come or gone."""
        return self._meeting is not None and self._meeting.find_change() != ""

    def _stop_workers(self, worker_group: WorkerGroup, *args: Any, **options: Any) -> None:
        """End the ranks: after a save where a node has come, at once where others are lost."""
        if self._meeting is not None and self._nodes_change():
            if self._meeting.find_change() == "join":
                say("a node has come: the ranks save, and start again with it")
            else:
                end_ranks(self._processes(worker_group).values())
        super()._stop_workers(worker_group, *args, **options)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meet the other nodes, and name the attempt for the ranks."""
        if self._stopped is not None:  # while ranks were ended
            raise self._stopped
        self._outcome.at_stop = {}  # what is noted there is how the attempt before has ended
        self._standbys.errors.timeouts.clear()
        if self._meeting is None:
            super()._rendezvous(worker_group)
        else:
            self._meet_who_comes(worker_group, self._meeting)
        os.environ[ATTEMPT] = self._agree_on_name(worker_group)
        self._standbys_due = time.monotonic() + STANDBY_AFTER_S

    def _meet_who_comes(self, worker_group: WorkerGroup, meeting: ElasticMeeting) -> None:
        """Meet the nodes that are there, and say why there is a further attempt."""
        was_crash = bool(meeting.cause)
        while True:
            try:
                super()._rendezvous(worker_group)
                break
            except PeerFault:
                raise
            except RuntimeError:  # a node was lost between the decision and its first word
                continue
        attempt = meeting.attempt
        if was_crash and attempt.has_lost:
            self._outcome.steps.pop()  # that a node is lost is no fault of the step
        restarts = worker_group.spec.max_restarts
        self._remaining_restarts = restarts - attempt.restarts
        if attempt.number == 0:
            return
        on_nodes = f"on {len(attempt.launchers)} of {meeting.nodes.count} nodes"
        count = f"restart {attempt.restarts} of {restarts}"
        os.environ[RESTART] = count if attempt.is_restart else f"restart {on_nodes}"
        counted = f" ({count})" if attempt.is_restart else ""
        say(f"{attempt.cause}; all ranks are started again {on_nodes}{counted}")

    def _agree_on_name(self, worker_group: WorkerGroup) -> str:
        """Return a name for the attempt, the same on all nodes."""
        if self._meeting is not None:
            return str(self._meeting.attempt.number)
        spec = worker_group.spec
        if spec.rdzv_handler.get_backend() == "static":
            return str(spec.max_restarts - self._remaining_restarts)
        # A node that saw another one come back before its own ranks failed has not counted this
        # restart. But each round of such a rendezvous has a store of its own.
        store: Any = worker_group.store
        if worker_group.group_rank == 0:
            store.set(ATTEMPT, uuid.uuid4().hex)
        return store.get(ATTEMPT).decode()

    def _processes(self, worker_group: WorkerGroup) -> dict[int, subprocess.Popen[bytes]]:
        """Return the processes of this node's ranks."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return {
            worker_group.workers[local_rank].global_rank: handler.proc
            for local_rank, handler in handlers.items()
        }

    def _judge(self, failure: Failure, word: Word, restarts: int) -> None:
        """Say what happens next, and see to it that torchrun does so."""
        self._outcome.steps.append(word.step)
        what = self._outcome.cause
        self._outcome.is_told = not (word.ended_for_good or failure.status == 2 or failure.is_stop)
        if not self._outcome.is_told:
            self._remaining_restarts = 0  # the rank has said what it was
        elif self._outcome.is_repeated:
            self._remaining_restarts = 0
            say(f"{what}, the same step {SAME_STEP} times in a row: not started again")
        elif self._remaining_restarts == 0:
            say(f"{what}; the ranks have been started again {restarts} times, as often as allowed")
        elif self._meeting is not None:  # which knows more: a node may be lost
            self._meeting.cause = what
            self._meeting.is_guess = failure.exit_code >= 0 and not self._outcome.hang
        else:
            number = restarts - self._remaining_restarts + 1
            say(f"{what}; all ranks are started again (restart {number} of {restarts})")

    def _ask_store(self, worker_group: WorkerGroup) -> Word:
        """Return what the ranks of this attempt have left there."""
        word = Word()
        with suppress(RuntimeError):  # the store's node is gone
            store = TCPStore(
                str(worker_group.master_addr),
                int(worker_group.master_port or 0),
                is_master=False,
                timeout=timedelta(seconds=STORE_TIMEOUT_S),
            )
            word.ended_for_good = store.check([ENDED])
            if store.check([STEP]):
                attempt, number = store.get(STEP).decode().split()
                word.step = int(number) if attempt == os.environ[ATTEMPT] else None
            own = of_attempt(store)
            if own.check([HANG]):
                word.hang = own.get(HANG).decode()
        return word


def end_ranks(processes: Collection[subprocess.Popen[bytes]], grace_s: float = GRACE_S) -> None:
    """End the ranks that are left of an attempt: with SIGTERM, after `grace_s` with SIGKILL.

    torchrun would wait half a minute for a rank that does not hear SIGTERM, and one whose GPU waits
    for the rank that failed does not. Nothing is lost: a checkpoint needs all ranks.
    """
    deadline = time.monotonic() + grace_s
    for number in (signal.SIGTERM, signal.SIGKILL):
        send(number, processes)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


def send(number: int, processes: Collection[subprocess.Popen[bytes]]) -> None:
    """Send a signal to the ranks that run."""
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # it leads a session of its own


def wait_for_ranks(
    processes: Collection[subprocess.Popen[bytes]], grace_s: float = STOPPING_S
) -> None:
    """Wait until all ranks have ended, but not longer than `grace_s` after the first.

    One that hangs ends the others by their collectives' timeout, and so this wait.
    """
    deadline = math.inf
    while running := [process for process in processes if process.poll() is None]:
        if len(running) < len(processes):
            deadline = min(deadline, time.monotonic() + grace_s)
        if time.monotonic() > deadline:
            return
        time.sleep(POLL_S)


def use_agent(outcome: Outcome, standbys: Standbys) -> None:
    """Have torchrun start the ranks by an `Agent`, as processes that a `Handler` gives it.

    Its run() takes neither; it makes those that have these names.
    """
    agent = partial(Agent, outcome=outcome, standbys=standbys)
    api.LocalElasticAgent = agent  # type: ignore[assignment, misc]
    processes_api.get_subprocess_handler = partial(Handler, standbys=standbys)


def find_first(failures: dict[int, ProcessFailure], failed_first: set[int]) -> Failure:
    """Return the cause among the failures of one attempt.

    Of the ranks that failed before torchrun ended the others, one that was killed comes before
    those that failed for want of it. A rank that ends between torchrun's looks and ours is not in
    `failed_first`; then SIGTERM, which torchrun sends to the others, is the last to be the cause.
    """
    candidates = {rank: failures[rank] for rank in failures if rank in failed_first} or failures
    rank, failure = min(
        candidates.items(),
        key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].exitcode >= 0),
    )
    return Failure(rank, failure.exitcode)


def say(line: str) -> None:
    """Print a line of the launcher's."""
    print(line, file=sys.stderr, flush=True)
