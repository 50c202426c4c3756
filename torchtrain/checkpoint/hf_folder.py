"""A model in Hugging Face's form: a folder with config.json and safetensors files.

Any slice of a weight can be read, so that no rank reads more than it holds. Writing one is
`torchtrain.tools.hf_export`'s.

Sources: https://huggingface.co/docs/safetensors/metadata_parsing and the index that transformers
writes beside several files.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchtrain.catalog.models import ModelShape
from torchtrain.errors import UserError
from torchtrain.models.decoder import load_decoder
from torchtrain.models.hf_config import to_shape
from torchtrain.models.hf_names import find_counterpart, order_as_pairs
from torchtrain.shards import Box
from torchtrain.utils import describe_differences, first_few, user_errors

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in safetensors; other types are those of quantized weights."""
DERIVED = "rotary_emb.inv_freq"
"""End of the names of tensors that old exports have, and that follow from config.json."""


@dataclass
class HFFolder:
    """A folder whose config.json and list of tensors are read."""

    path: Path
    family: str
    """The model family here that the architecture belongs to."""
    shape: ModelShape
    seq_len: int | None
    """Longest sequence that config.json says it takes, in tokens."""
    files: dict[str, Path]
    """The file of each tensor, by Hugging Face's names."""
    _open: dict[Path, Any] = field(default_factory=dict)

    def tensor(self, name: str) -> Any:
        """Return the slice-able tensor of this name, nothing of it read yet."""
        path = self.files[name]
        if path not in self._open:
            with user_errors(f"{path} is damaged, or not a safetensors file", SafetensorError):
                self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_slice(name)

    def check(self) -> dict[str, torch.Size]:
        """Check every tensor's presence, shape and type; return our weights' shapes by name.

        Raises:
            UserError: names what is missing, unknown or of another shape or type.
        """
        with torch.device("meta"):
            model = load_decoder(self.family)(self.shape)
        sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
        wanted = {}
        for name, size in sizes.items():
            theirs = find_counterpart(name, self.shape)
            for tensor in theirs.names:
                wanted[tensor] = list(size[1:] if theirs.is_stacked else size)
        unknown = [name for name in self.files.keys() - wanted if not name.endswith(DERIVED)]
        if self.shape.tied_embeddings and "lm_head.weight" in unknown:
            unknown.remove("lm_head.weight")  # some programs write it twice
        misfits = [
            f"{name} {self.tensor(name).get_shape()} {self.tensor(name).get_dtype()}, not {size}"
            for name, size in wanted.items()
            if name in self.files and not self._fits(name, size)
        ]
        faults = {
            "lacks": sorted(wanted.keys() - self.files),
            "has, unknown here,": sorted(unknown),
            "has in another shape or type": misfits,
        }
        found = describe_differences(faults)
        if found:
            raise UserError(f"{self.path} is not what its {CONFIG} says: {found}")
        return sizes

    def _fits(self, name: str, size: list[int]) -> bool:
        tensor = self.tensor(name)
        return tensor.get_shape() == size and tensor.get_dtype() in DTYPES

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of our weight of this name."""
        first = find_counterpart(name, self.shape).names[0]
        return DTYPES[self.tensor(first).get_dtype()]

    def read(self, name: str, box: Box) -> Tensor:
        """Read that part of our weight of this name, and not much more."""
        theirs = find_counterpart(name, self.shape)
        if theirs.is_stacked:
            (first, count), *inner = box
            tensors = theirs.names[first : first + count]
            return torch.stack([self._read_slice(tensor, inner) for tensor in tensors])
        if theirs.rotated_width == 0:
            return self._read_slice(theirs.names[0], box)
        # Rows move within a head: those of whole heads are read.
        width = theirs.rotated_width
        (start, length), *inner = box
        first_row = start // width * width
        rows = -(-(start + length) // width) * width - first_row
        heads = self._read_slice(theirs.names[0], [(first_row, rows), *inner])
        return order_as_pairs(heads, width).narrow(0, start - first_row, length)

    def _read_slice(self, tensor: str, box: Box) -> Tensor:
        slices = tuple(slice(start, start + length) for start, length in box)
        read: Tensor = self.tensor(tensor)[slices]
        return read


def open_hf_folder(path: Path) -> HFFolder:
    """Open a folder, or one safetensors file with its config.json beside it.

    Raises:
        UserError: something is missing or damaged, or the model is none of ours.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}: it is not a model in Hugging Face's form")
    config = read_json(folder / CONFIG)
    with user_errors(f"{folder / CONFIG}", UserError):
        family, shape = to_shape(config)
    files = _list_tensors(_find_files(path))
    return HFFolder(path, family, shape, config.get("max_position_embeddings"), files)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UserError: it does not.
    """
    with user_errors(f"{path} is damaged", ValueError, OSError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    return content


def _find_files(path: Path) -> list[Path]:
    """Return the safetensors files of a model."""
    if path.is_file():
        return [path]
    if (path / INDEX).is_file():
        listed = read_json(path / INDEX).get("weight_map")
        if not isinstance(listed, dict):
            raise UserError(f"{path / INDEX} is damaged: it has no weight_map")
        names = sorted(set(listed.values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UserError(f"{path} is incomplete: {INDEX} names {first_few(missing)}")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if len(files) > 1:
        raise UserError(f"{path} has {len(files)} safetensors files, but no {INDEX}")
    pickled = " It has .bin files, which hold code as well: save it with transformers again"
    raise UserError(f"{path} has no safetensors file.{pickled if list(path.glob('*.bin')) else ''}")


def _list_tensors(files: Iterable[Path]) -> dict[str, Path]:
    """Return the file of each tensor."""
    found = {}
    for path in files:
        message = f"{path} is damaged, cut off, or not a safetensors file"
        with user_errors(message, SafetensorError, OSError):
            names = safe_open(path, framework="pt").keys()
        found.update(dict.fromkeys(names, path))
    return found
