"""What parallelized models are made of: each sharing option's effect on two ranks.

That they then compute the same is shown by test_parity and by the techniques' own tests.
"""

import json

import pytest
import torch
import torch.distributed as dist
from helpers.forking import in_group
from helpers.launching import options
from torch import nn
from torch.distributed.tensor import DTensor

from torchtrain.catalog.models import ModelShape
from torchtrain.config_manager import JobConfig
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms.apply import collect_weights
from torchtrain.set_up import set_up

TP = "parallelism.tensor_parallel_degree"
CP = "parallelism.context_parallel_degree"
SEQ_LEN = 32

CASES = {
    "fsdp": {},
    "tp": {TP: 2},
    "tp, whole sequences": {TP: 2, "parallelism.disable_sequence_parallel": True},
    "tp, whole logits": {TP: 2, "parallelism.disable_loss_parallel": True},
    "cp": {CP: 2},
    "cp, rotated": {CP: 2, "parallelism.context_parallel_rotate_method": "alltoall"},
    "cp, contiguous": {CP: 2, "parallelism.context_parallel_load_balancer": "none"},
    "cp, ulysses": {CP: 2, "parallelism.context_parallel_method": "ulysses"},
    "cp, emulated bf16": {CP: 2, "training.mixed_precision_param": "bfloat16"},
}


def look(data, results):
    """What one of two ranks finds in the model of each case, and in a forward of it."""
    found = {}
    for name, given in CASES.items():
        arguments = {**data, "training.seq_len": SEQ_LEN, "training.local_batch_size": 2, **given}
        trainer = set_up(JobConfig().parse_args(options(arguments)), torch.device("cpu"))
        (model,) = trainer.parts.values()
        block = model.layers["1"]
        between = []
        block.register_forward_pre_hook(lambda _, inputs, seen=between: seen.append(inputs[0]))
        tokens = trainer.shard(trainer.loader.step_batches(1)[0].tokens)
        with torch.no_grad(), trainer.loss_context():
            logits = model(tokens)
        kernels = [
            type(module).__name__
            for module in block.attention.inner_attention.modules()
            if "Attention" in type(module).__name__
        ]
        weight = block.attention.wq.weight
        ring = getattr(model.rope, "ring", None)
        found[name] = {
            "dimensions": list(weight.device_mesh.mesh_dim_names),
            "local": list(weight.to_local().shape),
            "tokens": list(tokens.shape),
            "between": list(between[0].shape),
            "logits": "sharded" if isinstance(logits, DTensor) else "whole",
            "kernels": kernels,
            "ring": None if ring is None else [ring.size, ring.headtail, ring.gathers],
        }
    if dist.get_rank() == 0:
        results.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory, data):
    results = tmp_path_factory.mktemp("models") / "found.json"
    in_group(2, look, data, results)
    return json.loads(results.read_text())


@pytest.mark.slow
def test_sharing_options_reach_the_model(found):
    """Width 32, two sequences of 32 tokens: by hand, what one of two ranks holds and is given."""
    plain = {
        "dimensions": ["dp_shard"],
        "local": [16, 32],
        "tokens": [2, 32],
        "between": [2, 32, 32],
        "logits": "whole",
        "kernels": ["CausalAttention"],
        "ring": None,
    }
    tp = {**plain, "dimensions": ["dp_shard", "tp"], "logits": "sharded", "between": [2, 16, 32]}
    cp = {
        **plain,
        "dimensions": ["dp_shard_cp"],
        "tokens": [2, 16],
        "between": [2, 16, 32],
        "kernels": ["RingAttention"],
        "ring": [2, True, True],
    }
    expected = {
        "fsdp": plain,
        "tp": tp,
        "tp, whole sequences": {**tp, "between": [2, 32, 32]},
        "tp, whole logits": {**tp, "logits": "whole"},
        "cp": cp,
        "cp, rotated": {**cp, "ring": [2, True, False]},
        "cp, contiguous": {**cp, "ring": [2, False, True]},
        "cp, ulysses": {**cp, "kernels": ["UlyssesAttention", "CausalAttention"]},
    }
    for name, facts in expected.items():
        assert found[name] == facts, name


@pytest.mark.slow
def test_the_ring_stays_under_emulated_bf16(found):
    kernels = found["cp, emulated bf16"]["kernels"]
    assert kernels in (["RingAttention"], ["WidenedAttention", "RingAttention"])


@pytest.mark.parametrize("tied", [False, True])
def test_weights_have_their_names_in_the_whole_model(tied):
    shape = ModelShape(32, 2, 4, 2, 64, 50, tied_embeddings=tied)
    first, last = Transformer(shape), Transformer(shape)
    first.keep(["tok_embeddings", "layers.0"])
    last.keep(["layers.1", "norm", "output"])
    weights = collect_weights([first, last])
    whole = dict(Transformer(shape).named_parameters())
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: weight.shape for name, weight in whole.items()
    }
    assert ("output.weight" in weights) != tied
    assert all(isinstance(weight, nn.Parameter) for weight in weights.values())
    assert weights["layers.1.ffn_norm.weight"] is last.layers["1"].ffn_norm.weight
