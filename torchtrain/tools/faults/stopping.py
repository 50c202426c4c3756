"""Signals that ask a run to stop: to all ranks or one, in any call, compiling, without data."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from torchtrain.tools.faults import counting
from torchtrain.tools.faults.bench import Lost
from torchtrain.tools.faults.forked import Inject, own_rank
from torchtrain.tools.faults.trial import Trial

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
COMPILED = {"compile.enable": True, "compile.backend": "aot_eager"}
"""Traced and split as for any backend, but without its compiler, which takes a minute."""
STREAMED = {"data.streaming": True, "validation.enable": False}
STALLED_S = 600.0


def stop(trial: Trial) -> None:
    """Send a signal in any call of a function of the trainer: also while it saves or validates."""
    rng = trial.rng
    number = rng.choice(SIGNALS)
    sender = rng.randrange(2)
    first = trial.draw_up_to(trial.bench.calls[sender])
    calls = [first]
    if rng.random() < 0.3:
        calls.append(first + rng.randint(1, 1000))
    end_stopped(trial, partial(send_at, sender, calls, number, to_all=rng.random() < 0.5), number)


def stop_compiling(trial: Trial) -> None:
    """Send a signal while a rank compiles: in its first step, or for a validation."""
    trial.task = COMPILED
    number = trial.rng.choice(SIGNALS)
    compilation, delay_s = trial.rng.randint(1, 4), trial.rng.uniform(0, 0.5)
    sender, to_all = trial.rng.randrange(2), trial.rng.random() < 0.5
    inject = partial(send_compiling, sender, compilation, delay_s, number, to_all=to_all)
    end_stopped(trial, inject, number)


def stop_stalled(trial: Trial) -> None:
    """Send a signal while the stream of one rank gives no document any more."""
    trial.task = STREAMED
    number = trial.rng.choice(SIGNALS)
    stalled, sample = trial.rng.randrange(2), trial.rng.randint(1, 30)
    sender, to_all = trial.rng.randrange(2), trial.rng.random() < 0.5
    flag = trial.folder / f"stalled-{trial.faults}"
    inject = partial(stall, flag, stalled, sample, sender, number, to_all=to_all)
    end_stopped(trial, inject, number)


def end_stopped(trial: Trial, inject: Inject, number: signal.Signals) -> None:
    """Run until a signal has ended all ranks; check that the last step logged is saved.

    Raises:
        Lost: it is not.
    """
    ranks = trial.end(inject, {"checkpoint.async_mode": trial.draw_mode()})
    if ranks.statuses == [128 + number] * 2 and f"stopped by {number.name} after" in ranks.output:
        logged, saved = trial.last_logged_step(), trial.find_newest()
        if logged != saved:
            raise Lost(f"stopped after step {logged}, but the newest checkpoint is {saved}")


def send(number: signal.Signals, *, to_all: bool) -> None:
    """Send a signal to this rank, or to all."""
    if to_all:
        os.killpg(0, number)
    else:
        os.kill(os.getpid(), number)


def send_at(sender: int, calls: list[int], number: signal.Signals, *, to_all: bool) -> None:
    """Have one rank send the signal at these calls, to itself or to all."""

    def act(call: int) -> None:
        if call in calls:
            send(number, to_all=to_all)

    if own_rank() == sender:
        counting.at_calls(act)


def send_compiling(
    sender: int, compilation: int, delay_s: float, number: signal.Signals, *, to_all: bool
) -> None:
    """Have one rank send the signal so long after a compilation has begun, if it gets so far."""
    from torch._dynamo.callback import on_compile_start

    begun = 0

    def begin(_: object) -> None:
        nonlocal begun
        begun += 1
        if begun == compilation:
            timer = threading.Timer(delay_s, send, (number,), {"to_all": to_all})
            timer.daemon = True
            timer.start()

    if own_rank() == sender:
        on_compile_start(begin)


def stall(
    flag: Path,
    stalled: int,
    sample: int,
    sender: int,
    signal_number: signal.Signals,
    *,
    to_all: bool,
) -> None:
    """Have the stream of one rank stand still at that sample, and then a rank send the signal.

    The `flag` is a file that is there from then on.
    """
    from torchtrain.datasets.token_stream import TokenStream

    read = TokenStream.read
    samples = 0

    def read_or_stall(self: TokenStream, number: int) -> Any:
        nonlocal samples
        samples += 1
        if samples == sample:
            flag.touch()
            time.sleep(STALLED_S)
        return read(self, number)

    def wait_and_send() -> None:
        while not flag.exists():
            time.sleep(0.05)
        time.sleep(1)  # until what was read ahead is used up
        send(signal_number, to_all=to_all)

    if own_rank() == stalled:
        TokenStream.read = read_or_stall  # type: ignore[assignment, method-assign]
    if own_rank() == sender:
        threading.Thread(target=wait_and_send, daemon=True).start()
