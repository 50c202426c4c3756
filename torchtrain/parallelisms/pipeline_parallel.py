"""Pipeline parallelism: each rank has some of the layers, and microbatches pass from rank to rank.

A *stage* is a run of consecutive layers of the model; a rank has one stage or several. The schedule
says in which order a rank takes forwards and backwards of which microbatch through which of its
stages. Gradients add up over a batch's microbatches before FSDP reduces them once.

Stages, schedules and what moves between ranks are PyTorch's, which run on every backend:
https://docs.pytorch.org/docs/stable/distributed.pipelining.html. GPipe: Huang et al. 2018
(arXiv:1811.06965); 1F1B and its interleaved form: Narayanan et al. 2021 (arXiv:2104.04473); zero
bubble: Qi et al. 2023 (arXiv:2401.10241) and 2024 (arXiv:2405.15362, the V); DualPipe: DeepSeek-V3
(arXiv:2412.19437).

Letters: B batch, S sequence, D model width, V vocabulary, L tokens of a sequence that this rank
holds between its blocks.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import FULL_BACKWARD, _Action, _PipelineScheduleRuntime

from torchtrain.catalog.schedules import stages_of
from torchtrain.config.plans import PipelinePlan, RunPlan
from torchtrain.models.decoder import Decoder
from torchtrain.models.rotary import RotaryPositions
from torchtrain.parallelisms.fsdp import find_fsdp_modules
from torchtrain.parallelisms.mesh import Mesh
from torchtrain.parallelisms.overlap import Lanes, let_lanes_take_turns, overlap_pairs
from torchtrain.shards import local


class StagePositions(RotaryPositions):
    """The rotations for a stage that is given [B, L, D] in place of tokens."""

    def __init__(self, rope: RotaryPositions, shards: int) -> None:
        """Take the first stage's rotations; its ranks are given `shards` times L tokens."""
        super().__init__(rope.shape)
        self.rope = rope
        self.shards = shards

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the rotations of as many positions as this rank would be given tokens."""
        length = tokens.shape[1] * self.shards
        return self.rope(tokens.new_empty(1, length), documents)


class Pipeline:
    """This rank's stages and the schedule that runs them.

    All ranks of the pipeline call its methods together.
    """

    def __init__(
        self,
        parts: dict[int, Decoder],
        plan: RunPlan,
        mesh: Mesh,
        device: torch.device,
        dtype: torch.dtype,
        sequence_losses: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Build the schedules of training and of evaluation.

        Args:
            parts: this rank's stages by their number, parallelized.
            plan: the same on all ranks; it has a pipeline.
            mesh: the ranks of the run.
            device: of the computation.
            dtype: of what passes from stage to stage, the compute precision.
            sequence_losses: logits [B, S, V] and labels [B, S] to the loss of each sequence, [B].
        """
        group = mesh.group("pp")
        assert group is not None
        assert plan.pipeline is not None
        assert plan.validation.pipeline is not None
        self.parts = parts
        self.plan = plan.pipeline
        self.group = group
        self.device = device
        self.dtype = dtype
        self.sequence_losses = sequence_losses
        self.of_logits = sequence_losses
        self.divisor = torch.ones((), device=device)
        self.losses: list[Tensor] = []
        self.lanes = Lanes(device) if self.plan.overlaps else None
        if self.lanes is not None:
            let_lanes_take_turns(parts.values(), self.lanes)
        self.schedule = self._build_schedule()
        # With stages of its own: buffers belong to a stage, and differ between the two.
        self.forward_only = self._build_forward_only(plan.validation.pipeline)
        self.one_by_one: dict[torch.Size, _PipelineScheduleRuntime] = {}
        self.tied = TiedOutput(parts, self.plan, self.group, device)

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
            [B], each sequence's loss (a sum over its labels) on ranks that have the last stage;
            zeros on the others.
        """
        self.divisor = valid
        self.of_logits = self.sequence_losses
        losses = self._pass(self.schedule.step, tokens, labels, documents)
        self.tied.hand_in_gradient()
        return losses

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, labels: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the losses as `forward_backward` does, of a batch of the evaluation's sizes.

        The schedule frees what it has gathered.
        """
        self.of_logits = self.sequence_losses
        return self._pass(self.forward_only.eval, tokens, labels, documents)

    @torch.no_grad()
    def compute(
        self, of_logits: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, labels: Tensor
    ) -> Tensor:
        """Return a function of logits and labels of sequences of any number and length.

        They pass through the pipeline one by one.

        Args:
            of_logits: logits [1, S, V] and labels [1, S] to a value, [1].
            tokens: [B, S], the same sizes on all ranks.
            labels: the same.

        Returns:
            [B] on ranks that have the last stage; zeros on the others.
        """
        schedule = self.one_by_one.get(tokens.shape)
        if schedule is None:
            sequences, length = tokens.shape
            shards = self.plan.seq_len // self.plan.activation_len
            plan = replace(
                self.plan,
                microbatches=sequences,
                microbatch_size=1,
                seq_len=length,
                activation_len=length // shards,
            )
            schedule = self._build_forward_only(plan)
            self.one_by_one[tokens.shape] = schedule
        self.of_logits = of_logits
        return self._pass(schedule.eval, tokens, labels, None)

    def _pass(
        self, run: Callable[..., object], tokens: Tensor, labels: Tensor, documents: Tensor | None
    ) -> Tensor:
        self.tied.take_weight()
        self.losses = []
        inputs = [tokens] if 0 in self.parts else []
        # PyTorch splits the documents like the tokens, and gives them to all stages.
        for_all_stages = {} if documents is None else {"documents": documents}
        run(*inputs, target=labels, return_outputs=False, **for_all_stages)
        if self.plan.stages - 1 in self.parts:
            return torch.cat(self.losses)
        return torch.zeros(len(tokens), device=self.device)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return a microbatch's loss for its backward; they reach the last stage in their order."""
        losses = self.of_logits(logits, labels)
        self.losses.append(losses.detach())
        return losses.sum() / self.divisor

    def _build_stages(self, plan: PipelinePlan) -> list[PipelineStage]:
        """Build the stages with the shapes that they exchange, so that nothing must run to tell."""
        size = plan.microbatch_size
        shape = next(iter(self.parts.values())).shape
        with torch.device("meta"):
            tokens = torch.empty(size, plan.seq_len, dtype=torch.int64)
            h = torch.empty(
                size, plan.activation_len, shape.dim, dtype=self.dtype, requires_grad=True
            )
            logits = h.new_empty(size, plan.seq_len, shape.vocab_size)
        stages: list[PipelineStage] = []
        for number, part in self.parts.items():
            stage = AccumulatingStage(
                part,
                number,
                plan.stages,
                self.device,
                input_args=tokens if number == 0 else h,
                output_args=logits if number == plan.stages - 1 else h,
                group=self.group,
            )
            stages.append(stage)
        return stages

    def _build_schedule(self) -> schedules.PipelineScheduleSingle | schedules.PipelineScheduleMulti:
        plan = self.plan
        schedule_class = schedules.get_schedule_class(plan.schedule)
        stages = self._build_stages(plan)
        takes_one = issubclass(schedule_class, schedules.PipelineScheduleSingle)
        # The loss is divided already: PyTorch is not to divide again by the number of microbatches.
        schedule = schedule_class(
            stages[0] if takes_one else stages,
            plan.microbatches,
            loss_fn=self._loss,
            scale_grads=False,
        )
        if plan.whole_backward:
            orders = {
                rank: merge_backwards(actions) for rank, actions in schedule.pipeline_order.items()
            }
            schedule = self._build_runtime(plan, orders)
        if self.lanes is not None:
            overlap_pairs(schedule, self.lanes)
        return schedule

    def _build_forward_only(self, plan: PipelinePlan) -> _PipelineScheduleRuntime:
        ranks = self.group.size()
        runtime = self._build_runtime(
            plan, {rank: list_in_turn(plan, rank, ranks) for rank in range(ranks)}
        )
        with_comms = runtime.pipeline_order_with_comms
        runtime.pipeline_order_with_comms = {
            rank: drop_backwards(actions) for rank, actions in with_comms.items()
        }
        return runtime

    def _build_runtime(
        self, plan: PipelinePlan, orders: dict[int, list[_Action | None]]
    ) -> _PipelineScheduleRuntime:
        """Build what runs `orders`, which say what each rank of the pipeline does in turn."""
        stages = self._build_stages(plan)
        runtime = _PipelineScheduleRuntime(
            stages, plan.microbatches, loss_fn=self._loss, scale_grads=False
        )
        runtime._prepare_schedule_with_comms(orders)
        return runtime


def list_in_turn(plan: PipelinePlan, rank: int, ranks: int) -> list[_Action | None]:
    """Return all microbatches forward through each stage of a rank in turn, then back.

    This order suits every cut and any batch.
    """
    stages = stages_of(rank, plan.schedule, plan.stages, ranks)
    microbatches = range(plan.microbatches)
    forwards = [_Action(stage, schedules.FORWARD, mb) for stage in stages for mb in microbatches]
    backwards = [
        _Action(stage, FULL_BACKWARD, mb) for stage in reversed(stages) for mb in microbatches
    ]
    return [*forwards, *backwards]


def drop_backwards(actions: list[_Action]) -> list[_Action]:
    """Return the actions without the backwards.

    (PyTorch's own evaluation cannot run the V-shaped schedules.)
    """
    backward = (FULL_BACKWARD, schedules.SEND_B, schedules.RECV_B, schedules.REDUCE_GRAD)
    return [action for action in actions if action.computation_type not in backward]


def merge_backwards(actions: list[_Action | None]) -> list[_Action | None]:
    """Return the actions with each backward whole where its first half was, and no second half.

    The halves are separate passes through autograd: a recomputed block would be computed again for
    each, or fail, and a compiled one has a single backward.
    """
    changed: list[_Action | None] = []
    for action in actions:
        if action is not None and action.computation_type == schedules.BACKWARD_INPUT:
            changed.append(action._replace(computation_type=FULL_BACKWARD))
        elif action is not None and action.computation_type != schedules.BACKWARD_WEIGHT:
            changed.append(action)
    return changed


class AccumulatingStage(PipelineStage):
    """A stage whose gradients add up in the reduction precision, also under a split backward.

    A whole backward ends in FSDP's hook, which moves a microbatch's gradient, in the compute
    precision, to the sum. The weights' half reaches no hook, and several in a row would be summed
    in bf16.
    """

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Leave out the V's turn, from a rank to itself, for which gloo has no connection.

        Torch 2.11 opens it like any other.
        """
        operations = super()._get_init_p2p_neighbors_ops()
        return [operation for operation in operations if operation.group_peer != self.group_rank]

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:  # noqa: FBT001, FBT002
        """Do as PyTorch does, and then what FSDP's hook does."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
        for module in find_fsdp_modules(self.submod):
            state = module._get_fsdp_state()
            has_several = hasattr(state, "_fsdp_param_groups")  # a module of torch 2.11 has one
            groups = state._fsdp_param_groups if has_several else [state._fsdp_param_group]
            for group in groups:
                for parameter in group.fsdp_params if group is not None else ():
                    parameter.accumulate_unsharded_grad_if_needed()
                    parameter.to_accumulated_grad_if_needed()


class TiedOutput:
    """The output of a model with tied embeddings, as a copy: the embedding is in another stage.

    The embedding is the parameter: it alone is updated, saved and counted. The copy takes its
    weight before a batch and hands in its gradient after it. Both stages shard the matrix alike, so
    each rank exchanges with the same-numbered rank of the other stage.
    """

    def __init__(
        self,
        parts: dict[int, Decoder],
        plan: PipelinePlan,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        tied = next(iter(parts.values())).shape.tied_embeddings
        first = parts.get(0) if tied else None
        last = parts.get(plan.stages - 1) if tied else None
        # The shards that the optimizer updates, kept from here: FSDP puts gathered parameters in
        # their place at times.
        self.embedding = None if first is None else first.tok_embeddings.get_parameter("weight")
        self.copy = None if last is None else last.output.get_parameter("weight")
        self.last_rank = plan.last_rank
        self.group = group
        self.device = device

    @torch.no_grad()
    def take_weight(self) -> None:
        """Make the copy what the embedding is."""
        received = self._move(self.embedding, self.copy, source=0, target=self.last_rank)
        if received is not None and self.copy is not None:
            local(self.copy).copy_(received)

    @torch.no_grad()
    def hand_in_gradient(self) -> None:
        """Add the copy's gradient to the embedding's, and forget it."""
        gradient = None if self.copy is None else self.copy.grad
        total = None if self.embedding is None else self.embedding.grad
        received = self._move(gradient, total, source=self.last_rank, target=0)
        if received is not None and total is not None:
            local(total).add_(received)
        if self.copy is not None:
            self.copy.grad = None

    def _move(
        self, given: Tensor | None, into: Tensor | None, *, source: int, target: int
    ) -> Tensor | None:
        """Send this rank's part of rank `source`'s tensor to rank `target`; return it there.

        It travels on the device, and is returned where the local part of `into` is.
        """
        part = None if given is None else local(given)
        place = None if into is None else local(into)
        if part is not None and place is not None and source == target:
            return part
        if part is not None and part.numel() > 0:
            peer = dist.get_global_rank(self.group, target)
            dist.send(part.to(self.device).contiguous(), peer, self.group)
        elif place is not None and place.numel() > 0:
            received = torch.empty_like(place, device=self.device)
            dist.recv(received, dist.get_global_rank(self.group, source), self.group)
            return received.to(place.device)
        return None
