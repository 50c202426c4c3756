"""Reading ahead: a thread reads the steps to come from streams, whose sources may be slow.

The ranks wait for each other's streams, and fail together where one of them does.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from torchtrain.datasets.token_stream import TokenStream
from torchtrain.errors import Stopped, UserError
from torchtrain.ranks import together

STEPS_AHEAD = 4
"""Steps that are read while the run computes: enough to bridge some seconds without a document."""

T = TypeVar("T")


@dataclass
class ReadAhead(Generic[T]):
    """Reads steps in order, and at most STEPS_AHEAD before they are taken.

    Nothing is read before the first step is asked for.
    """

    read: Callable[[int], T]
    """Reads a step from the streams."""
    streams: Sequence[TokenStream]
    """What it reads from."""
    stall_timeout_s: float
    """How long a stream may give no document."""

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ahead: deque[tuple[int, Future[T]]] = deque()

    def take(self, step: int) -> T:
        """Return `step`, once it has been read.

        Raises:
            UserError: whatever is wrong with a stream, or that one gives no document any more.
        """
        while not self.is_ready(step):
            pass
        _, result = self._ahead.popleft()
        return result.result()

    def wait_for_all(
        self,
        step: int,
        waiting: Callable[[], AbstractContextManager[None]],
        stop_reason: Callable[[], int],
    ) -> None:
        """Wait until every rank has read `step`. A collective call.

        A stream may be slow, or have many documents to skip where a run resumes. Meanwhile the
        ranks keep hearing from each other, so that none is taken for lost.

        Args:
            step: the next step.
            waiting: goes around the time that this rank waits for its own streams.
            stop_reason: why this rank is to stop, 0 if it is not. Where a rank is, all give up
                waiting; what they have read ahead does not count.

        Raises:
            UserError: whatever is wrong with a stream of this rank.
            PeerFault: or of another one.
            Stopped: a rank is to stop, and not all have read the step.
        """

        def is_ready() -> bool:
            with waiting():
                return self.is_ready(step)

        while True:
            news = torch.tensor([int(not together(is_ready)), stop_reason()])
            dist.all_reduce(news, op=dist.ReduceOp.MAX)
            one_is_waiting, reason = news.tolist()
            if not one_is_waiting:
                return
            if reason:
                raise Stopped(reason, step - 1)

    def is_ready(self, step: int) -> bool:
        """Return whether `step` has been read, after at most a second.

        Raises:
            UserError: whatever is wrong with a stream, or that one gives no document any more.
        """
        while len(self._ahead) <= STEPS_AHEAD:
            coming = step + len(self._ahead)
            self._ahead.append((coming, self._thread.submit(self.read, coming)))
        number, result = self._ahead[0]
        assert number == step, "streams are read step by step"
        wait([result], timeout=1.0)
        if result.done():
            result.result()  # raises what the reading raised
            return True
        self._check_stall()
        return False

    def _check_stall(self) -> None:
        slowest = min(self.streams, key=lambda stream: stream.waiting_since)
        if time.monotonic() - slowest.waiting_since >= self.stall_timeout_s:
            raise UserError(
                f"{slowest.name}: no document has come for {self.stall_timeout_s:.0f} s "
                "(data.stall_timeout_seconds allows no more)"
            )
