"""How long a rank takes for a block's forward and backward, term by term.

A *term* is a part of the step's time that has one reason, by a name that a user can read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torchtrain.config.schema import ActivationCheckpoint, Compile
from torchtrain.tools.preflight.block_work import Product, Unit
from torchtrain.tools.preflight.links import Exchange, Group, Groups, Links

PRODUCTS = "matrix products"
ATTENTION = "attention"
POINTWISE = "norms, rotations, SwiGLU"
RECOMPUTED = "recomputation"
LOSS = "output and loss"
TENSOR = "tensor-parallel exchanges"
CONTEXT = "context-parallel exchanges and sums"
EXPERTS = "expert-parallel exchanges"
SHARDS = "FSDP: gathers and reductions not hidden"
BUBBLE = "pipeline bubble"
OPTIMIZER = "optimizer and clipping"
OFFLOAD = "copies to and from host memory"
LAUNCHES = "host: waiting for launches"


class Terms(dict[str, float]):
    """Seconds by term; 0 for one that is not there."""

    def __missing__(self, name: str) -> float:
        """Return 0 for a term that is not there."""
        return 0.0

    def total(self) -> float:
        """Return the seconds of all terms."""
        return sum(self.values())

    def add(self, terms: Mapping[str, float], times: float) -> None:
        """Add other terms, so many times."""
        for name, seconds in terms.items():
            self[name] += seconds * times


PRODUCT_START_S = 6e-6
"""Beyond its operations at full speed, what a product takes: launch, first and last wave of tiles.
On an H100 products of 10^9 to 7 · 10^10 operations take 3 to 12 us more than at 794 TFLOP/s (the
table of OpenXLA's service/gpu/model/matmul_interpolator_data.h)."""
ATTENTION_BACKWARD = 2.5
"""Flash attention's backward computes the scores again: five products for the forward's two."""
POINTWISE_BACKWARD = 2.0
EAGER_TRAFFIC = 2.5
"""Times the memory traffic of fused kernels, without the compiler: each operation reads and writes
its own result, norms in fp32."""
LOSS_BYTES_EAGER = 42
"""Per logit: widened, log-softmax, and all of it again with the gradient (loss.py)."""
LOSS_BYTES_COMPILED = 20
RING_BYTES_EAGER = 46
"""Per element of a ring's result and rank of the ring: a part is widened, weighed and added to the
result so far in fp32 (ring_attention.py), each operation reading and writing what it makes."""
RING_BYTES_FUSED = 10
LAUNCH_S = 6e-6
"""The host's time per kernel, with FSDP's and DTensor's share."""
KERNELS_FORWARD = 60
KERNELS_BACKWARD = 120
KERNELS_COMPILED = 0.3
"""Of these, what is left of a compiled block."""


@dataclass(frozen=True)
class Speeds:
    """What a device and its links reach in a run, in operations and bytes per second."""

    products: float
    attention: float
    memory: float
    links: Links
    async_hidden: float
    """The share of tensor-parallel exchanges that async tensor parallelism hides."""
    fused: bool
    """Whether the blocks are compiled."""
    fused_loss: bool

    def product(self, product: Product) -> float:
        """Return the seconds of a matrix product."""
        return product.flops / self.products + PRODUCT_START_S

    def exchange(self, exchanges: list[Exchange], group: Group) -> float:
        """Return the seconds of collectives, one after the other."""
        return sum(self.links.seconds(exchange, group) for exchange in exchanges)


@dataclass(frozen=True)
class Recomputed:
    """Which share of a forward runs again in the backward, averaged over the blocks."""

    odd_products: float
    """The first, third, ... of a block's matrix products."""
    even_products: float
    """The second, fourth, ..."""
    attention: float
    """Attention, and exchanges with experts."""
    rest: float
    """All else, tensor-parallel exchanges too."""

    @classmethod
    def of(cls, section: ActivationCheckpoint, compiling: Compile) -> "Recomputed":
        """Return what a mode recomputes.

        The compiler's budget goes first to what is cheap to compute again: half of it is taken for
        everything but products.
        """
        every = section.recomputed_blocks
        if every is not None:
            return cls.evenly(1 / every, 1 / every)
        if section.mode == "selective":
            is_second_saved = section.selective_ac_option == "op_all"
            return cls(0.0, 0.0 if is_second_saved else 1.0, 0.0, 1.0)
        if section.mode == "memory_budget" and compiling.enable:
            saved = section.memory_budget
            return cls.evenly(max(0.0, 1 - 2 * saved), min(1.0, 2 - 2 * saved))
        return cls.evenly(0.0, 0.0)

    @classmethod
    def evenly(cls, costly: float, rest: float) -> "Recomputed":
        """Return the same share of all that is costly."""
        return cls(costly, costly, costly, rest)


@dataclass(frozen=True)
class PassTime:
    """A forward and a backward, in seconds."""

    forward: Terms
    backward: Terms
    weights: float
    """The part of the backward that computes the gradients of weights alone."""


def time_block(
    unit: Unit, speeds: Speeds, groups: Groups, recomputed: Recomputed, *, sparse: bool
) -> PassTime:
    """Return how long a block takes, without FSDP's exchanges."""
    each = [speeds.product(product) for product in unit.list_products(sparse=sparse)]
    if sparse:
        each = [seconds * unit.filling for seconds in each]
    products = sum(each)
    attention = unit.attention_flops() / speeds.attention
    pointwise = unit.pointwise_bytes(sparse=sparse) / speeds.memory
    pointwise *= 1.0 if speeds.fused else EAGER_TRAFFIC
    tensor = [
        speeds.exchange(each, groups.tp) * (1 - speeds.async_hidden)
        for each in unit.tensor_exchanges(sparse=sparse)
    ]
    context = _time_context(unit, speeds, groups.cp, attention)
    experts = speeds.exchange(unit.expert_exchanges(), groups.ep) if sparse else 0.0
    forward = Terms(
        {
            PRODUCTS: products,
            ATTENTION: attention,
            POINTWISE: pointwise,
            TENSOR: tensor[0],
            CONTEXT: context[0],
            EXPERTS: experts,
        }
    )
    again = recomputed.odd_products * sum(each[::2]) + recomputed.even_products * sum(each[1::2])
    again += recomputed.attention * (attention + context[0] + experts)
    again += recomputed.rest * (pointwise + tensor[0])
    backward = Terms(
        {
            PRODUCTS: 2 * products,
            ATTENTION: ATTENTION_BACKWARD * attention,
            POINTWISE: POINTWISE_BACKWARD * pointwise,
            TENSOR: tensor[1],
            CONTEXT: context[1],
            EXPERTS: experts,
            RECOMPUTED: again,
        }
    )
    _wait_for_launches(forward, KERNELS_FORWARD, speeds)
    _wait_for_launches(backward, KERNELS_BACKWARD, speeds)
    return PassTime(forward, backward, products)


def _time_context(
    unit: Unit, speeds: Speeds, group: Group, attention: float
) -> tuple[float, float]:
    """Return what is left of context-parallel exchanges, forward and backward, beside attention.

    In rotation a shard travels while another is computed; where all come at once, the rank's own
    shard hides a part; the exchanges of heads hide behind nothing.
    """
    if group.size == 1:
        return 0.0, 0.0
    forward, backward = (speeds.exchange(each, group) for each in unit.context_exchanges())
    if unit.ulysses:
        return forward, backward
    hiding = attention if unit.rotates else attention / group.size
    added = unit.query_elements * group.size / speeds.memory
    joined = added * (RING_BYTES_FUSED if speeds.fused else RING_BYTES_EAGER)
    return (
        max(0.0, forward - hiding) + joined,
        max(0.0, backward - ATTENTION_BACKWARD * hiding) + added * RING_BYTES_FUSED,
    )


def _wait_for_launches(terms: Terms, kernels: float, speeds: Speeds) -> None:
    """Add what the device waits for the host, where the host's launches take longer than it."""
    launches = kernels * LAUNCH_S * (KERNELS_COMPILED if speeds.fused else 1.0)
    terms[LAUNCHES] = max(0.0, launches - terms.total())


def time_head(unit: Unit, speeds: Speeds, groups: Groups) -> PassTime:
    """Return how long the output and the loss take."""
    product = speeds.product(unit.output_product())
    logits = unit.tokens * unit.shape.vocab_size
    logits /= unit.degrees.tp if unit.loss_parallel else 1
    traffic = logits * (LOSS_BYTES_COMPILED if speeds.fused_loss else LOSS_BYTES_EAGER)
    loss = traffic / speeds.memory
    forward, backward = (speeds.exchange(each, groups.tp) for each in unit.head_exchanges())
    return PassTime(
        Terms({LOSS: product + loss / 3, TENSOR: forward}),
        Terms({LOSS: 2 * product + loss * 2 / 3, TENSOR: backward}),
        product,
    )


def time_embedding(unit: Unit, speeds: Speeds, groups: Groups) -> PassTime:
    """Return how long the look-up of the tokens takes: its exchanges, and reading a row for each.

    Its backward adds a row for each token in fp32.
    """
    look_up = 2 * unit.hidden_bytes / speeds.memory
    forward, backward = (speeds.exchange(each, groups.tp) for each in unit.embedding_exchanges())
    return PassTime(
        Terms({POINTWISE: look_up, TENSOR: forward}),
        Terms({POINTWISE: 3 * look_up, TENSOR: backward}),
        0.0,
    )
