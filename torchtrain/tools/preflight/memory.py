"""How much memory each rank of a run takes at its worst moment, and what for.

A step is walked through (`walk`): what lives from when to when is added up at each layer's forward,
backward and reduction of gradients, at the loss and at the optimizer's step. What a layer takes is
traced on the real model (`activations`), what its weights take follows from FSDP's groups
(`states`), the optimizer takes a step on fake weights (`optimizer_states`), and the microbatches of
a pipeline come and go in the schedule's own order (`live_microbatches`). What PyTorch's allocator
keeps beside is found by taking the step once more, tensor by tensor (`replay`).

Not in it: what is assumed to come on top (`verdict`), the device's context, and validation and text
samples, which need no backward. A router is taken to share its rows evenly. A compiled block is
taken for what it is without the compiler, which keeps less.
"""

from collections.abc import Iterable, Mapping

import torch

from torchtrain.catalog.schedules import stages_of
from torchtrain.config.plans import PipelinePlan, RunPlan, find_tokenizer, plan_run, plan_shape
from torchtrain.config.schema import Config
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.tools.preflight.activations import Traces, trace_layers
from torchtrain.tools.preflight.float8 import find_in_float8
from torchtrain.tools.preflight.live_microbatches import list_actions
from torchtrain.tools.preflight.optimizer_states import trace_optimizer
from torchtrain.tools.preflight.replay import Heap, replay_pipeline, replay_step
from torchtrain.tools.preflight.specimen import Request
from torchtrain.tools.preflight.states import NO_WEIGHTS, Weights, weigh
from torchtrain.tools.preflight.walk import (
    Layer,
    Ledger,
    RankMemory,
    Resharding,
    Stage,
    Step,
    walk_pipeline,
)

INTEGER = 8
"""Bytes of a token."""
STEPS = 2
"""That are replayed without a pipeline: the second begins with the free blocks of the first."""


def estimate_memory(config: Config, world_size: int, device_type: str = "cuda") -> list[RankMemory]:
    """Return what one rank of each pipeline stage takes, the one that has the most.

    The first call for a kind of layer takes some seconds, others milliseconds.

    Args:
        config: checked for so many ranks.
        world_size: number of ranks.
        device_type: of the computation.

    Raises:
        UserError: the vocabulary is the tokenizer's, and there is none.
    """
    plan = make_plan(config, world_size)
    request = Request.of(config, plan, device_type)
    traces = trace_layers(request)
    run = Run(config, plan, request, traces)
    return [run.walk(rank) for rank in range(plan.degrees.pp)]


def make_plan(config: Config, world_size: int) -> RunPlan:
    """Return the plan of the run; the tokenizer is opened where its size is the vocabulary's."""
    size = None
    if plan_shape(config.model).vocab_size == 0:
        size = load_tokenizer(find_tokenizer(config.model)).vocab_size
    return plan_run(config, world_size, tokenizer_size=size)


class Run:
    """What all ranks of a run have in common."""

    def __init__(self, config: Config, plan: RunPlan, request: Request, traces: Traces) -> None:
        self.config = config
        self.plan = plan
        self.request = request
        self.traces = traces
        self.optimizer = trace_optimizer(config.optimizer.model_dump_json())
        self.in_float8 = find_in_float8(config, plan.shape, plan.degrees.tp).names
        self.is_tied = plan.shape.tied_embeddings and plan.pipeline is None

    def walk(self, rank: int) -> RankMemory:
        """Walk through a step of a pipeline rank, and return its worst moment."""
        plan = self.plan
        schedule = self.config.parallelism.pipeline_parallel_schedule
        numbers = stages_of(rank, schedule, len(plan.stages), plan.degrees.pp)
        stages = {number: self.build_stage(number, numbers) for number in numbers}
        root = self.weigh_layer("tok_embeddings", "norm") if self.is_tied else NO_WEIGHTS
        weights = sum((stage.weights for stage in stages.values()), root)
        ledger = Ledger(rank)
        ledger.hold(parameters=weights.parameters, inputs=self.count_inputs())
        ledger.hold(optimizer_states=self.count_states(numbers))
        if plan.pipeline is not None:
            ledger.hold(communication=self.count_passed_on(plan.pipeline, numbers))
        heap = Heap(ledger.held.values())
        several = plan.batch.accumulation_steps > 1
        if plan.pipeline is None:
            reshard = Resharding.of(self.config.parallelism.fsdp_reshard_after_forward)
            Step(stages[0], root, reshard, several).walk(ledger)
            for _ in range(STEPS):
                replay_step(heap, stages[0], root, reshard)
        else:
            actions = list_actions(plan.pipeline, plan.degrees.pp)[rank]
            walk_pipeline(ledger, stages, actions, accumulates=several)
            replay_pipeline(heap, stages, actions)
        ledger.look("optimizer step", working=round(self.optimizer.temporary * weights.parameters))
        ledger.reserve(heap.reserved)
        return ledger.close()

    def build_stage(self, number: int, own: list[int]) -> Stage:
        """Return the layers of a stage, of which its rank may have others of its `own`."""
        names = self.plan.stages[number]
        layers = []
        if "tok_embeddings" in names:
            weights = () if self.is_tied else (self.weigh_layer("tok_embeddings"),)
            layers.append(Layer("the embedding", self.traces.embedding, weights))
        for name in names:
            if name.startswith("layers."):
                block = int(name.split(".")[1])
                trace = self.traces.blocks[self.request.kind_of(block)]
                layers.append(Layer(f"block {block}", trace, self.weigh_block(block)))
        if "output" in names:
            weights = () if self.is_tied else (self.weigh_layer("norm", "output"),)
            layers.append(Layer("the output", self.traces.output, weights))
        loss = self.traces.loss if "output" in names else 0
        sent = self.traces.passed_on if self.holds_sends() else 0
        return Stage(
            tuple(layers),
            self.traces.rotations,
            loss,
            output_sent=sent if number + 1 not in [*own, len(self.plan.stages)] else 0,
            gradient_sent=sent if number - 1 not in [*own, -1] else 0,
        )

    def holds_sends(self) -> bool:
        """Return whether the schedule keeps what it has sent until all microbatches have passed.

        PyTorch's wait then for all sends at once, and the handle of each holds its tensor; those of
        1F1B wait for each before the next (torch/distributed/pipelining/schedules.py).
        """
        return self.config.parallelism.pipeline_parallel_schedule != "1F1B"

    def weigh_layer(self, *modules: str) -> Weights:
        """Return what the weights of the embedding, the norm or the output take."""
        shapes = dict(self.traces.local_shapes)
        shapes.setdefault("output.weight", shapes["tok_embeddings.weight"])
        names = [f"{module}.weight" for module in modules]
        return self.weigh(shapes, names)

    def weigh(self, shapes: Mapping[str, torch.Size], names: Iterable[str]) -> Weights:
        """Return what the weights of these names take."""
        return weigh(shapes, names, self.plan.degrees, self.config.training, self.in_float8)

    def weigh_block(self, number: int) -> tuple[Weights, ...]:
        """Return what the groups of a block's weights take."""
        shapes = self.list_shapes(number)
        degrees = self.plan.degrees
        experts = [name for name in shapes if ".experts." in name]
        is_apart = degrees.ep > 1 or degrees.tp > 1
        if not experts or not is_apart:
            return (self.weigh(shapes, shapes),)
        rest = [name for name in shapes if name not in experts]
        return self.weigh(shapes, rest), self.weigh(shapes, experts)

    def list_shapes(self, number: int) -> dict[str, torch.Size]:
        """Return the shapes of a block's weights: those of the traced one of its kind."""
        traced = f"layers.{self.request.choose_blocks()[self.request.kind_of(number)]}."
        return {
            f"layers.{number}.{name.removeprefix(traced)}": shape
            for name, shape in self.traces.local_shapes.items()
            if name.startswith(traced)
        }

    def count_states(self, numbers: list[int]) -> int:
        """Return the bytes of the optimizer's states for the stages of these numbers."""
        total = 0.0
        for number in numbers:
            for layer in self.plan.stages[number]:
                for name, bytes_ in self.list_parameters(layer):
                    is_matrix = name.startswith("layers.") and "norm" not in name
                    total += bytes_ * (
                        self.optimizer.matrices if is_matrix else self.optimizer.others
                    )
        return round(total)

    def list_parameters(self, layer: str) -> list[tuple[str, int]]:
        """Return the weights that the optimizer updates in a layer, and their shards' bytes."""
        if layer == "output" and self.plan.shape.tied_embeddings:
            return []
        if layer.startswith("layers."):
            shapes = self.list_shapes(int(layer.split(".")[1]))
        else:
            shapes = {f"{layer}.weight": self.traces.local_shapes[f"{layer}.weight"]}
        return [(name, self.weigh(shapes, [name]).parameters) for name in shapes]

    def count_inputs(self) -> int:
        """Return the bytes of what a rank reads in a step: tokens and labels, and documents."""
        batch = self.plan.batch
        sequences = batch.accumulation_steps * batch.microbatch_size
        tensors = 3 if self.config.training.document_masking else 2
        return sequences * self.config.training.seq_len * INTEGER * tensors

    def count_passed_on(self, plan: PipelinePlan, numbers: list[int]) -> int:
        """Return the bytes of what a pipeline rank's stages receive into.

        PyTorch's stages have a buffer for each microbatch, of what comes from the stage before and
        of the gradient that comes from the one after.
        """
        neighbors = sum((number > 0) + (number < plan.stages - 1) for number in numbers)
        return plan.microbatches * self.traces.passed_on * neighbors
