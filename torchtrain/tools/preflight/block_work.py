"""What one rank has to compute, to move and to exchange for a block, counted from the shape.

Letters: T tokens that a rank is given at once, D model width, H query heads, K key/value heads,
C head width, F feed-forward width, V vocabulary, E experts, k experts per token, N rows (T · k).
"""

from dataclasses import dataclass
from functools import cached_property

from torchtrain.catalog.models import ModelShape
from torchtrain.config.layout import Degrees
from torchtrain.config.schema import Config
from torchtrain.dtypes import DTYPES
from torchtrain.tools.preflight.links import Exchange

FP32 = 4
TILE = 128
"""Rows to which a grouped product fills up each expert's."""


@dataclass(frozen=True)
class Product:
    """A matrix product [rows, inner] @ [inner, columns]; its backward is two of the same size."""

    rows: float
    inner: float
    columns: float

    @property
    def flops(self) -> float:
        """Floating-point operations of the forward."""
        return 2.0 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Unit:
    """The sequences that pass through a rank's blocks at once, and how ranks share them."""

    shape: ModelShape
    degrees: Degrees
    sequence_shards: int
    """As in `RunPlan`."""
    sequences: int
    seq_len: int
    compute_bytes: int
    """Of an element of activations and of gathered weights."""
    rotates: bool
    """Whether keys and values travel from rank to rank under context parallelism."""
    ulysses: bool
    balanced: bool
    """Whether causal work is spread evenly over context-parallel ranks."""
    loss_parallel: bool

    @classmethod
    def of(cls, config: Config, shape: ModelShape, degrees: Degrees, sequences: int) -> "Unit":
        """Describe what a rank of a run computes at once."""
        parallelism = config.parallelism
        return cls(
            shape=shape,
            degrees=degrees,
            sequence_shards=1 if parallelism.disable_sequence_parallel else degrees.tp,
            sequences=sequences,
            seq_len=config.training.seq_len,
            compute_bytes=DTYPES[config.training.mixed_precision_param].itemsize,
            rotates=parallelism.context_parallel_rotate_method == "alltoall",
            ulysses=parallelism.context_parallel_method == "ulysses",
            balanced=parallelism.context_parallel_load_balancer == "headtail",
            loss_parallel=not parallelism.disable_loss_parallel,
        )

    @cached_property
    def tokens(self) -> float:
        """Tokens T of this rank."""
        return self.sequences * self.seq_len / self.degrees.cp

    @property
    def hidden_bytes(self) -> float:
        """Bytes of the residual stream of all tokens, [T, D]."""
        return self.tokens * self.shape.dim * self.compute_bytes

    @property
    def query_elements(self) -> float:
        """Elements of the queries of all tokens, [T, H, C], as many as of attention's result."""
        shape = self.shape
        return self.tokens * shape.n_heads * shape.width_per_head / self.degrees.tp

    @property
    def row_bytes(self) -> float:
        """Bytes of the rows [N, D] that a rank sends to experts, those of its share of tokens."""
        return self.hidden_bytes / self.degrees.tp * self.shape.experts_per_token

    def list_products(self, *, sparse: bool) -> list[Product]:
        """Return the matrix products of a block on one rank."""
        shape, tp, tokens = self.shape, self.degrees.tp, self.tokens
        q_width = shape.n_heads * shape.width_per_head / tp
        kv_width = shape.n_kv_heads * shape.width_per_head / tp
        products = [
            Product(tokens, shape.dim, q_width),
            Product(tokens, shape.dim, kv_width),
            Product(tokens, shape.dim, kv_width),
            Product(tokens, q_width, shape.dim),
        ]
        if not sparse:
            width = shape.ffn_hidden_dim / tp
            return [*products, *feed_forward(tokens, shape.dim, width)]
        own = tokens / tp  # a rank computes its share of the tokens, with whole experts
        products.append(Product(own, shape.dim, shape.n_experts))
        products += feed_forward(own * shape.experts_per_token, shape.dim, shape.width_per_expert)
        if shape.n_shared_experts:
            width = shape.n_shared_experts * shape.width_per_expert
            products += feed_forward(own, shape.dim, width)
        return products

    def output_product(self) -> Product:
        """Return the product that makes the logits."""
        return Product(self.tokens, self.shape.dim, self.shape.vocab_size / self.degrees.tp)

    @property
    def filling(self) -> float:
        """How many rows grouped products compute for each that there is: experts' fill up tiles."""
        shape, degrees = self.shape, self.degrees
        rows = self.tokens / degrees.tp * shape.experts_per_token
        per_expert = rows / max(1, shape.n_experts / degrees.ep)
        return -(-per_expert // TILE) * TILE / per_expert

    def attention_flops(self) -> float:
        """Return the operations of the attention's two products, of what the causal mask leaves.

        Of the rank with most of them.
        """
        shape, degrees = self.shape, self.degrees
        width = shape.n_heads * shape.width_per_head / degrees.tp
        share = 1 / degrees.cp
        if degrees.cp > 1 and not (self.balanced or self.ulysses):
            share *= 2 - share  # the last rank's tokens see all others
        return self.sequences * 2.0 * self.seq_len**2 * width * share

    def pointwise_bytes(self, *, sparse: bool) -> float:
        """Return what norms, rotations, SwiGLU and residual sums read and write, if fused.

        Norms and sums read and write the residual stream eight times, on the rank's shard of the
        sequence; rotations read and write queries and keys; SwiGLU reads two and writes one.
        """
        shape, degrees = self.shape, self.degrees
        heads = 2 * (shape.n_heads + shape.n_kv_heads) * shape.width_per_head / degrees.tp
        between = 8 * shape.dim / self.sequence_shards
        if sparse:
            k = shape.experts_per_token
            rows = k * (3 * shape.width_per_expert + 6 * shape.dim)  # sorted, back, and summed
            shared = 3 * shape.n_shared_experts * shape.width_per_expert
            inner = (rows + shared) / degrees.tp
        else:
            inner = 3 * shape.ffn_hidden_dim / degrees.tp
        return self.tokens * (between + heads + inner) * self.compute_bytes

    def count_parameters(self, *, sparse: bool) -> tuple[float, float]:
        """Return the parameters of a block that its FSDP ranks shard, and those of experts."""
        shape, tp = self.shape, self.degrees.tp
        width = (shape.n_heads + shape.n_kv_heads) * shape.width_per_head
        dense = 2 * shape.dim * width / tp + 2 * shape.dim
        if not sparse:
            return dense + 3 * shape.dim * shape.ffn_hidden_dim / tp, 0.0
        expert = 3 * shape.dim * shape.width_per_expert
        whole = shape.n_experts * shape.dim + shape.n_shared_experts * expert
        return dense + whole, shape.n_experts / self.degrees.ep * expert

    def matrix_parameters(self) -> float:
        """Return the parameters of the embedding, or of the output, that FSDP ranks shard."""
        return self.shape.vocab_size * self.shape.dim / self.degrees.tp

    def tensor_exchanges(self, *, sparse: bool) -> tuple[list[Exchange], list[Exchange]]:
        """Return the exchanges of tensor-parallel ranks in a block's forward and its backward."""
        size = self.hidden_bytes
        if self.sequence_shards == 1:
            if sparse:
                forward = [Exchange("all_reduce", size), Exchange("all_gather", size)]
                return forward, forward
            return [Exchange("all_reduce", size)] * 2, [Exchange("all_reduce", size)] * 2
        pair = [Exchange("all_gather", size), Exchange("reduce_scatter", size)]
        both = pair if sparse else pair * 2
        return both, both

    def head_exchanges(self) -> tuple[list[Exchange], list[Exchange]]:
        """Return those around the output and the loss, forward and backward."""
        size = self.hidden_bytes
        split = self.sequence_shards > 1
        forward = [Exchange("all_gather", size)] if split else []
        backward = [Exchange("reduce_scatter" if split else "all_reduce", size)]
        if not self.loss_parallel:
            logits = self.tokens * self.shape.vocab_size * self.compute_bytes
            return [*forward, Exchange("all_gather", logits)], backward
        return forward, backward

    def embedding_exchanges(self) -> tuple[list[Exchange], list[Exchange]]:
        """Return those of the embedding, whose rows are split over the vocabulary."""
        if self.sequence_shards == 1:
            return [Exchange("all_reduce", self.hidden_bytes)], []
        return (
            [Exchange("reduce_scatter", self.hidden_bytes)],
            [Exchange("all_gather", self.hidden_bytes)],
        )

    def context_exchanges(self) -> tuple[list[Exchange], list[Exchange]]:
        """Return those of context-parallel ranks in an attention, forward and backward."""
        shape, cp = self.shape, self.degrees.cp
        head = self.tokens * shape.width_per_head / self.degrees.tp
        kv = 2 * shape.n_kv_heads * head  # elements of this rank's keys and values
        if self.ulysses:
            size = (2 * shape.n_heads * head + kv) * self.compute_bytes
            return [Exchange("all_to_all", size)], [Exchange("all_to_all", size)]
        if self.rotates:
            forward = [Exchange("send", kv * self.compute_bytes)] * (cp - 1)
            return forward, [*forward, *[Exchange("send", kv * FP32)] * cp]
        forward = [Exchange("all_gather", kv * self.compute_bytes * cp)]
        return forward, [*forward, Exchange("reduce_scatter", kv * FP32 * cp)]

    def expert_exchanges(self) -> list[Exchange]:
        """Return those of the ranks that share experts, in a forward or in a backward."""
        return [Exchange("all_to_all", self.row_bytes)] * 2


def feed_forward(rows: float, dim: float, width: float) -> list[Product]:
    """Return SwiGLU's three products."""
    return [Product(rows, dim, width), Product(rows, dim, width), Product(rows, width, dim)]
