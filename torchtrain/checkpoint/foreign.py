"""Weights that other programs saved: Hugging Face's folders, and torchtitan's DCP folders.

Only weights are taken. Each rank reads the part that it holds.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from torchtrain.catalog.identity import ModelIdentity
from torchtrain.checkpoint.commit import INDEX, STATE
from torchtrain.checkpoint.hf_folder import HFFolder, open_hf_folder
from torchtrain.checkpoint.state import Weights
from torchtrain.checkpoint.storage import list_entries, read_index, read_tensors
from torchtrain.errors import UserError
from torchtrain.ranks import gathered, together
from torchtrain.shards import find_local_box, local
from torchtrain.utils import describe_differences, first_few, plural


@dataclass(frozen=True)
class HFSource:
    """A model in Hugging Face's form."""

    path: Path
    identity: ModelIdentity
    """The model, by its config.json."""
    folder: HFFolder
    sizes: dict[str, torch.Size]
    """Of our weights, by name, as they are there."""

    @torch.no_grad()
    def load(self, weights: Weights, group: dist.ProcessGroup) -> str:
        """Fill this rank's weights in place; return what was taken, in words. A collective call."""
        together(lambda: _compare(self.path, self.sizes, weights), group)
        together(lambda: self._read(weights), group)
        return "weights in Hugging Face's form"

    def _read(self, weights: Weights) -> None:
        for name, weight in weights.items():
            box = find_local_box(weight)
            if all(length for _, length in box):
                local(weight).copy_(self.folder.read(name, box))


@dataclass(frozen=True)
class TorchtitanSource:
    """A DCP folder of torchtitan, whose models have our names for their weights."""

    path: Path
    metadata: Metadata
    identity: None = None
    """The folder does not say what the weights are the parameters of."""

    @torch.no_grad()
    def load(self, weights: Weights, group: dist.ProcessGroup) -> str:
        """Fill this rank's weights in place; return what was taken, in words. A collective call."""
        entries = list_entries(self.metadata)
        sizes = {name: entry.size for name, entry in entries.items()}
        together(lambda: _compare(self.path, sizes, weights), group)
        everyones: set[str] = set().union(*gathered(list(weights), group))
        read_tensors(self.path, self.metadata, dict(weights), group)
        left_out = first_few(sorted(entries.keys() - everyones)) or "nothing"
        return (
            f"{plural(len(everyones), 'weight')} of torchtitan's; left out: {left_out}. "
            "Such a folder does not record head counts and rotary frequencies: check [model]"
        )


Foreign = HFSource | TorchtitanSource


def _compare(path: Path, sizes: Mapping[str, torch.Size], weights: Weights) -> None:
    """Check that every weight of this rank is there, and has its shape.

    Raises:
        UserError: names those that are not.
    """
    differences = {
        "lacks": [name for name in weights if name not in sizes],
        "has in another shape": [
            f"{name} {list(sizes[name])} instead of {list(weight.shape)}"
            for name, weight in weights.items()
            if name in sizes and sizes[name] != weight.shape
        ],
    }
    found = describe_differences(differences)
    if found:
        raise UserError(f"{path} does not hold this run's model: {found}")


def open_hf_source(path: Path) -> HFSource:
    """Open and check a Hugging Face folder, or one safetensors file beside its config.json.

    Raises:
        UserError: it is damaged, incomplete, or a model that cannot be one of ours.
    """
    folder = open_hf_folder(path)
    identity = ModelIdentity(family=folder.family, shape=asdict(folder.shape))
    return HFSource(path, identity, folder, folder.check())


def is_dcp_folder(path: Path) -> bool:
    """Check whether this is a DCP folder of another program than torchtrain."""
    return (path / INDEX).is_file() and not (path / STATE).exists()


def open_torchtitan_source(path: Path) -> TorchtitanSource:
    """Open torchtitan's DCP folder.

    Raises:
        UserError: the index is refused, or files are missing or cut off.
    """
    metadata = read_index(path, [file.name for file in path.iterdir()], foreign=True)
    cut_off = {
        info.relative_path
        for info in metadata.storage_data.values()
        if (path / info.relative_path).stat().st_size < info.offset + info.length
    }
    if cut_off:
        raise UserError(f"{path} is damaged: cut off are {first_few(sorted(cut_off))}")
    return TorchtitanSource(path, metadata)
