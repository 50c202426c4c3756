"""The model families: Meta's published shapes, torchtitan's flavors, and adding one's own."""

import pytest

from torchtrain.catalog.models import (
    FAMILIES,
    ModelShape,
    legacy_shape,
    register_model,
    resolve_shape,
)
from torchtrain.errors import UserError

LLAMA = "torchtrain.models.llama:Transformer"

# dim, n_layers, n_heads, n_kv_heads, ffn_hidden_dim, vocab_size, rope_theta, tied, scaling factor:
# of the params.json that Meta publishes with each model, feed-forward widths worked out from it.
PUBLISHED = {
    ("llama2", "7B"): (4096, 32, 32, 32, 11008, 32000, 1e4, False, 1),
    ("llama2", "13B"): (5120, 40, 40, 40, 13824, 32000, 1e4, False, 1),
    ("llama2", "70B"): (8192, 80, 64, 8, 28672, 32000, 1e4, False, 1),
    ("llama3", "1B"): (2048, 16, 32, 8, 8192, 128256, 5e5, True, 32),
    ("llama3", "3B"): (3072, 28, 24, 8, 8192, 128256, 5e5, True, 32),
    ("llama3", "8B"): (4096, 32, 32, 8, 14336, 128256, 5e5, False, 8),
    ("llama3", "70B"): (8192, 80, 64, 8, 28672, 128256, 5e5, False, 8),
    ("llama3", "405B"): (16384, 126, 128, 8, 53248, 128256, 5e5, False, 8),
    # torchtitan v0.2.2's, the vocabulary its test tokenizer's.
    ("llama3", "debugmodel"): (256, 6, 16, 16, 768, 0, 5e5, False, 8),
    # Ours.
    ("llama2", "debugmodel"): (256, 6, 16, 16, 768, 0, 1e4, False, 1),
    ("llama2", "271M"): (1024, 16, 8, 8, 2816, 32000, 1e4, False, 1),
    ("llama2", "1B"): (2048, 18, 16, 16, 5632, 32000, 1e4, False, 1),
}


def test_every_flavor_is_the_published_one():
    found = {
        (name, flavor): (
            shape.dim,
            shape.n_layers,
            shape.n_heads,
            shape.n_kv_heads,
            shape.ffn_hidden_dim,
            shape.vocab_size,
            shape.rope_theta,
            shape.tied_embeddings,
            shape.rope_scaling_factor,
        )
        for name in ("llama2", "llama3")
        for flavor, shape in FAMILIES[name].flavors.items()
    }
    assert found == PUBLISHED
    for name in ("llama2", "llama3"):
        for shape in FAMILIES[name].flavors.values():
            assert shape.norm_eps == 1e-5
            assert (shape.head_width, shape.qk_norm, shape.n_experts) == (0, False, 0)
            scaling = (shape.rope_low_freq_factor, shape.rope_high_freq_factor)
            assert (*scaling, shape.rope_original_seq_len) == (1, 4, 8192)


# dim, n_layers, n_heads, n_kv_heads, ffn_hidden_dim, vocab_size, tied, experts, chosen, width of
# one: of the config.json that is published with each model; debug models are ours.
WITH_EXPERTS = {
    ("mixtral", "debugmodel"): (256, 6, 16, 16, 384, 0, False, 8, 2, 384),
    ("mixtral", "8x7B"): (4096, 32, 32, 8, 14336, 32000, False, 8, 2, 14336),
    ("mixtral", "8x22B"): (6144, 56, 48, 8, 16384, 32000, False, 8, 2, 16384),
    ("qwen3", "debugmodel"): (256, 6, 16, 8, 768, 0, True, 0, None, None),
    ("qwen3", "0.6B"): (1024, 28, 16, 8, 3072, 151936, True, 0, None, None),
    ("qwen3", "1.7B"): (2048, 28, 16, 8, 6144, 151936, True, 0, None, None),
    ("qwen3", "4B"): (2560, 36, 32, 8, 9728, 151936, True, 0, None, None),
    ("qwen3", "8B"): (4096, 36, 32, 8, 12288, 151936, False, 0, None, None),
    ("qwen3", "14B"): (5120, 40, 40, 8, 17408, 151936, False, 0, None, None),
    ("qwen3", "32B"): (5120, 64, 64, 8, 25600, 151936, False, 0, None, None),
    ("qwen3", "debugmodel_moe"): (256, 6, 16, 8, 768, 0, True, 8, 2, 384),
    ("qwen3", "30B-A3B"): (2048, 48, 32, 4, 6144, 151936, False, 128, 8, 768),
    ("qwen3", "235B-A22B"): (4096, 94, 64, 4, 12288, 151936, False, 128, 8, 1536),
}


def test_mixtral_and_qwen3_are_the_published_ones():
    found = {}
    for name in ("mixtral", "qwen3"):
        for flavor, shape in FAMILIES[name].flavors.items():
            sizes = (shape.dim, shape.n_layers, shape.n_heads, shape.n_kv_heads)
            sizes += (shape.ffn_hidden_dim, shape.vocab_size, shape.tied_embeddings)
            experts = (None, None)
            if shape.n_experts:
                experts = (shape.experts_per_token, shape.width_per_expert)
                assert shape.n_sparse_layers == shape.n_layers
            found[name, flavor] = (*sizes, shape.n_experts, *experts)
            is_qwen = name == "qwen3"
            assert (shape.qk_norm, shape.norm_eps) == (is_qwen, 1e-6 if is_qwen else 1e-5)
            if "debug" not in flavor:
                assert shape.width_per_head == 128
            assert (shape.rope_theta, shape.rope_scaling_factor) == (1e6, 1)
            assert (shape.router_scores, shape.router_renormalize) == ("softmax", True)
            assert (shape.n_shared_experts, shape.router_scale) == (0, 1)
    assert found == WITH_EXPERTS


def test_a_shape_says_its_heads_and_experts():
    said = FAMILIES["qwen3"].flavors["30B-A3B"].describe()
    assert said == (
        "48 layers 2048 wide, 32 heads of 128 on 4 key/value heads (normalized), 8 of 128 experts, "
        "768 wide, vocabulary 151,936"
    )
    said = resolve_shape("mixtral", "8x7B", {"n_dense_layers": 2, "n_shared_experts": 1}).describe()
    assert said == (
        "32 layers 4096 wide, 32 heads on 8 key/value heads, feed-forward 14336, in 30 of the "
        "layers 2 of 8 experts and 1 shared, 14336 wide, vocabulary 32,000"
    )


def test_a_factor_of_one_gives_llama_3_0():
    shape = resolve_shape("llama3", "8B", {"rope_scaling_factor": 1.0, "dim": None})
    assert shape.rope_scaling_factor == 1.0
    assert shape.dim == 4096


# The flavors of llama3 at commit 85f27e9, the last whose checkpoints do not hold their shape.
BEFORE = {"debugmodel": 1.0, "8B": 1.0, "70B": 1.0, "405B": 8.0}


@pytest.mark.parametrize("flavor", BEFORE)
def test_an_old_checkpoint_means_what_it_meant(flavor):
    now = resolve_shape("llama3", flavor, {})
    then = legacy_shape("llama3", flavor, {"dim": None, "rope_scaling_factor": None})
    assert then.rope_scaling_factor == BEFORE[flavor]
    assert now == resolve_shape("llama3", flavor, {"rope_scaling_factor": 8.0})
    assert then == resolve_shape("llama3", flavor, {"rope_scaling_factor": BEFORE[flavor]})
    given = legacy_shape("llama3", flavor, {"rope_scaling_factor": 4.0, "n_layers": 2})
    assert (given.rope_scaling_factor, given.n_layers) == (4.0, 2)


def test_an_old_llama_2_is_what_it_is_now():
    for flavor, shape in FAMILIES["llama2"].flavors.items():
        assert legacy_shape("llama2", flavor, {}) == shape


TINY = ModelShape(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_hidden_dim=64, vocab_size=0)


@pytest.fixture
def families(monkeypatch):
    """The table, put back afterwards."""
    there = list(FAMILIES.items())
    for name, family in there:
        monkeypatch.setitem(FAMILIES, name, type(family)(family.model, dict(family.flavors)))
    yield FAMILIES
    for name in FAMILIES.keys() - dict(there):
        del FAMILIES[name]


def test_a_family_and_a_flavor_are_added(families):
    register_model("mine", {"tiny": TINY}, "my_models:Mine")
    register_model("mine", {"tiny": TINY}, "my_models:Mine")
    register_model("llama3", {"tiny": TINY}, LLAMA)
    assert resolve_shape("mine", "tiny", {}) == resolve_shape("llama3", "tiny", {}) == TINY
    assert families["mine"].model == "my_models:Mine"


def test_what_is_there_is_not_replaced(families):
    with pytest.raises(UserError, match=r"this family is torchtrain\.models\.llama:Transformer"):
        register_model("llama3", {"tiny": TINY}, "my_models:Mine")
    with pytest.raises(UserError, match="flavor '8B' exists already"):
        register_model("llama3", {"8B": TINY}, LLAMA)
    assert families["llama3"].flavors["8B"].dim == 4096


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(
        UserError,
        match=r"model\.name = 'llama4' is unknown; allowed: llama2, llama3, mixtral, qwen3",
    ):
        resolve_shape("llama4", "8B", {})
    with pytest.raises(UserError) as raised:
        resolve_shape("llama3", "405b", {})
    assert "allowed: debugmodel, 1B, 3B, 8B, 70B, 405B. Did you mean '405B'?" in str(raised.value)


def test_layer_names_are_in_forward_order():
    shape = resolve_shape("llama3", "debugmodel", {"n_layers": 2})
    expected = ["tok_embeddings", "layers.0", "layers.1", "norm", "output"]
    assert shape.layer_names == expected
