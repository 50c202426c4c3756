"""The model families and their sizes, as data. No torch here: the config check reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torchtrain.errors import UserError
from torchtrain.utils import nearest


@dataclass(frozen=True)
class ModelShape:
    """Everything that fixes a Llama's parameters and its function of the tokens."""

    dim: int
    """Model width D."""
    n_layers: int
    """Number of transformer blocks."""
    n_heads: int
    """Query heads H; the head width C is dim / n_heads, and even, since RoPE rotates pairs."""
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
        vocabulary = f"{self.vocab_size:,}" if self.vocab_size else "as the tokenizer's"
        tied = ", tied embeddings" if self.tied_embeddings else ""
        return (
            f"{self.n_layers} layers {self.dim} wide, {self.n_heads} heads{grouped}, "
            f"feed-forward {self.ffn_hidden_dim}, vocabulary {vocabulary}{tied}"
        )


@dataclass(frozen=True)
class Family:
    """Models of one kind in several sizes."""

    model: str
    """The class that computes them, "module:Class": a `models.decoder.Decoder` of a shape."""
    flavors: dict[str, ModelShape]
    """The shapes by the sizes' names."""


FAMILIES: dict[str, Family] = {}
"""By `model.name`. Filled here and by the user's own file as the config is read, then constant."""


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


# Touvron et al. 2023 (arXiv:2307.09288).
LLAMA_2_7B = ModelShape(
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    ffn_hidden_dim=11_008,
    vocab_size=32_000,
)

# Dubey et al. 2024 (arXiv:2407.21783): Llama 3.1, with its scaled rotary frequencies. Llama 3.0 is
# the same with a factor of 1.
LLAMA_3_1_8B = ModelShape(
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    ffn_hidden_dim=14_336,
    vocab_size=128_256,
    rope_theta=500_000.0,
    rope_scaling_factor=8.0,
)

# https://github.com/meta-llama/llama-models/blob/main/models/llama3_2/MODEL_CARD.md
LLAMA_3_2_1B = replace(
    LLAMA_3_1_8B,
    dim=2048,
    n_layers=16,
    ffn_hidden_dim=8192,
    tied_embeddings=True,
    rope_scaling_factor=32.0,
)

# Small enough for a laptop's CPU.
DEBUG_2 = ModelShape(
    dim=256,
    n_layers=6,
    n_heads=16,
    n_kv_heads=16,
    ffn_hidden_dim=768,
    vocab_size=0,
)
DEBUG_3 = replace(DEBUG_2, rope_theta=500_000.0, rope_scaling_factor=8.0)

# 271M and 1B are torchtrain's own.
LLAMA_2 = {
    "debugmodel": DEBUG_2,
    "271M": replace(
        LLAMA_2_7B, dim=1024, n_layers=16, n_heads=8, n_kv_heads=8, ffn_hidden_dim=2816
    ),
    "1B": replace(
        LLAMA_2_7B, dim=2048, n_layers=18, n_heads=16, n_kv_heads=16, ffn_hidden_dim=5632
    ),
    "7B": LLAMA_2_7B,
    "13B": replace(
        LLAMA_2_7B, dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, ffn_hidden_dim=13_824
    ),
    "70B": replace(
        LLAMA_2_7B, dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_hidden_dim=28_672
    ),
}
LLAMA_3 = {
    "debugmodel": DEBUG_3,
    "1B": LLAMA_3_2_1B,
    "3B": replace(LLAMA_3_2_1B, dim=3072, n_layers=28, n_heads=24),
    "8B": LLAMA_3_1_8B,
    "70B": replace(LLAMA_3_1_8B, dim=8192, n_layers=80, n_heads=64, ffn_hidden_dim=28_672),
    "405B": replace(LLAMA_3_1_8B, dim=16_384, n_layers=126, n_heads=128, ffn_hidden_dim=53_248),
}

register_model("llama2", LLAMA_2, "torchtrain.models.llama:Transformer")
register_model("llama3", LLAMA_3, "torchtrain.models.llama:Transformer")


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
