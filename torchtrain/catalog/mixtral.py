"""The sizes of Mixtral: a Llama whose every layer is sparse."""

from dataclasses import replace

from torchtrain.catalog.models import ModelShape

# Jiang et al. 2024 (arXiv:2401.04088, table 1).
MIXTRAL_8X7B = ModelShape(
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    ffn_hidden_dim=14_336,
    vocab_size=32_000,
    rope_theta=1_000_000.0,
    n_experts=8,
    experts_per_token=2,
)

MIXTRAL = {
    # A token's two experts are together as wide as the feed-forward of Llama's debugmodel.
    "debugmodel": replace(
        MIXTRAL_8X7B,
        dim=256,
        n_layers=6,
        n_heads=16,
        n_kv_heads=16,
        ffn_hidden_dim=384,
        vocab_size=0,
    ),
    "8x7B": MIXTRAL_8X7B,
    # https://huggingface.co/mistralai/Mixtral-8x22B-v0.1/blob/main/config.json
    "8x22B": replace(MIXTRAL_8X7B, dim=6144, n_layers=56, n_heads=48, ffn_hidden_dim=16_384),
}
