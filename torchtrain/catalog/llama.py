"""The sizes of Llama 2 and Llama 3."""

from dataclasses import replace

from torchtrain.catalog.models import ModelShape

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
