"""What a model family is, and finding one. No torch here: the config check reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torchtrain.errors import UserError
from torchtrain.utils import nearest

TRANSFORMER = "torchtrain.models.llama:Transformer"
"""What computes all families of the package: what sets them apart is their shapes."""

# What has no effect on a model without experts.
EXPERT_DETAILS = (
    "experts_per_token",
    "expert_hidden_dim",
    "n_shared_experts",
    "n_dense_layers",
    "sparse_every",
    "router_scores",
    "router_renormalize",
    "router_scale",
    "router_bias",
)


@dataclass(frozen=True)
class ModelShape:
    """Everything that fixes a model's parameters and its function of the tokens."""

    dim: int
    """Model width D."""
    n_layers: int
    """Number of transformer blocks."""
    n_heads: int
    """Query heads H."""
    n_kv_heads: int
    """Key/value heads K; divides n_heads. K = H is multi-head, K < H grouped-query attention."""
    ffn_hidden_dim: int
    """Feed-forward width F of SwiGLU."""
    vocab_size: int
    """Rows V of the embedding; 0 means the tokenizer's size."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    tied_embeddings: bool = False
    """Whether the output projection is the embedding matrix."""
    rope_scaling_factor: float = 1.0
    """Llama 3.1's context extension: divisor of the low rotary frequencies; 1 turns it off."""
    rope_low_freq_factor: float = 1.0
    """Wavelengths above rope_original_seq_len / this are scaled in full."""
    rope_high_freq_factor: float = 4.0
    """Wavelengths below rope_original_seq_len / this are unchanged; in between, interpolated."""
    rope_original_seq_len: int = 8192
    """Context length, in tokens, for which the unscaled frequencies were trained."""
    head_width: int = 0
    """Head width C, even, since RoPE rotates pairs; 0 means dim / n_heads."""
    qk_norm: bool = False
    """Whether each head of q and k is normalized before the rotation."""
    n_experts: int = 0
    """Experts E of a sparse layer; 0 makes every layer dense."""
    experts_per_token: int = 2
    """Experts that compute each token; at most n_experts."""
    expert_hidden_dim: int = 0
    """Feed-forward width of one expert; 0 means ffn_hidden_dim."""
    n_shared_experts: int = 0
    """Experts that compute every token, beside those that the router chooses."""
    n_dense_layers: int = 0
    """First layers that stay dense."""
    sparse_every: int = 1
    """Of the layers after those, every how many are sparse: the last of each group."""
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    """How a router's logits become scores: against each other, or each by itself."""
    router_renormalize: bool = True
    """Whether the scores of a token's experts are divided by their sum."""
    router_scale: float = 1.0
    """Factor of the scores, after that."""
    router_bias: bool = False
    """Whether a bias per expert takes part in the choice; see `[router] bias_update_rate`."""

    @property
    def width_per_head(self) -> int:
        """Head width C."""
        return self.head_width or self.dim // self.n_heads

    @property
    def width_per_expert(self) -> int:
        """Feed-forward width of one expert."""
        return self.expert_hidden_dim or self.ffn_hidden_dim

    def is_sparse(self, layer: int) -> bool:
        """Return whether this layer's feed-forward is one of experts."""
        after_dense = layer - self.n_dense_layers
        in_turn = (after_dense + 1) % self.sparse_every == 0
        return self.n_experts > 0 and after_dense >= 0 and in_turn

    @property
    def sparse_layers(self) -> list[int]:
        """The layers with experts."""
        return [layer for layer in range(self.n_layers) if self.is_sparse(layer)]

    @property
    def n_sparse_layers(self) -> int:
        """Number of layers with experts."""
        return len(self.sparse_layers)

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers between which a pipeline can split the model, in forward order."""
        blocks = [f"layers.{layer}" for layer in range(self.n_layers)]
        return ["tok_embeddings", *blocks, "norm", "output"]

    def describe(self) -> str:
        """Return the shape in words, for the start of a run."""
        grouped = ""
        if self.n_kv_heads != self.n_heads:
            grouped = f" on {self.n_kv_heads} key/value heads"
        is_usual = self.head_width in (0, self.dim / self.n_heads)
        wide = "" if is_usual else f" of {self.head_width}"
        normalized = " (normalized)" if self.qk_norm else ""
        vocabulary = f"{self.vocab_size:,}" if self.vocab_size else "as the tokenizer's"
        tied = ", tied embeddings" if self.tied_embeddings else ""
        return (
            f"{self.n_layers} layers {self.dim} wide, {self.n_heads} heads{wide}{grouped}"
            f"{normalized}, {self._describe_feed_forwards()}, vocabulary {vocabulary}{tied}"
        )

    def _describe_feed_forwards(self) -> str:
        """Return what follows the attention, dense and sparse, in words."""
        dense = f"feed-forward {self.ffn_hidden_dim}"
        if self.n_experts == 0:
            return dense
        shared = f" and {self.n_shared_experts} shared" if self.n_shared_experts else ""
        experts = (
            f"{self.experts_per_token} of {self.n_experts} experts{shared}, "
            f"{self.width_per_expert} wide"
        )
        if self.n_sparse_layers == self.n_layers:
            return experts
        return f"{dense}, in {self.n_sparse_layers} of the layers {experts}"


@dataclass(frozen=True)
class Family:
    """Models of one kind in several sizes."""

    model: str
    """The class that computes them, "module:Class": a `models.decoder.Decoder` of a shape."""
    flavors: dict[str, ModelShape]
    """The shapes by the sizes' names."""


FAMILIES: dict[str, Family] = {}
"""By `model.name`. Filled by the package, and by the user's own file as the config is read."""


def register_model(name: str, flavors: Mapping[str, ModelShape], model: str) -> None:
    """Add a model family, or flavors to one: `model.name` = name, `model.flavor` a key of flavors.

    Args:
        name: the family.
        flavors: its shapes by the sizes' names.
        model: the class that computes them, "module:Class", imported where a model is built.

    Raises:
        UserError: the family has another class, or a flavor another shape.
    """
    family = FAMILIES.setdefault(name, Family(model=model, flavors={}))
    if family.model != model:
        raise UserError(
            f"register_model({name!r}): this family is {family.model}; choose another name"
        )
    for flavor, shape in flavors.items():
        if family.flavors.setdefault(flavor, shape) != shape:
            raise UserError(
                f"register_model({name!r}): flavor {flavor!r} exists already; rename yours"
            )


def find_family(name: str) -> Family:
    """Return the family.

    Raises:
        UserError: unknown; names those that exist.
    """
    if name not in FAMILIES:
        raise UserError(
            f"model.name = {name!r} is unknown; allowed: {', '.join(FAMILIES)}, and what "
            "experimental.custom_import registers"
        )
    return FAMILIES[name]


def resolve_shape(name: str, flavor: str, overrides: Mapping[str, Any]) -> ModelShape:
    """Return the flavor's shape under the overrides: keys of [model], of which None is none.

    Raises:
        UserError: unknown family or flavor; names those that exist.
    """
    flavors = find_family(name).flavors
    if flavor not in flavors:
        close = nearest(flavor, flavors)
        hint = f". Did you mean {close!r}?" if close else ""
        raise UserError(
            f"model.flavor = {flavor!r} is unknown; allowed: {', '.join(flavors)}{hint}"
        )
    given = {
        field: overrides[field]
        for field in ModelShape.__dataclass_fields__
        if overrides.get(field) is not None
    }
    return replace(flavors[flavor], **given)


# Flavors that had unscaled rotary frequencies before checkpoints held their shape.
ONCE_UNSCALED = {"llama3": ("debugmodel", "8B", "70B")}


def legacy_shape(name: str, flavor: str, overrides: Mapping[str, Any]) -> ModelShape:
    """Return the shape of a checkpoint from before checkpoints held their shape.

    Args:
        name: `model.name` in the checkpoint's config.
        flavor: `model.flavor` in it.
        overrides: its keys of [model]; None is no override.

    Raises:
        UserError: unknown family or flavor.
    """
    shape = resolve_shape(name, flavor, overrides)
    if flavor in ONCE_UNSCALED.get(name, ()) and overrides.get("rope_scaling_factor") is None:
        return replace(shape, rope_scaling_factor=1.0)
    return shape
