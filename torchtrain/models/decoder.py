"""The protocol between a model and the techniques of `parallelisms/`, which import no one model.

A model states as data what a technique has to know of it: how tensor parallelism splits its
weights, which operations are worth saving, with which deviation a parameter starts. Where a
pipeline may cut it is data too, without torch: the layer names of `catalog.models.ModelShape`.

What a technique replaces is a module of its own: the attention kernels and `rope`.

Letters: B batch, S sequence, D model width, V vocabulary.
"""

from collections.abc import Callable, Container
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from torchtrain.catalog.models import ModelShape, find_family
from torchtrain.errors import UserError
from torchtrain.models.rotary import RotaryPositions
from torchtrain.utils import load_attribute

Role = Literal[
    "embedding", "norm", "columns", "rows", "logits", "head_norm", "shard_norm", "sparse", "whole"
]
"""How the tensor-parallel ranks split a module.

A norm stays whole; the column-wise weights that read it give each rank a share of the result;
row-wise weights take such shares, and their results are summed. Embedding and logits are split
over the vocabulary. A norm of heads sees those of the rank.

Of a sparse feed-forward each rank computes its shard of the sequence: the norm before it does not
gather, and the weights in it that are no expert's are whole.
"""

aten = torch.ops.aten


class Decoder(nn.Module):
    """A decoder-only language model: tokens [B, S] to logits [B, S, V] of the next token.

    Its forward takes `tokens` and, under document masking, `documents`, both [B, S].

    The layers are keyed by their number as text, so that a pipeline stage which keeps a few of
    them keeps their names. With tied embeddings `output.weight` is `tok_embeddings.weight`:
    `parameters()` and `named_parameters()` list it once, under the latter name; `state_dict()`
    has it under both.
    """

    tensor_parallel_plan: ClassVar[dict[str, Role]]
    """The role of each module with weights, by its name; "*" stands for any layer's number."""

    sparse_plan: ClassVar[dict[str, Role]] = {}
    """The same of a sparse layer's modules, where their role differs from a dense layer's."""

    matrix_products: ClassVar[frozenset[Any]] = frozenset(
        {
            aten.mm.default,
            aten.addmm.default,
            aten.bmm.default,
            aten._grouped_mm.default,
            aten._scaled_mm.default,
        }
    )
    """The operations that multiply with weights. Recomputation of chosen operations saves all of
    their results, or every second."""

    ops_worth_saving: ClassVar[frozenset[Any]] = frozenset(
        {
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            torch.ops.higher_order.flex_attention,
            torch.ops._c10d_functional.all_to_all_single.default,
        }
    )
    """The other operations that are slow for the size of their result: attention, and the exchanges
    of rows with other ranks' experts. Recomputation of chosen operations saves these results."""

    shape: ModelShape
    tok_embeddings: nn.Module
    rope: RotaryPositions
    """Gives the positions of the tokens their rotations."""
    layers: nn.ModuleDict
    norm: nn.Module
    output: nn.Module

    def initial_std(self, name: str) -> float | None:
        """Return the standard deviation of the initial values of the parameter of this full name.

        Their mean is 0. None: the parameter starts as ones.
        """
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> float:
        """Return the floating-point operations of forward and backward for one token.

        They are those of the whole model, whatever part of it this is.
        """
        raise NotImplementedError

    def replace_attention_kernels(self, replacement: Callable[[nn.Module], nn.Module]) -> None:
        """Put `replacement(kernel)` in the place of each attention kernel of the layers.

        A kernel takes q [B, H, S, C], k and v [B, K, S, C] and a mask or None to [B, H, S, C].
        It is the child `inner_attention` of the module that has the projections.
        """
        for module in self.layers.modules():
            kernel = getattr(module, "inner_attention", None)
            if kernel is not None:
                module.inner_attention = replacement(kernel)

    def keep(self, names: Container[str]) -> None:
        """Become the part of the model that has these layer names; the others become pass-throughs.

        Names of parameters stay those of the whole model. A part without the embedding takes
        [B, S, D] in place of tokens, one without the output returns [B, S, D].
        """
        for name in ("tok_embeddings", "norm", "output"):
            if name not in names:
                setattr(self, name, nn.Identity())
        for layer in list(self.layers):
            if f"layers.{layer}" not in names:
                del self.layers[layer]

    def keeps(self, name: str) -> bool:
        """Check whether this part has the embedding, the final norm or the output, by that name."""
        return not isinstance(self.get_submodule(name), nn.Identity)

    @property
    def has_both_ends_tied(self) -> bool:
        """Whether the embedding and the output are one parameter, and both in this part."""
        tied = self.shape.tied_embeddings
        return tied and self.keeps("tok_embeddings") and self.keeps("output")

    def tie(self) -> None:
        """Make a tied output's weight the embedding's again after that was replaced."""
        if self.has_both_ends_tied:
            self.output.weight = self.tok_embeddings.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":  # noqa: FBT001, FBT002
        """Keep the tie: leaving the meta device gives each module a new Parameter of its own."""
        super()._apply(fn, recurse)
        self.tie()
        return self


def load_decoder(family: str) -> type[Decoder]:
    """Import the class of a model family, as the catalog names it.

    Raises:
        UserError: there is no such family, or its class cannot be imported or is not a Decoder.
    """
    path = find_family(family).model
    found = load_attribute(path, f"model.name = {family!r}")
    if not isinstance(found, type) or not issubclass(found, Decoder):
        raise UserError(
            f"model.name = {family!r} is registered as {path!r}, which is not a class derived from "
            "torchtrain.models.decoder.Decoder"
        )
    return found
