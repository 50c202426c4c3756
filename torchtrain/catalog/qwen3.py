"""The sizes of Qwen3, dense and sparse (arXiv:2505.09388, tables 1 and 2)."""

from dataclasses import replace

from torchtrain.catalog.models import ModelShape

QWEN3_8B = ModelShape(
    dim=4096,
    n_layers=36,
    n_heads=32,
    n_kv_heads=8,
    ffn_hidden_dim=12_288,
    vocab_size=151_936,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    head_width=128,
    qk_norm=True,
)
# Of the two up to 1.7B, and of 4B, the embedding is the output projection too.
QWEN3_0_6B = replace(
    QWEN3_8B, dim=1024, n_layers=28, n_heads=16, ffn_hidden_dim=3072, tied_embeddings=True
)
# Every layer is sparse; ffn_hidden_dim, as published, would be a dense layer's.
QWEN3_30B_A3B = replace(
    QWEN3_8B,
    dim=2048,
    n_layers=48,
    n_kv_heads=4,
    ffn_hidden_dim=6144,
    n_experts=128,
    experts_per_token=8,
    expert_hidden_dim=768,
)
# Small enough for a laptop's CPU; the heads wider than dim / n_heads, as in most sizes.
DEBUG = replace(
    QWEN3_0_6B, dim=256, n_layers=6, n_kv_heads=8, ffn_hidden_dim=768, vocab_size=0, head_width=32
)

QWEN3 = {
    "debugmodel": DEBUG,
    "0.6B": QWEN3_0_6B,
    "1.7B": replace(QWEN3_0_6B, dim=2048, ffn_hidden_dim=6144),
    "4B": replace(QWEN3_8B, dim=2560, ffn_hidden_dim=9728, tied_embeddings=True),
    "8B": QWEN3_8B,
    "14B": replace(QWEN3_8B, dim=5120, n_layers=40, n_heads=40, ffn_hidden_dim=17_408),
    "32B": replace(QWEN3_8B, dim=5120, n_layers=64, n_heads=64, ffn_hidden_dim=25_600),
    "debugmodel_moe": replace(DEBUG, n_experts=8, experts_per_token=2, expert_hidden_dim=384),
    "30B-A3B": QWEN3_30B_A3B,
    "235B-A22B": replace(
        QWEN3_30B_A3B,
        dim=4096,
        n_layers=94,
        n_heads=64,
        ffn_hidden_dim=12_288,
        expert_hidden_dim=1536,
    ),
}
