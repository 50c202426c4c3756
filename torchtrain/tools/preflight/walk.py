"""A step of one rank, walked through: what is held from when to when, and the worst moment."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise

from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.schedules import FULL_BACKWARD, _Action

from torchtrain.tools.preflight.activations import Trace
from torchtrain.tools.preflight.states import NO_WEIGHTS, Weights


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The bytes of a rank's tensors at its worst moment, by what they are for."""

    pipeline_rank: int
    moment: str
    """When that is."""
    cached: int = 0
    """Beside the tensors: free blocks that PyTorch's allocator keeps on an accelerator, for the
    streams of FSDP or for that of the computation."""
    parameters: int = 0
    """This rank's shards."""
    optimizer_states: int = 0
    """Of those."""
    gradients: int = 0
    """This rank's shards."""
    unsharded_gradients: int = 0
    """Whole, of a pipeline's stages, until their last microbatch."""
    gathered_parameters: int = 0
    """Whole, of the layers that are at work, or of a pipeline's stages."""
    gather_buffers: int = 0
    """What all-gathers receive into."""
    activations: int = 0
    """What the forwards of all live microbatches have kept for their backwards."""
    working: int = 0
    """What the layer at work takes beside that: gradients, and what is computed again."""
    logits_and_loss: int = 0
    """The logits, and what the loss takes beside them."""
    communication: int = 0
    """Buffers that reductions, and a pipeline's stages, send from and receive into."""
    inputs: int = 0
    """Tokens, labels and documents of a step."""

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by what they are for."""
        names = [each.name for each in fields(self)[3:]]
        return {name: vars(self)[name] for name in names}

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """The tensors, and the free blocks."""
        return self.total + self.cached


FSDP_STREAMS = ("gradients", "gather_buffers")
"""Parts that FSDP allocates on streams of their own, that of the reduce-scatter and that of the
copy before an all-gather. The allocator gives a block that is free only to the stream that it was
made for. (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py)"""


@dataclass(frozen=True)
class Layer:
    """The embedding, a block, or the final norm with the output."""

    name: str
    trace: Trace
    groups: tuple[Weights, ...]
    """As FSDP gathers them: those of a block's experts may be another group than the rest."""

    @cached_property
    def weights(self) -> Weights:
        """All of them."""
        return sum(self.groups, NO_WEIGHTS)

    @cached_property
    def largest_reduction(self) -> Weights:
        """The group with the largest reduce-scatter."""
        return max(self.groups, key=lambda group: group.reduce_buffer, default=NO_WEIGHTS)

    @property
    def first_gather(self) -> int:
        """The buffer of the group that is gathered first."""
        return self.groups[0].gather_buffer if self.groups else 0


@dataclass(frozen=True)
class Peak:
    """The most that a layer takes while it is at work."""

    moment: str
    parts: dict[str, int]
    """What lives then of the stage's microbatch, by parts."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Stage:
    """The layers of a pipeline stage; without a pipeline all of them."""

    layers: tuple[Layer, ...]
    shared: int
    """What the blocks of a forward share, the rotations and a mask."""
    loss: int
    """What the loss takes at most, with the logits; 0 where the output is in another stage."""
    output_sent: int = 0
    """Of a microbatch's output, what its way to another rank holds until all have passed."""
    gradient_sent: int = 0
    """The same of the gradient of its input."""

    @property
    def sent(self) -> int:
        """Both."""
        return self.output_sent + self.gradient_sent

    @property
    def has_loss(self) -> bool:
        """Whether the last of the layers is the output."""
        return self.loss > 0

    @cached_property
    def weights(self) -> Weights:
        """Those of all layers."""
        return sum((layer.weights for layer in self.layers), NO_WEIGHTS)

    @cached_property
    def largest_reduction(self) -> Weights:
        """The group with the largest reduce-scatter."""
        groups = [layer.largest_reduction for layer in self.layers]
        return max(groups, key=lambda group: group.reduce_buffer)

    @cached_property
    def kept(self) -> dict[str, int]:
        """What a forward keeps, by parts."""
        return self.saved(self.layers)

    @cached_property
    def forward_peaks(self) -> list["Peak"]:
        """The layers' forwards."""
        return [
            Peak(
                f"forward of {layer.name}",
                {**self.saved(self.layers[:index]), "working": layer.trace.forward},
            )
            for index, layer in enumerate(self.layers)
        ]

    @cached_property
    def backward_peaks(self) -> list["Peak"]:
        """The loss, and the layers' backwards."""
        peaks = [
            Peak(
                f"backward of {layer.name}",
                {
                    **self.saved(self.layers[: index + 1]),
                    "working": layer.trace.backward - layer.trace.saved,
                },
            )
            for index, layer in enumerate(self.layers)
        ]
        if self.has_loss:
            peaks.append(Peak("loss", {**self.kept, "logits_and_loss": self.loss}))
        return peaks

    def saved(self, layers: Iterable[Layer]) -> dict[str, int]:
        """Return what a forward of the first layers keeps, by parts."""
        kept = {"activations": self.shared, "logits_and_loss": 0}
        for layer in layers:
            kept[self.part_of(layer)] += layer.trace.saved
        return kept

    def is_freed(self, layer: Layer, resharding: "Resharding") -> bool:
        """Return whether the layer's weights are gathered again for the backward."""
        is_output = layer is self.layers[-1]
        return resharding.output if is_output else resharding.blocks

    def part_of(self, layer: Layer) -> str:
        """Return which part the layer's saved tensors belong to."""
        is_output = self.has_loss and layer is self.layers[-1]
        return "logits_and_loss" if is_output else "activations"


@dataclass
class Ledger:
    """What a rank holds, and the worst moment so far."""

    pipeline_rank: int
    held: Counter[str] = field(default_factory=Counter)
    worst: RankMemory | None = None
    most: Counter[str] = field(default_factory=Counter)
    """What each stream ever held, by the part that it is for; "" is that of the computation."""

    def hold(self, **parts: int) -> None:
        """Hold more, by parts."""
        self.held.update(parts)

    def free(self, **parts: int) -> None:
        """Hold less."""
        self.held.subtract(parts)

    def look(self, moment: str, **beside: int) -> None:
        """Compare a moment with the worst: what is held, and what lives then beside it."""
        parts = self.held + Counter(beside)
        streams = Counter({part: parts[part] for part in FSDP_STREAMS})
        streams[""] = parts.total() - streams.total()
        self.most |= streams
        if self.worst is None or parts.total() > self.worst.total:
            self.worst = RankMemory(pipeline_rank=self.pipeline_rank, moment=moment, **dict(parts))

    def reserve(self, size: int) -> None:
        """Take note that the computation's stream has blocks of so many bytes, free or in use."""
        self.most |= Counter({"": size})

    def close(self) -> RankMemory:
        """Return the worst moment, with what the allocator keeps beside it."""
        assert self.worst is not None, "no moment was looked at"
        return replace(self.worst, cached=self.most.total() - self.worst.total)


@dataclass(frozen=True)
class Resharding:
    """When FSDP frees gathered weights after a forward."""

    blocks: bool
    output: bool

    @classmethod
    def of(cls, option: str) -> "Resharding":
        """Return what `parallelism.fsdp_reshard_after_forward` says."""
        return cls(blocks=option != "never", output=option == "always")


@dataclass(frozen=True)
class Step:
    """The forward and the backward of a microbatch without a pipeline."""

    stage: Stage
    """All layers."""
    root: Weights
    """Tied weights, which are gathered for all layers."""
    resharding: Resharding
    accumulates: bool
    """Whether gradients of an earlier microbatch are there."""

    def walk(self, ledger: Ledger) -> None:
        """Walk through it; the ledger holds what lives all the time."""
        stage, root = self.stage, self.root
        for_all = {"gathered_parameters": root.gathered, "activations": stage.shared}
        ledger.hold(**for_all)
        if self.accumulates:
            ledger.hold(gradients=(root + stage.weights).parameters)
        self._walk_forward(ledger)
        ledger.look("loss", logits_and_loss=stage.loss - stage.layers[-1].trace.saved)
        reducing = 0
        coming = [*reversed(stage.layers[:-1]), None]
        for layer, following in zip(reversed(stage.layers), coming, strict=True):
            self._walk_back(ledger, layer, following, reducing)
            reducing = layer.largest_reduction.reduce_buffer
            if layer is stage.layers[-1]:
                ledger.hold(working=root.gradients)
        ledger.look(
            "reduction of the gradients of tied weights",
            communication=root.reduce_buffer,
            gradients=root.reduced,
        )
        ledger.free(communication=stage.weights.ends_held, working=root.gradients, **for_all)
        if not self.accumulates:
            ledger.hold(gradients=root.parameters)

    def _is_freed(self, layer: Layer) -> bool:
        return self.stage.is_freed(layer, self.resharding)

    def _walk_forward(self, ledger: Ledger) -> None:
        before = 0
        for layer in self.stage.layers:
            gathered, buffer = layer.weights.gathered, layer.weights.gather_buffer
            # FSDP frees a forward's buffer once the next one has been gathered.
            ledger.look(f"gathering for {layer.name}", gather_buffers=before + buffer)
            before = buffer
            ledger.look(
                f"forward of {layer.name}",
                gathered_parameters=gathered,
                gather_buffers=buffer,
                working=layer.trace.forward,
            )
            ledger.hold(**{self.stage.part_of(layer): layer.trace.saved})
            ledger.hold(gathered_parameters=0 if self._is_freed(layer) else gathered)

    def _walk_back(
        self, ledger: Ledger, layer: Layer, following: Layer | None, reducing: int
    ) -> None:
        """Walk through the backward of a layer and the reduction of its gradients.

        Args:
            ledger: holds what the layer has saved.
            layer: whose backward it is.
            following: the layer whose backward comes next, and whose weights are on their way.
            reducing: the buffer of the reduce-scatter before, which is still held.
        """
        weights, trace, largest = layer.weights, layer.trace, layer.largest_reduction
        gathers = following is not None and self._is_freed(following)
        coming = following.first_gather if following is not None and gathers else 0
        ledger.look(
            f"backward of {layer.name}",
            gathered_parameters=weights.gathered if self._is_freed(layer) else 0,
            gather_buffers=coming,
            communication=reducing,
            working=trace.backward - trace.saved,
        )
        ledger.free(**{self.stage.part_of(layer): trace.saved})
        ledger.free(gathered_parameters=0 if self._is_freed(layer) else weights.gathered)
        ledger.look(
            f"reduction of the gradients of {layer.name}",
            working=weights.gradients + trace.gradient,
            gather_buffers=coming,
            communication=largest.reduce_buffer,
            gradients=largest.reduced,
        )
        ledger.hold(gradients=0 if self.accumulates else weights.parameters)
        ledger.hold(communication=weights.ends_held)


def walk_pipeline(
    ledger: Ledger, stages: dict[int, Stage], actions: list[_Action], *, accumulates: bool
) -> None:
    """Walk through the forwards and backwards of all microbatches through a rank's stages.

    Args:
        ledger: holds what lives all the time.
        stages: of the rank, by number.
        actions: forwards and backwards in turn.
        accumulates: whether gradients of an earlier pass through the pipeline are there.
    """
    if accumulates:
        ledger.hold(gradients=sum(stage.weights.parameters for stage in stages.values()))
    passed = Counter(
        action.stage_index
        for action in actions
        if action.computation_type in (FULL_BACKWARD, schedules.BACKWARD_WEIGHT)
    )
    left = passed.copy()
    begun: set[int] = set()
    ledger.hold(gathered_parameters=sum(stage.weights.gathered for stage in stages.values()))
    buffers = [layer.weights.gather_buffer for stage in stages.values() for layer in stage.layers]
    two = max(first + second for first, second in pairwise([0, *buffers]))
    ledger.look("gathering for the stages", gather_buffers=two)
    for action in actions:
        number, kind = action.stage_index, action.computation_type
        stage = stages[number]
        if kind == schedules.FORWARD:
            highest = max(stage.forward_peaks, key=lambda peak: peak.total)
            ledger.look(f"{highest.moment}, stage {number}", **highest.parts)
            ledger.hold(**stage.kept)
            continue
        if kind != schedules.BACKWARD_WEIGHT:
            ledger.free(**stage.kept)
            highest = max(stage.backward_peaks, key=lambda peak: peak.total)
            ledger.look(f"{highest.moment}, stage {number}", **highest.parts)
            ledger.hold(**stage.kept, communication=stage.gradient_sent)
        if kind == schedules.BACKWARD_INPUT:
            continue  # all is kept for the weights' half
        ledger.free(**stage.kept)
        ledger.hold(communication=stage.output_sent)
        if number not in begun:
            begun.add(number)
            ledger.hold(unsharded_gradients=stage.weights.accumulated)
        left[number] -= 1
        if left[number] == 0:
            _reduce(ledger, stage, number)
            ledger.hold(gradients=0 if accumulates else stage.weights.parameters)
    sent = sum(stages[number].sent * count for number, count in passed.items())
    ledger.free(communication=sent)


def _reduce(ledger: Ledger, stage: Stage, number: int) -> None:
    """Reduce the gradients of a stage, which ends its step."""
    weights, largest = stage.weights, stage.largest_reduction
    ledger.look(
        f"reduction of the gradients of stage {number}",
        communication=largest.reduce_buffer,
        gradients=largest.reduced,
    )
    ledger.free(unsharded_gradients=weights.accumulated, gathered_parameters=weights.gathered)
