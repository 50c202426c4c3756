"""What PyTorch's allocator reserves for the stream of the computation: a step's tensors, one by
one.

The tensors come and go in the order in which the layers' traces have them, in blocks of an
allocator that has no memory. Between those that live, blocks stay free that are too small for what
comes next: they are reserved beyond the tensors. What FSDP allocates for streams of its own is not
here (`walk.FSDP_STREAMS`).
"""

from collections.abc import Iterable

from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.schedules import _Action

from torchtrain.tools.preflight.allocator import Block, Segment
from torchtrain.tools.preflight.states import Weights
from torchtrain.tools.preflight.walk import Layer, Resharding, Stage


class Heap:
    """The blocks of the computation's stream."""

    def __init__(self, held: Iterable[int]) -> None:
        """Begin with what is held all the time, in bytes."""
        self._segment = Segment()
        for size in held:
            self._segment.take(size)

    @property
    def reserved(self) -> int:
        """Bytes."""
        return self._segment.size

    def take(self, *sizes: int) -> list[Block]:
        """Take blocks of so many bytes."""
        return [self._segment.take(size) for size in sizes]

    def free(self, blocks: Iterable[Block]) -> None:
        """Free blocks."""
        for block in blocks:
            self._segment.free(block)

    def run_forward(self, layer: Layer) -> dict[int, Block]:
        """Run a layer forward, and return what it saves."""
        blocks: dict[int, Block] = {}
        self._segment.replay(layer.trace.forward_changes, blocks)
        return blocks

    def run_backward(self, layer: Layer, saved: dict[int, Block]) -> list[Block]:
        """Run a layer backward, free what was saved, and return the gradients."""
        self._segment.replay(layer.trace.backward_changes, saved)
        return list(saved.values())

    def run_half_backward(self, layer: Layer) -> None:
        """Run a layer backward, and keep what was saved for the weights' half."""
        blocks: dict[int, Block] = {}
        self._segment.replay(layer.trace.backward_changes, blocks)
        self.free(blocks.values())


def replay_step(heap: Heap, stage: Stage, root: Weights, resharding: Resharding) -> None:
    """Take a step of one microbatch without a pipeline."""
    for_all = [*heap.take(stage.shared), *heap.take(*root.each_gathered)]
    gathered: list[list[Block]] = []
    saved: list[dict[int, Block]] = []
    for layer in stage.layers:
        gathered.append(heap.take(*layer.weights.each_gathered))
        saved.append(heap.run_forward(layer))
        if stage.is_freed(layer, resharding):
            heap.free(gathered.pop())
            gathered.append([])
    reducing: list[Block] = []
    for layer in reversed(stage.layers):
        weights = gathered.pop() or heap.take(*layer.weights.each_gathered)
        gradients = heap.run_backward(layer, saved.pop())
        heap.free([*weights, *reducing])
        reducing = heap.take(layer.largest_reduction.reduce_buffer)
        heap.free(gradients)
    heap.free([*for_all, *reducing])


def replay_pipeline(heap: Heap, stages: dict[int, Stage], actions: list[_Action]) -> None:
    """Take a step of a pipeline rank.

    Args:
        heap: of the rank.
        stages: of the rank, by number.
        actions: forwards and backwards in turn.
    """
    for stage in stages.values():
        heap.take(*stage.weights.each_gathered)
    passes: dict[tuple[int, int | None], Pass] = {}
    accumulates: set[int] = set()
    for action in _until_steady(actions):
        number, kind = action.stage_index, action.computation_type
        stage = stages[number]
        key = number, action.microbatch_index
        if kind == schedules.FORWARD:
            passes[key] = Pass(heap, stage)
        elif kind == schedules.BACKWARD_INPUT:
            passes[key].run_half_backward()
        elif kind == schedules.BACKWARD_WEIGHT:
            passes.pop(key).end()
        else:
            passes.pop(key).run_backward()
        if kind != schedules.FORWARD and number not in accumulates:
            accumulates.add(number)
            for layer in stage.layers:
                heap.take(layer.weights.accumulated)


def _until_steady(actions: list[_Action]) -> list[_Action]:
    """Return the actions until most microbatches are under way, and as many more: those that follow
    find the same free blocks."""
    under_way = most = begun = 0
    for count, action in enumerate(actions, start=1):
        if action.computation_type == schedules.FORWARD:
            under_way += 1
        elif action.computation_type != schedules.BACKWARD_INPUT:
            under_way -= 1
        if under_way > most:
            most, begun = under_way, count
    return actions[: 2 * begun]


class Pass:
    """A microbatch's way through a pipeline's stage."""

    def __init__(self, heap: Heap, stage: Stage) -> None:
        """Run the forward."""
        self.heap = heap
        self.stage = stage
        self.shared = heap.take(stage.shared)
        self.saved = [heap.run_forward(layer) for layer in stage.layers]

    def run_backward(self) -> None:
        """Run the backward, which ends it."""
        for layer in reversed(self.stage.layers):
            self.heap.free(self.heap.run_backward(layer, self.saved.pop()))
        self.heap.take(self.stage.gradient_sent)
        self.end()

    def run_half_backward(self) -> None:
        """Run the backward, and keep all for the weights' half."""
        for layer in reversed(self.stage.layers):
            self.heap.run_half_backward(layer)
        self.heap.take(self.stage.gradient_sent)

    def end(self) -> None:
        """Free what is left, but for what is sent."""
        for saved in self.saved:
            self.heap.free(saved.values())
        self.heap.free(self.shared)
        self.heap.take(self.stage.output_sent)
