"""The models that the benchmark trains, as options of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchtrain.errors import UserError
from torchtrain.utils import nearest


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and its batch."""

    description: str
    model: Mapping[str, Any]
    """Keys of [model]."""
    seq_len: int
    """Tokens per sequence."""
    batch: int
    """Sequences that a rank computes at a time; each step is one such microbatch per rank."""
    steps: int = 24
    """Of a run; the first third warms up."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Where it is measured unless `--sizes` says otherwise."""


SIZES = {
    "host": Size(
        description="so small that a step is the time of Python and of kernel launches",
        model={"dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "ffn_hidden_dim": 128},
        seq_len=32,
        batch=1,
        steps=60,
    ),
    "debug": Size(
        description="the model of train_configs/debug_model.toml",
        model={},
        seq_len=128,
        batch=24,
        steps=30,
        devices=("cpu",),
    ),
    "36M": Size(
        description="512 wide, 8 layers, vocabulary 8,192",
        model={
            "dim": 512,
            "n_layers": 8,
            "n_heads": 8,
            "n_kv_heads": 8,
            "ffn_hidden_dim": 1536,
            "vocab_size": 8192,
        },
        seq_len=512,
        batch=8,
    ),
    "125M": Size(
        description="768 wide, 12 layers, vocabulary 50,304, tied",
        model={
            "dim": 768,
            "n_layers": 12,
            "n_heads": 12,
            "n_kv_heads": 12,
            "ffn_hidden_dim": 2048,
            "vocab_size": 50304,
            "tied_embeddings": True,
        },
        seq_len=512,
        batch=4,
        steps=12,
    ),
    "1B": Size(
        description="Llama 3.2 1B",
        model={"name": "llama3", "flavor": "1B", "vocab_size": 128256},
        seq_len=4096,
        batch=4,
        devices=("cuda",),
    ),
    "8B-blocks": Size(
        description="4 of the 32 blocks of Llama 3.1 8B, vocabulary 8,192",
        model={"name": "llama3", "flavor": "8B", "n_layers": 4, "vocab_size": 8192},
        seq_len=4096,
        batch=4,
        devices=("cuda",),
    ),
}
"""By name, from small to large."""


def choose_sizes(asked: str | None, device: str) -> dict[str, Size]:
    """Return the sizes that `--sizes` names, by default those of the device.

    Raises:
        UserError: there is no size of a name.
    """
    if asked is None:
        return {name: size for name, size in SIZES.items() if device in size.devices}
    names = [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in SIZES:
            close = nearest(name, SIZES)
            hint = f"; did you mean {close}?" if close else ""
            raise UserError(f"--sizes: {name!r} is none of {', '.join(SIZES)}{hint}")
    return {name: SIZES[name] for name in names}
