"""A tiny sharded model, its training state, and runs of it that save and load checkpoints."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from torchtrain.checkpoint import Checkpointer, Progress
from torchtrain.config.schema import Checkpoint


class Tiny(nn.Module):
    """[B] -> [B, 7]; no number of ranks divides its sizes, and its output is tied to the embedding.

    Over 4 ranks the 3 rows of the norm leave one without any.
    """

    def __init__(self, width: int = 5, bias: bool = True):
        super().__init__()
        self.tok_embeddings = nn.Embedding(7, 6)
        self.layers = nn.ModuleDict(
            {"0": nn.Linear(6, width, bias=bias), "1": nn.Linear(width, 6, bias=bias)}
        )
        self.norm = nn.Parameter(torch.ones(3, 2))
        self.output = nn.Linear(6, 7, bias=False)
        self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens):
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return self.output(x * self.norm.flatten())


def build_model(mesh_shape: tuple[int, ...] = (), seed: int = 0, **shape) -> Tiny:
    """Build the sharded model; the mesh is of all ranks unless its shape is given."""
    torch.manual_seed(seed)
    model = Tiny(**shape)
    sizes = mesh_shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def build(
    mesh_shape: tuple[int, ...] = (), seed: int = 0, lr: float = 0.01, fused: bool = False, **shape
):
    """Build the model and AdamW with two groups."""
    model = build_model(mesh_shape, seed, **shape)
    decayed = [p for p in model.parameters() if p is not model.norm]
    groups = [{"params": decayed}, {"params": [model.norm], "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=lr, weight_decay=0.1, fused=fused)


def weights(model) -> dict[str, nn.Parameter]:
    """Return the parameters by name, the tied one once."""
    return dict(model.named_parameters())


def train(model, optimizer, steps: range) -> None:
    """Take these steps, each on the same samples on every rank: their number changes no loss."""
    for step in steps:
        tokens = torch.randint(0, 7, (8,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(value) -> torch.Tensor:
    """Return a copy of a state, a number too, as one unsharded tensor."""
    if not isinstance(value, torch.Tensor):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    """Return every tensor of the training state, whole, by the name the file should give it."""
    tensors = {}
    for name, weight in model.state_dict().items():  # which leaves the weights sharded
        if name != "output.weight":
            tensors[f"model/{name}"] = whole(weight)
    for name, parameter in weights(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer/{name}/{key}"] = whole(value)
    return tensors


def bits(tensor: torch.Tensor) -> bytes:
    """Return the tensor's bytes, in which -0 is not 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_bitwise(found: dict, expected: dict) -> None:
    """Check that both have the same tensors, of the same types, to the bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def section(**options) -> Checkpoint:
    """Return the config's section with saving enabled; a save is done when it returns."""
    given = {"enable": True, "interval": 2, "keep_latest_k": 0, "async_mode": "disabled"}
    return Checkpoint(**{**given, **options})


def progress(step: int) -> Progress:
    """Return some progress that names its step."""
    return Progress(
        step=step,
        tokens_seen=100 * step,
        data={"next_sample": 8 * step, "corpus": "abc"},
        config={"training": {"steps": 9, "seed": None}},
    )


def names(run: Path) -> list[str]:
    """Return what is in the run's folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoint").iterdir())


@dataclass
class SavedRun:
    """A run that has saved, with the whole state at each step that it saved."""

    model: Tiny
    optimizer: torch.optim.Optimizer
    checkpointer: Checkpointer
    states: dict[int, dict[str, torch.Tensor]]

    def save(self, step: int, checkpointer: Checkpointer | None = None) -> None:
        """Save what the run holds now as this step."""
        (checkpointer or self.checkpointer).save(
            weights(self.model), self.optimizer, progress(step)
        )


def saved_run(run: Path, steps: tuple[int, ...] = (1, 2, 3), **options) -> SavedRun:
    """Train in `run`, saving after these steps."""
    model, optimizer = build()
    saved = SavedRun(model, optimizer, Checkpointer(section(**options), run), {})
    done = 0
    for step in steps:
        train(model, optimizer, range(done, step))
        done = step
        saved.save(step)
        saved.states[step] = everything(model, optimizer)
    return saved


def loaded(run: Path, **options) -> tuple[int, dict[str, torch.Tensor]]:
    """Return what a new launch finds in `run`: its step and, after loading, the whole state."""
    model, optimizer = build(seed=5)
    checkpointer = Checkpointer(section(**options), run)
    source = checkpointer.find()
    checkpointer.load(source, weights(model), optimizer)
    return source.progress.step, everything(model, optimizer)


def record_of(content: bytes) -> dict:
    """Return what a marker says of a file with that content."""
    return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def flip(path: Path, position: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)
