"""Small models in both forms, ours and Hugging Face's."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from torchtrain.catalog.llama import DEBUG_2, DEBUG_3
from torchtrain.catalog.mixtral import MIXTRAL
from torchtrain.catalog.qwen3 import QWEN3
from torchtrain.checkpoint import commit
from torchtrain.checkpoint.commit import Progress
from torchtrain.checkpoint.storage import write_tensors
from torchtrain.config_manager import JobConfig
from torchtrain.models.llama import Transformer

TINY = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 2048}
SHAPES = {
    "llama": replace(DEBUG_2, **TINY, ffn_hidden_dim=96),
    "llama scaled": replace(DEBUG_3, **TINY, ffn_hidden_dim=96, rope_original_seq_len=16),
    "llama tied": replace(DEBUG_2, **TINY, ffn_hidden_dim=96, tied_embeddings=True),
    "qwen3": replace(QWEN3["debugmodel"], **TINY, ffn_hidden_dim=96, head_width=32),
    "mixtral": replace(MIXTRAL["debugmodel"], **TINY, ffn_hidden_dim=48, n_experts=4),
    "qwen3 moe": replace(
        QWEN3["debugmodel_moe"],
        **TINY,
        ffn_hidden_dim=96,
        expert_hidden_dim=48,
        n_experts=4,
        n_dense_layers=1,
        tied_embeddings=False,
    ),
}
FAMILIES = {"llama": "llama2", "qwen3": "qwen3", "mixtral": "mixtral"}


def build(shape, dtype=torch.float32, seed=0):
    """Return our model with random weights, norms among them."""
    torch.manual_seed(seed)
    model = Transformer(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("norm.weight")
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if is_norm else 0.08) + is_norm)
    return model.to(dtype)


def save_checkpoint(folder: Path, name: str, model, **keys) -> Path:
    """Write a model as a whole checkpoint, in a process group of one."""
    shape = asdict(model.shape)
    config = JobConfig().parse_args([], 0).model_dump(mode="json")
    config["model"] |= {"name": FAMILIES[name.split()[0]], "flavor": "debugmodel", **keys}
    config["training"]["seq_len"] = 64
    inner = folder / "temporary"
    inner.mkdir(parents=True)
    weights = {f"model/{key}": weight.detach() for key, weight in model.named_parameters()}
    records = write_tensors(inner, weights, dist.group.WORLD)
    progress = Progress(step=7, tokens_seen=0, data={}, config=config, shape=shape)
    commit.commit(inner, folder / "step-7", progress, records)
    return folder / "step-7"


def edit_config(folder: Path, **fields) -> None:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    kept = {key: value for key, value in config.items() if value is not None}
    path.write_text(json.dumps(kept))
