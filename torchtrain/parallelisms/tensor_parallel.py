"""Tensor parallelism: ranks share each matrix product, and with it its weight.

Pairs of products need one exchange: the first weight is split by its outputs (whole heads,
feed-forward columns), so each rank continues with what it has; the second is split by its inputs,
and its partial results are summed (Shoeybi et al. 2019, arXiv:1909.08053). Sequence parallelism
(Korthikanti et al. 2022, arXiv:2205.05198) splits that sum in two: it leaves each rank a shard of
the sequence, on which the norms work, and the norm's result is gathered before the next product.
It moves as many bytes and keeps 1/R of the activations between the products. Loss parallelism
never gathers the logits, the largest tensor there is: the softmax's maximum and sum are reduced
instead.

What each module does is the model's own statement, `Decoder.tensor_parallel_plan`; the styles are
those of https://docs.pytorch.org/docs/stable/distributed.tensor.parallel.html, which run on every
backend.

Letters: B batch, S sequence, D model width, V vocabulary, R ranks of the tensor-parallel mesh.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel import loss_parallel as vocabulary_sharded_loss
from torch.distributed.tensor.placement_types import Placement

from torchtrain.config.schema import Parallelism
from torchtrain.errors import SharedUserError
from torchtrain.models.decoder import Decoder, Role


def apply_tensor_parallel(model: Decoder, tp_mesh: DeviceMesh, parallelism: Parallelism) -> None:
    """Split the model's weights over the mesh and let its modules exchange what they must.

    All parameters become DTensors on this mesh, the norms' too, so that FSDP lays every one of
    them on one and the same mesh, and the optimizer can update them together. Between blocks run
    plain tensors: [B, S / R, D] with sequence parallelism, else [B, S, D]. The rotations stay
    plain and whole, since attention sees the whole sequence.

    Args:
        model: on the meta device, before FSDP; changed in place. R must divide the query and the
            key/value heads and the feed-forward width, and with sequence parallelism the sequence
            it will be given; the config check has seen to that.
        tp_mesh: of one dimension.
        parallelism: says whether the activations between the products are sharded over S (sequence
            parallelism); whether the logits are a DTensor [B, S, V] sharded over V, for a loss
            inside `loss_context` (loss parallelism), or plain and whole on each rank; and whether
            the compiler is to split the products and overlap them with their exchange (async).

    Raises:
        UserError: a vocabulary too small for R ranks; async without CUDA.
    """
    _check_vocabulary(model.shape.vocab_size, tp_mesh.size())
    if parallelism.enable_async_tensor_parallel:
        _enable_async(tp_mesh)
    between: Placement = Replicate() if parallelism.disable_sequence_parallel else Shard(1)
    styles: dict[Role, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "norm": NormThenGather(between),
        "columns": ColwiseParallel(),
        "rows": RowwiseParallel(output_layouts=between),
        "logits": ColwiseParallel(use_local_output=False),
        "head_norm": WholeWeight(Shard(2)),
        "shard_norm": WholeWeight(between),
        "sparse": ShardOfTokens(between),
        "whole": WholeWeight(Shard(0)),
    }
    plan = {name: styles[role] for name, role in find_roles(model).items()}
    parallelize_module(model, tp_mesh, plan)
    model.tie()
    if model.keeps("tok_embeddings"):
        # The sum is still under way when the style returns. A compiled block cannot take such a
        # tensor, and waiting for it by hand loses its gradient; an operation on it waits, and
        # keeps it.
        model.tok_embeddings.register_forward_hook(lambda module, inputs, h: h * 1.0)
    if model.keeps("output") and parallelism.disable_loss_parallel:
        # Copied, since what comes out of a DTensor is a view, and FSDP warns of views in outputs.
        model.output.register_forward_hook(
            lambda module, inputs, logits: logits.full_tensor().clone()
        )


def find_roles(model: Decoder) -> dict[str, Role]:
    """Return the role of each module of this part of the model, by its name."""
    here = dict(model.named_modules())
    roles: dict[str, Role] = {}
    for pattern, role in model.tensor_parallel_plan.items():
        if "*" not in pattern and model.keeps(pattern):
            roles[pattern] = role
    for layer in model.layers:
        plan = model.tensor_parallel_plan
        if model.shape.is_sparse(int(layer)):
            plan = plan | model.sparse_plan
        for pattern, role in plan.items():
            name = pattern.replace("*", layer)
            if "*" in pattern and name in here:
                roles[name] = role
    return roles


def loss_context(*, vocabulary_sharded: bool) -> AbstractContextManager[None]:
    """Return the context for the loss and its backward; it changes nothing for whole logits."""
    return vocabulary_sharded_loss() if vocabulary_sharded else nullcontext()


class WholeWeight(ParallelStyle):
    """A module with its whole weight on every rank, on the rank's shard of what it reads.

    From the rank's plain tensor to a plain tensor. The weight's gradient, which sees a shard alone,
    is a partial sum that FSDP reduces over this mesh before its own.
    """

    def __init__(self, layout: Placement) -> None:
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # torch's annotation of the two functions does not say that their results are used.
        wrap: Any = self._wrap
        hand_on: Any = self._hand_on
        return distribute_module(module, device_mesh, input_fn=wrap, output_fn=hand_on)

    def _wrap(self, module: nn.Module, inputs: tuple[Tensor], mesh: DeviceMesh) -> DTensor:
        return DTensor.from_local(inputs[0], mesh, [self.layout], run_check=False)

    def _hand_on(self, module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        return output.to_local()


class NormThenGather(WholeWeight):
    """A norm with its whole weight on every rank, on the rank's shard of the sequence; then all.

    The result is a DTensor [B, S, D], the same on all ranks: gathered once, and in the backward
    summed and scattered once, for all products that read it.
    """

    def _hand_on(self, module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        return output.redistribute(mesh, [Replicate()])


class ShardOfTokens(ParallelStyle):
    """A module that computes the rank's shard of the sequence, whatever lies around it.

    Without sequence parallelism the rank takes its shard of what it has whole, and gathers the
    results.
    """

    def __init__(self, layout: Placement) -> None:
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def convert(x: Tensor, given: Placement, wanted: Placement) -> Tensor:
            whole = DTensor.from_local(x, device_mesh, [given], run_check=False)
            return whole.redistribute(device_mesh, [wanted]).to_local()

        def take(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            return convert(inputs[0], self.layout, Shard(1))

        def give(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return convert(output, Shard(1), self.layout)

        module.register_forward_pre_hook(take)
        module.register_forward_hook(give)
        return module


def _check_vocabulary(vocab_size: int, ranks: int) -> None:
    """Check that every rank has a share of the vocabulary.

    Shares may be uneven, FSDP's too; an empty one would hang the loss.
    """
    rows = -(-vocab_size // ranks)
    if rows * (ranks - 1) >= vocab_size:
        raise SharedUserError(
            f"a vocabulary of {vocab_size} split into shares of {rows} leaves ranks without any: "
            f"lower parallelism.tensor_parallel_degree = {ranks}, or pad with "
            f"model.vocab_size = {rows * ranks}"
        )


def _enable_async(mesh: DeviceMesh) -> None:
    """Have Inductor split each product next to a collective, and copy through symmetric memory."""
    if mesh.device_type != "cuda":
        raise SharedUserError(
            "parallelism.enable_async_tensor_parallel needs CUDA (it copies between the GPUs of a "
            f"node by symmetric memory), and this run is on {mesh.device_type}: leave it out, the "
            "results are the same without"
        )
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    with warnings.catch_warnings():
        # Called deprecated, yet without it Inductor silently leaves the collectives as they are,
        # up to torch 2.13 at least: https://github.com/pytorch/pytorch/issues/193027
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)
