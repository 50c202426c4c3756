"""DualPipeV's overlap: a microbatch's forward and another's backward hide each other's exchanges.

Under expert parallelism a block's forward and backward wait for all-to-alls. DualPipeV pairs the
forward of one microbatch with the backward of another, so that each can compute while the other
waits (DeepSeek-V3, arXiv:2412.19437, section 3.2.1). The two run in two threads, but never at the
same time: a lane runs until it has issued an exchange, then it is the other lane's turn, and it
waits for the exchange only when it has the turn back:

    forward    route | issue ------------ wait | experts | issue ------------ wait | ...
    backward                 experts | issue ------------- wait | router | issue -------- ...

So the order in which a rank issues its collectives follows from the two programs alone, never from
timing, and all ranks issue the same order in one group. That holds for a backward that recomputes,
too, and repeats the forward's exchanges.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.pipelining import schedules

from torchtrain.parallelisms.expert_parallel import ExchangedDispatch

Lane = Literal["forward", "backward"]
OTHER: dict[Lane, Lane] = {"forward": "backward", "backward": "forward"}
Result = TypeVar("Result")


class LaneAborted(RuntimeError):
    """Ends a lane after the other one has failed."""


class Lanes:
    """Two threads that take turns: the caller's, and one more that lives as long as this object."""

    def __init__(self, device: torch.device) -> None:
        """Make both lanes compute on `device`."""

        def use_device() -> None:
            if device.type != "cpu":
                torch.get_device_module(device).set_device(device)

        self._worker = ThreadPoolExecutor(1, "backward", initializer=use_device)
        self._changed = threading.Condition()
        self._turn: Lane = "forward"
        self._running: set[Lane] = set()
        self._fault: BaseException | None = None

    def run(self, forward: Callable[[], Result], backward: Callable[[], object]) -> Result:
        """Run both, the forward first, and return its result when both have ended.

        Raises:
            BaseException: of the lane that failed first; the other one has been ended.
        """
        self._turn = "forward"
        self._running = {"forward", "backward"}
        self._fault = None
        results: list[Result] = []
        other = self._worker.submit(self._run_lane, "backward", backward)
        self._run_lane("forward", lambda: results.append(forward()))
        wait([other])
        if self._fault is not None:
            raise self._fault
        return results[0]

    def hand_over(self) -> None:
        """Let the other lane run until it hands over too; nothing where there is no other."""
        with self._changed:
            if len(self._running) < 2:
                return
            # Only the lane that has the turn runs, so it is the one that calls: autograd may have
            # moved it to a thread of its own, where no thread-local variable would tell.
            lane = self._turn
            self._turn = OTHER[lane]
            self._changed.notify_all()
            self._wait_for_turn(lane)

    def _wait_for_turn(self, lane: Lane) -> None:
        self._changed.wait_for(lambda: self._turn == lane)  # a lane that ends hands over
        if self._fault is not None:
            raise LaneAborted(f"the {OTHER[lane]} lane failed") from self._fault

    def _run_lane(self, lane: Lane, work: Callable[[], object]) -> None:
        fault = None
        try:
            with self._changed:
                self._wait_for_turn(lane)
            work()
        except BaseException as raised:
            fault = raised
        with self._changed:
            self._fault = self._fault or fault
            self._running.discard(lane)
            self._turn = OTHER[lane]
            self._changed.notify_all()


def let_lanes_take_turns(parts: Iterable[nn.Module], lanes: Lanes) -> None:
    """Let each lane hand over whenever an exchange of the experts' rows is under way."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, ExchangedDispatch):
                module.exchange.between = lanes.hand_over


def overlap_pairs(runtime: schedules._PipelineScheduleRuntime, lanes: Lanes) -> None:
    """Let the schedule run its pairs of a forward and a backward in the two lanes.

    What both need, and what PyTorch's runtime does around each of the two, is done before and
    after, in the caller's thread.
    """
    stages: dict[int, Any] = {stage.stage_index: stage for stage in runtime._stages}

    def run_pair(action: schedules._Action, ctx: Any) -> None:
        assert action.sub_actions is not None
        forward, backward = action.sub_actions
        entered, left = stages[forward.stage_index], stages[backward.stage_index]
        microbatch, earlier = forward.microbatch_index, backward.microbatch_index
        assert microbatch is not None
        assert earlier is not None
        runtime._assert_unsharded(entered)
        runtime._assert_unsharded(left)
        # Nothing to wait for where the neighboring stage is on this rank.
        for work in runtime.fwd_recv_ops.pop((entered.stage_index, microbatch), []):
            work.wait()
        for work in runtime.bwd_recv_ops.pop((left.stage_index, earlier), []):
            work.wait()
        loss = runtime._maybe_get_loss(left, earlier)
        runtime.backward_counter[left.stage_index] += 1
        is_last = runtime.backward_counter[left.stage_index] == runtime._n_microbatches

        output = lanes.run(
            forward=lambda: entered.forward_one_chunk(
                microbatch,
                ctx.arg_mbs[microbatch],
                ctx.kwarg_mbs[microbatch],
                save_forward_output=False,
            ),
            backward=lambda: left.backward_one_chunk(earlier, loss=loss, last_backward=is_last),
        )

        runtime._maybe_compute_loss(entered, output, ctx.target_mbs, microbatch)
        if entered.stage_index + 1 in stages:
            following = stages[entered.stage_index + 1]
            following.set_local_fwd_input(output, microbatch)
        if left.stage_index - 1 in stages:
            preceding = stages[left.stage_index - 1]
            preceding.set_local_bwd_input(left.get_local_bwd_output(earlier), earlier)

    runtime.register_custom_function(schedules.OVERLAP_F_B, run_pair)
