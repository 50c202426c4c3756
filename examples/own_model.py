"""A model of your own: a Llama whose feed-forward uses GELU instead of SiLU (GeGLU).

    ./run_llama_train.sh --experimental.custom_import examples/own_model.py \\
        --model.name geglu --model.flavor small

Every technique works as it is: the model inherits Llama's names, its tensor-parallel plan and its
initial deviations. A model with other modules states its own, see torchtrain/models/decoder.py.
"""

import torch.nn.functional as F
from torch import Tensor

from torchtrain.catalog.models import ModelShape, register_model
from torchtrain.models.llama import FeedForward, Transformer


class GeGLU(FeedForward):
    """GeGLU: w2(gelu(w1 x) · w3 x) (Shazeer 2020, arXiv:2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """Take x [B, S, D] to [B, S, D], with [B, S, F] between."""
        return self.w2(F.gelu(self.w1(x)) * self.w3(x))


class GeGLUTransformer(Transformer):
    """Llama with GeGLU in every block."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        for block in self.layers.values():
            block.feed_forward = GeGLU(shape.dim, shape.ffn_hidden_dim)


SMALL = ModelShape(
    dim=256,
    n_layers=6,
    n_heads=16,
    n_kv_heads=16,
    ffn_hidden_dim=768,
    vocab_size=0,  # the tokenizer's
)
register_model("geglu", {"small": SMALL}, "own_model:GeGLUTransformer")
