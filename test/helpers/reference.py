"""Models with random weights, and the same weights in an independent one: transformers'."""

import pytest
import torch

from torchtrain.loss import sequence_losses
from torchtrain.models.llama import Transformer


def filled(shape, seed=0):
    """A model with random values in all parameters, of a size that lets gradients through."""
    model = Transformer(shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    return model


def tokens_of(shape, batch=2, seq_len=40, seed=1):
    return torch.randint(
        shape.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(seed)
    )


def distance(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def halves_from_neighbors(weight, heads):
    """Rows of wq or wk as transformers turns them: pairs (2j, 2j+1) of a head are (j, j + C/2)."""
    pairs = weight.view(heads, len(weight) // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape)


def transformers_names(shape):
    """Our name to (theirs, the number of heads whose rows are reordered or None)."""
    names = {
        "tok_embeddings.weight": ("model.embed_tokens.weight", None),
        "norm.weight": ("model.norm.weight", None),
    }
    if not shape.tied_embeddings:
        names["output.weight"] = ("lm_head.weight", None)
    inner = {
        "attention.wq": ("self_attn.q_proj", shape.n_heads),
        "attention.wk": ("self_attn.k_proj", shape.n_kv_heads),
        "attention.wv": ("self_attn.v_proj", None),
        "attention.wo": ("self_attn.o_proj", None),
        "attention_norm": ("input_layernorm", None),
        "ffn_norm": ("post_attention_layernorm", None),
    }
    if shape.qk_norm:
        inner["attention.q_norm"] = ("self_attn.q_norm", 1)
        inner["attention.k_norm"] = ("self_attn.k_norm", 1)
    dense = {
        "feed_forward.w1": ("mlp.gate_proj", None),
        "feed_forward.w2": ("mlp.down_proj", None),
        "feed_forward.w3": ("mlp.up_proj", None),
    }
    sparse = {"moe.router.gate": ("mlp.gate", None)}
    for layer in range(shape.n_layers):
        here = inner | (sparse if shape.is_sparse(layer) else dense)
        for ours, (theirs, heads) in here.items():
            names[f"layers.{layer}.{ours}.weight"] = (
                f"model.layers.{layer}.{theirs}.weight",
                heads,
            )
    return names


def as_transformers(shape, named):
    """Tensors under our names, in our order of rows, to theirs."""
    named = dict(named)
    theirs = {}
    for layer in shape.sparse_layers:
        w1, w2, w3 = (
            named.pop(f"layers.{layer}.moe.experts.{name}") for name in ("w1", "w2", "w3")
        )
        experts = f"model.layers.{layer}.mlp.experts"
        theirs[f"{experts}.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        theirs[f"{experts}.down_proj"] = w2
    table = transformers_names(shape)
    assert named.keys() == table.keys()
    for name, tensor in named.items():
        their_name, heads = table[name]
        theirs[their_name] = tensor if heads is None else halves_from_neighbors(tensor, heads)
    return theirs


def transformers_model(shape):
    """Return transformers' model of the shape, with weights of its own."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling_factor != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": shape.rope_scaling_factor,
            "low_freq_factor": shape.rope_low_freq_factor,
            "high_freq_factor": shape.rope_high_freq_factor,
            "original_max_position_embeddings": shape.rope_original_seq_len,
        }
    common = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn_hidden_dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": 256,
        "tie_word_embeddings": shape.tied_embeddings,
        "attn_implementation": "eager",
    }
    sparse = {"num_experts_per_tok": shape.experts_per_token, "experts_implementation": "eager"}
    if shape.qk_norm and shape.n_experts:
        config = transformers.Qwen3MoeConfig(
            **common,
            **sparse,
            head_dim=shape.width_per_head,
            num_experts=shape.n_experts,
            moe_intermediate_size=shape.width_per_expert,
            norm_topk_prob=shape.router_renormalize,
            mlp_only_layers=list(set(range(shape.n_layers)) - set(shape.sparse_layers)),
        )
        return transformers.Qwen3MoeForCausalLM(config)
    if shape.qk_norm:
        config = transformers.Qwen3Config(**common, head_dim=shape.width_per_head)
        return transformers.Qwen3ForCausalLM(config)
    if shape.n_experts:
        config = transformers.MixtralConfig(**common, **sparse, num_local_experts=shape.n_experts)
        return transformers.MixtralForCausalLM(config)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))


def assert_equals_transformers(shape):
    """Check that logits, loss and every gradient are those of transformers' model."""
    model = filled(shape)
    reference = transformers_model(shape)
    weights = as_transformers(shape, {name: p.detach() for name, p in model.named_parameters()})
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert missing == (["lm_head.weight"] if shape.tied_embeddings else [])
    assert not unexpected

    tokens = tokens_of(shape)
    logits = model(tokens)
    loss = sequence_losses(logits[:, :-1], tokens[:, 1:]).sum() / tokens[:, 1:].numel()
    loss.backward()
    theirs = reference(input_ids=tokens, labels=tokens)
    theirs.loss.backward()

    assert distance(logits, theirs.logits) <= 1e-5
    assert distance(loss, theirs.loss) <= 1e-5
    gradients = as_transformers(shape, {name: p.grad for name, p in model.named_parameters()})
    assert gradients.keys() == {name for name, _ in reference.named_parameters()}
    off = {name: distance(gradients[name], p.grad) for name, p in reference.named_parameters()}
    assert {name: error for name, error in off.items() if not error <= 1e-5} == {}
