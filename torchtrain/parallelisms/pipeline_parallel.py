"""Pipeline parallelism: each rank has some of the layers, and microbatches pass from rank to rank.

A *stage* is a run of consecutive pieces of the model; a rank has one stage or several. The schedule says in which order
a rank takes forwards and backwards of which microbatch through which of its stages. Gradients add up over a batch's
microbatches before FSDP reduces them once.

Stages, schedules and what moves between ranks are PyTorch's, which run on every backend:
https://docs.pytorch.org/docs/stable/distributed.pipelining.html. GPipe: Huang et al. 2018 (arXiv:1811.06965);
1F1B and its interleaved form: Narayanan et al. 2021 (arXiv:2104.04473); zero bubble: Qi et al. 2023 (arXiv:2401.10241)
and 2024 (arXiv:2405.15362, the V); DualPipe: DeepSeek-V3 (arXiv:2412.19437).

Letters: B batch, S sequence, D model width, V vocabulary, L what this rank holds of a sequence between its blocks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import FULL_BACKWARD, _Action, _PipelineScheduleRuntime

from torchtrain.catalog.models import ModelShape
from torchtrain.catalog.schedules import SCHEDULES, stages_of
from torchtrain.config.layout import check_batch, plan_stages
from torchtrain.config_manager import JobConfig
from torchtrain.errors import SharedUserError, UserError
from torchtrain.models.decoder import Decoder
from torchtrain.models.rotary import RotaryPositions
from torchtrain.parallelisms.fsdp import DTYPES, free_gathered, fsdp_modules
from torchtrain.parallelisms.mesh import ParallelDims


class StagePositions(RotaryPositions):
    """Rotations for a stage that is given [B, L, D] instead of tokens; L is but a part of what its attention sees."""

    def __init__(self, rope: RotaryPositions, sharing: int) -> None:
        """L is the `sharing`-th part of the tokens that a rank of the first stage is given."""
        super().__init__(rope.shape)
        self.rope = rope
        self.sharing = sharing

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """[B, L, D] to the rotations of as many positions as this rank would be given tokens."""
        return self.rope(tokens.new_empty(1, tokens.shape[1] * self.sharing), documents)


@dataclass(frozen=True)
class PipelinePlan:
    """How batches pass through the pipeline."""

    schedule: str
    """Its name, one of `pipeline_stages.SCHEDULES`."""
    stages: int
    """Of all ranks."""
    last_rank: int
    """Of the pipeline, the one that has the last stage: 0 in a V."""
    microbatches: int
    """In which a batch is cut."""
    microbatch_size: int
    """Sequences in each."""
    seq_len: int
    """Tokens that a rank is given of a sequence."""
    activation_shape: tuple[int, int]
    """(L, D) of what passes from stage to stage."""
    dtype: torch.dtype
    """Of the same: the compute precision."""
    whole_backward: bool
    """Compute the gradients of inputs and weights together even where the schedule splits them."""

    def describe(self) -> str:
        """In words, for the start-up line."""
        return (
            f"pipeline schedule {self.schedule}: {self.stages} stages, {self.microbatches} microbatches of "
            f"{self.microbatch_size}"
            + (", backwards whole (recomputation or compile)" if self.whole_backward else "")
        )


def plan_pipeline(
    shape: ModelShape, dims: ParallelDims, config: JobConfig, batch: int, seq_len: int
) -> PipelinePlan:
    """How batches of `batch` sequences of `seq_len` tokens pass through the pipeline."""
    parallelism, size = config.parallelism, config.parallelism.pipeline_parallel_microbatch_size
    schedule, stages = (
        parallelism.pipeline_parallel_schedule,
        len(plan_stages(parallelism, shape.layer_names)),
    )
    compiled = config.compile.enable and "model" in config.compile.components
    needs_whole = compiled or config.activation_checkpoint.mode != "none"
    mine = seq_len // dims.cp
    return PipelinePlan(
        schedule,
        stages,
        last_rank=next(
            rank
            for rank in range(dims.pp)
            if stages - 1 in stages_of(rank, schedule, stages, dims.pp)
        ),
        microbatches=batch // size,
        microbatch_size=size,
        seq_len=mine,
        activation_shape=(
            mine if parallelism.disable_sequence_parallel else mine // dims.tp,
            shape.dim,
        ),
        dtype=DTYPES[config.training.mixed_precision_param],
        whole_backward=SCHEDULES[schedule].splits_backward and needs_whole,
    )


class Pipeline:
    """This rank's stages and the schedule that runs them. All ranks of the pipeline call the methods together.

    Args:
        parts: this rank's stages by their number, as `models.llama.Transformer`s that keep their pieces, parallelized.
        mesh: has the dimension "pp".
        dims: of the mesh.
        config: the same on all ranks. Its validation may have batches of its own size.
        batch: sequences that pass together, the batch plan's `microbatch_size`.
        device: of the computation.
        sequence_losses: logits [B, S, V] and labels [B, S] to the loss of each sequence, [B].

    Raises:
        UserError: the schedule cannot run such a batch. The config check has refused what the config says of it, but
            not what a checkpoint does.
    """

    def __init__(
        self,
        parts: dict[int, Decoder],
        mesh: DeviceMesh,
        dims: ParallelDims,
        config: JobConfig,
        batch: int,
        device: torch.device,
        sequence_losses: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        training, validation, shape = (
            config.training,
            config.validation,
            next(iter(parts.values())).shape,
        )
        self.plan = plan = plan_pipeline(shape, dims, config, batch, training.seq_len)
        try:
            check_batch(config.parallelism, batch, plan.stages)
        except UserError as fault:
            raise SharedUserError(
                f"{fault}; with training.global_batch_size = -1 the global batch is the checkpoint's. Change "
                "parallelism.pipeline_parallel_microbatch_size, training.local_batch_size or the data-parallel degree"
            ) from None
        sizes = (validation.local_batch_size or batch, validation.seq_len or training.seq_len)
        evaluation = plan_pipeline(shape, dims, config, *sizes)
        self.parts, self.group, self.device = parts, mesh.get_group("pp"), device
        self.sequence_losses = sequence_losses
        self.divisor = torch.ones((), device=device)
        self.losses: list[Tensor] = []
        self.schedule = self._build_schedule()
        # Of its own stages: buffers belong to a stage, and differ between training and evaluation.
        turns = {rank: in_turn(evaluation, rank, dims.pp) for rank in range(dims.pp)}
        self.forward_only = self._runtime(evaluation, turns)
        orders = self.forward_only.pipeline_order_with_comms
        self.forward_only.pipeline_order_with_comms = {
            rank: forwards(actions) for rank, actions in orders.items()
        }
        self.tied = TiedOutput(parts, plan, self.group, device)

    def forward_backward(
        self, tokens: Tensor, labels: Tensor, valid: Tensor, documents: Tensor | None = None
    ) -> Tensor:
        """Add to the gradients those of the loss of these sequences, divided by `valid`.

        Args:
            tokens: [B, S], B as many as the plan's microbatches together.
            labels: the same.
            valid: 0-dim, what the sum of the token losses is divided by.
            documents: under document masking, those of the model's forward, [B, S].

        Returns:
            [B], each sequence's loss (a sum over its labels) on ranks that have the last stage; zeros on the others.
        """
        self.tied.take_weight()
        self.divisor = valid
        losses = self._pass(self.schedule.step, tokens, labels, documents)
        self.tied.hand_in_gradient()
        return losses

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, labels: Tensor, documents: Tensor | None = None) -> Tensor:
        """The losses alone, as `forward_backward` returns them, of a batch of the evaluation plan's sizes."""
        self.tied.take_weight()
        losses = self._pass(self.forward_only.eval, tokens, labels, documents)
        free_gathered(self.parts.values())
        return losses

    def _pass(
        self, run: Callable[..., object], tokens: Tensor, labels: Tensor, documents: Tensor | None
    ) -> Tensor:
        self.losses = []
        for_all_stages = (
            {} if documents is None else {"documents": documents}
        )  # PyTorch cuts it like the tokens
        run(
            *((tokens,) if 0 in self.parts else ()),
            target=labels,
            return_outputs=False,
            **for_all_stages,
        )
        has_last = self.plan.stages - 1 in self.parts
        return torch.cat(self.losses) if has_last else torch.zeros(len(tokens), device=self.device)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of a microbatch, for its backward; microbatches reach the last stage in their order."""
        losses = self.sequence_losses(logits, labels)
        self.losses.append(losses.detach())
        return losses.sum() / self.divisor

    def _stages(self, plan: PipelinePlan) -> list[PipelineStage]:
        """With the shapes of what they exchange, so that nothing has to run to find them out."""
        with torch.device("meta"):
            tokens = torch.empty(plan.microbatch_size, plan.seq_len, dtype=torch.int64)
            h = torch.empty(
                plan.microbatch_size, *plan.activation_shape, dtype=plan.dtype, requires_grad=True
            )
            logits = h.new_empty(
                plan.microbatch_size, plan.seq_len, self.parts[min(self.parts)].shape.vocab_size
            )
        stages: list[PipelineStage] = []
        for stage, part in self.parts.items():
            given, returned = h if stage > 0 else tokens, h if stage < plan.stages - 1 else logits
            stages.append(
                AccumulatingStage(
                    part, stage, plan.stages, self.device, given, returned, group=self.group
                )
            )
        return stages

    def _build_schedule(self) -> schedules.PipelineScheduleSingle | schedules.PipelineScheduleMulti:
        plan = self.plan
        schedule_class, stages = schedules.get_schedule_class(plan.schedule), self._stages(plan)
        # The loss is divided already: PyTorch is not to divide again by the number of microbatches.
        given = (
            stages[0] if issubclass(schedule_class, schedules.PipelineScheduleSingle) else stages
        )
        schedule = schedule_class(given, plan.microbatches, loss_fn=self._loss, scale_grads=False)
        if not plan.whole_backward:
            return schedule
        return self._runtime(
            plan, {rank: whole_backwards(order) for rank, order in schedule.pipeline_order.items()}
        )

    def _runtime(
        self, plan: PipelinePlan, orders: dict[int, list[_Action | None]]
    ) -> _PipelineScheduleRuntime:
        """`orders` say what each rank of the pipeline does in turn."""
        runtime = _PipelineScheduleRuntime(
            self._stages(plan), plan.microbatches, loss_fn=self._loss, scale_grads=False
        )
        runtime._prepare_schedule_with_comms(orders)
        return runtime


def steps_of(actions: Iterable[_Action | None]) -> list[_Action]:
    """The actions without waiting, and those that are two at once one after the other."""
    return [
        part
        for action in actions
        if action is not None
        for part in (action.sub_actions or (action,))
    ]


def in_turn(plan: PipelinePlan, rank: int, ranks: int) -> list[_Action | None]:
    """All microbatches forward through each stage of a rank in turn, then back: suits every cut and any batch."""
    stages = stages_of(rank, plan.schedule, plan.stages, ranks)
    return [
        _Action(stage, way, microbatch)
        for way, order in ((schedules.FORWARD, stages), (FULL_BACKWARD, stages[::-1]))
        for stage in order
        for microbatch in range(plan.microbatches)
    ]


def forwards(actions: list[_Action]) -> list[_Action]:
    """What is left without the backwards. (PyTorch's own evaluation cannot run the V-shaped schedules.)"""
    backward = (FULL_BACKWARD, schedules.SEND_B, schedules.RECV_B, schedules.REDUCE_GRAD)
    return [action for action in steps_of(actions) if action.computation_type not in backward]


def whole_backwards(actions: list[_Action | None]) -> list[_Action | None]:
    """Each backward whole where its first half was, and no second half.

    The halves are separate passes through autograd: a recomputed block would be computed again for each, or fail, and a
    compiled one has a single backward.
    """
    return [
        a._replace(computation_type=FULL_BACKWARD)
        if a.computation_type == schedules.BACKWARD_INPUT
        else a
        for a in steps_of(actions)
        if a.computation_type != schedules.BACKWARD_WEIGHT
    ]


class AccumulatingStage(PipelineStage):
    """A stage whose gradients add up in the reduction precision, also where the backward is split.

    A whole backward ends in FSDP's hook, which moves a microbatch's gradient, in the compute precision, to the sum.
    The weights' half reaches no hook, and several in a row would be summed in bf16.
    """

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Torch 2.11 opens the V's turn, from a rank to itself, like any other connection, and gloo has none there."""
        return [
            op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank
        ]

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """As PyTorch's, and then what FSDP's hook does."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
        for module in fsdp_modules(self.submod):
            state = module._get_fsdp_state()
            several = hasattr(state, "_fsdp_param_groups")  # a module of torch 2.11 has one
            for group in state._fsdp_param_groups if several else [state._fsdp_param_group]:
                for parameter in group.fsdp_params if group is not None else ():
                    parameter.accumulate_unsharded_grad_if_needed()
                    parameter.to_accumulated_grad_if_needed()


class TiedOutput:
    """The output of a model with tied embeddings, whose embedding is in another stage: a copy for the computation.

    The embedding is the parameter: it alone is updated, saved and counted. The copy takes its weight before a batch
    and hands in its gradient after it. Both stages cut the matrix alike, so a rank deals with its like in the other.
    """

    def __init__(
        self,
        parts: dict[int, Decoder],
        plan: PipelinePlan,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        tied = all(part.shape.tied_embeddings for part in parts.values())
        # The shards that the optimizer updates, kept from here: FSDP puts gathered parameters in their place at times.
        self.embedding = parts[0].tok_embeddings.weight if tied and 0 in parts else None
        self.copy = (
            parts[plan.stages - 1].output.weight if tied and plan.stages - 1 in parts else None
        )
        self.last_rank, self.group, self.device = plan.last_rank, group, device

    def take_weight(self) -> None:
        """Make the copy what the embedding is."""
        self._move(self.embedding, self.copy, 0, self.last_rank, Tensor.copy_)

    def hand_in_gradient(self) -> None:
        """Add the copy's gradient to the embedding's, and forget it."""
        gradient = None if self.copy is None else self.copy.grad
        total = None if self.embedding is None else self.embedding.grad
        self._move(gradient, total, self.last_rank, 0, Tensor.add_)
        if self.copy is not None:
            self.copy.grad = None

    @torch.no_grad()
    def _move(
        self,
        given: Tensor | None,
        taken: Tensor | None,
        source: int,
        target: int,
        put: Callable[..., Tensor],
    ) -> None:
        """Put this rank's part of what rank `source` has into that of rank `target`; travelling on the device."""
        mine, into = (None if x is None else x.to_local() for x in (given, taken))  # type: ignore[attr-defined]
        if mine is not None and into is not None and source == target:
            put(into, mine)
        elif mine is not None and mine.numel() > 0:
            dist.send(
                mine.to(self.device).contiguous(),
                dist.get_global_rank(self.group, target),
                self.group,
            )
        elif into is not None and into.numel() > 0:
            received = torch.empty_like(into, device=self.device)
            dist.recv(received, dist.get_global_rank(self.group, source), self.group)
            put(into, received.to(into.device))
