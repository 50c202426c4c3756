"""The shapes of the Llama family, as data. No torch here: the config check reads it before any heavy import."""

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
    """Query heads H; the head width C is dim / n_heads and must be even, since RoPE turns pairs."""
    n_kv_heads: int
    """Key/value heads K; must divide n_heads. Equal to n_heads: multi-head; fewer: grouped-query attention."""
    ffn_hidden_dim: int
    """Feed-forward width F of SwiGLU."""
    vocab_size: int
    """Rows of the embedding V; 0 means the tokenizer's own size."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    tied_embeddings: bool = False
    """Whether the output projection is the embedding matrix itself."""
    rope_scaling_factor: float = 1.0
    """Llama 3.1's context extension: low rotary frequencies are divided by this; 1 turns it off."""
    rope_low_freq_factor: float = 1.0
    """Wavelengths longer than rope_original_seq_len / this are scaled in full."""
    rope_high_freq_factor: float = 4.0
    """Wavelengths shorter than rope_original_seq_len / this are left alone; between the two, interpolated."""
    rope_original_seq_len: int = 8192
    """Context length, in tokens, that the unscaled frequencies were trained for."""

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers between which a pipeline can split the model, in the order of the forward."""
        return [
            "tok_embeddings",
            *(f"layers.{layer}" for layer in range(self.n_layers)),
            "norm",
            "output",
        ]

    def describe(self) -> str:
        """The shape in words, for the start of a run."""
        grouped = (
            "" if self.n_kv_heads == self.n_heads else f" on {self.n_kv_heads} key/value heads"
        )
        tied = ", tied embeddings" if self.tied_embeddings else ""
        return (
            f"{self.n_layers} layers {self.dim} wide, {self.n_heads} heads{grouped}, "
            f"feed-forward {self.ffn_hidden_dim}, vocabulary {self.vocab_size:,}{tied}"
        )


# Llama 2: Touvron et al. 2023 (arXiv:2307.09288). 271M and 1B are torchtrain's own small sizes.
# Llama 3: Dubey et al. 2024 (arXiv:2407.21783). The 405B model exists only as 3.1, with its scaled RoPE.
FLAVORS: dict[str, dict[str, ModelShape]] = {
    "llama2": {
        "debugmodel": ModelShape(256, 6, 16, 16, 768, 0),
        "271M": ModelShape(1024, 16, 8, 8, 2816, 32_000),
        "1B": ModelShape(2048, 18, 16, 16, 5632, 32_000),
        "7B": ModelShape(4096, 32, 32, 32, 11_008, 32_000),
        "13B": ModelShape(5120, 40, 40, 40, 13_824, 32_000),
        "70B": ModelShape(8192, 80, 64, 8, 28_672, 32_000),
    },
    "llama3": {
        "debugmodel": ModelShape(256, 6, 16, 16, 768, 0, rope_theta=500_000.0),
        "8B": ModelShape(4096, 32, 32, 8, 14_336, 128_256, rope_theta=500_000.0),
        "70B": ModelShape(8192, 80, 64, 8, 28_672, 128_256, rope_theta=500_000.0),
        "405B": ModelShape(
            16_384, 126, 128, 8, 53_248, 128_256, rope_theta=500_000.0, rope_scaling_factor=8.0
        ),
    },
}


def resolve_shape(name: str, flavor: str, overrides: dict[str, Any]) -> ModelShape:
    """The flavor's shape with every override that is not None put over it.

    Raises:
        UserError: unknown family or flavor, named with what exists.
    """
    for key, given, allowed in (
        ("model.name", name, FLAVORS),
        ("model.flavor", flavor, FLAVORS.get(name, {})),
    ):
        if given not in allowed:
            close = nearest(given, allowed)
            hint = f" Did you mean {close!r}?" if close else ""
            raise UserError(f"{key} = {given!r} is unknown; allowed: {', '.join(allowed)}.{hint}")
    return replace(
        FLAVORS[name][flavor],
        **{key: value for key, value in overrides.items() if value is not None},
    )
