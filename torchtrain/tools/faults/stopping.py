"""Signals that ask a run to stop: to all ranks or one, once or twice, in any call."""

import os
import signal
from functools import partial

from torchtrain.tools.faults import counting
from torchtrain.tools.faults.bench import Lost
from torchtrain.tools.faults.forked import own_rank
from torchtrain.tools.faults.trial import Trial

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def stop(trial: Trial) -> None:
    """Send a signal in any call of a function of the trainer: also while it saves or validates."""
    rng = trial.rng
    trial.was_stopped = True
    number = rng.choice(SIGNALS)
    sender = rng.randrange(2)
    first = trial.draw_up_to(trial.bench.calls[sender])
    calls = [first]
    if rng.random() < 0.3:
        calls.append(first + rng.randint(1, 1000))
    inject = partial(send, sender, calls, number, to_all=rng.random() < 0.5)
    ranks = trial.end(inject, {"checkpoint.async_mode": trial.draw_mode()})
    if ranks.statuses == [128 + number] * 2 and f"stopped by {number.name} after" in ranks.output:
        logged, saved = trial.last_logged_step(), trial.find_newest()
        if logged != saved:
            raise Lost(f"stopped after step {logged}, but the newest checkpoint is {saved}")


def send(sender: int, calls: list[int], number: signal.Signals, *, to_all: bool) -> None:
    """Have one rank send the signal at these calls, to itself or to all."""

    def act(call: int) -> None:
        if call in calls:
            if to_all:
                os.killpg(0, number)
            else:
                os.kill(os.getpid(), number)

    if own_rank() == sender:
        counting.at_calls(act)
