"""The command that takes a model to Hugging Face's form, and back.

    python -m torchtrain.tools.convert to-hf CHECKPOINT FOLDER [--dtype TYPE]
        [--shard-size GB] [--tokenizer PATH]
    python -m torchtrain.tools.convert from-hf FOLDER_OR_FILE OUTPUT

CHECKPOINT is the folder of a run, or of one checkpoint. One process does it, and holds one file's
tensors at a time, or one tensor.
"""

import argparse
import glob
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from torchtrain.catalog.identity import ModelIdentity, compare_models
from torchtrain.catalog.models import FAMILIES, TRANSFORMER, ModelShape
from torchtrain.checkpoint import commit
from torchtrain.checkpoint.commit import Progress
from torchtrain.checkpoint.hf_folder import CONFIG, HFFolder, open_hf_folder
from torchtrain.checkpoint.storage import list_entries, read_index, read_tensors, write_tensors
from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config.reading import Source as ConfigSource
from torchtrain.config.toml import toml_value
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.dtypes import DTYPES
from torchtrain.errors import UserError
from torchtrain.logging_utils import init_logging
from torchtrain.orphans import end_with_rank
from torchtrain.tools.hf_export import Export, write_hf_folder
from torchtrain.tools.hf_tokenizer import write_tokenizer
from torchtrain.tools.trained_model import find_trained
from torchtrain.utils import expand_user, output_path, plural, user_errors


def to_hf(
    checkpoint: str,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    tokenizer: str | None = None,
) -> None:
    """Write the model and tokenizer of a checkpoint as a Hugging Face folder.

    Args:
        checkpoint: folder of a run or of one of its checkpoints.
        output: folder to make.
        dtype: of the weights; None: as they are.
        shard_bytes: largest size of one file, in bytes.
        tokenizer: its file or folder; None: the run's.

    Raises:
        UserError: there is no whole checkpoint, no such model there, or the output is not empty.
    """
    trained = find_trained(checkpoint)
    if (trained.path / CONFIG).exists():
        raise UserError(f"{trained.path} is in Hugging Face's form already")
    family = trained.identity.family
    if family not in FAMILIES or FAMILIES[family].model != TRANSFORMER:
        raise UserError(
            f"{checkpoint} holds a model of {family!r}, which Hugging Face does not have"
        )
    source = Path(tokenizer or trained.tokenizer or DEBUG_TOKENIZER)
    ids = load_tokenizer(source)
    files = [path.name for path in trained.path.iterdir()]
    metadata = read_index(trained.path, files)
    entries = list_entries(metadata)
    sizes = {
        name.removeprefix("model/"): (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith("model/")
    }
    rows = sizes["tok_embeddings.weight"][0][0]
    export = Export(
        shape=ModelShape(**{**trained.identity.shape, "vocab_size": rows}),
        seq_len=trained.seq_len,
        special_ids={"bos_token_id": ids.bos_id, "eos_token_id": ids.eos_id},
        dtype=dtype,
        shard_bytes=shard_bytes,
    )

    def read(name: str) -> Tensor:
        size, stored = sizes[name]
        weight = torch.empty(size, dtype=stored)
        read_tensors(trained.path, metadata, {f"model/{name}": weight}, alone())
        return weight

    with new_folder(output) as folder:
        written = write_hf_folder(folder, sizes, read, export)
        write_tokenizer(source, folder, model_max_length=trained.seq_len)
        folder.rename(output)
    print(f"{trained.path} is now {output}: {plural(len(written), 'file')} and the tokenizer")


class StreamingPlanner(DefaultSavePlanner):
    """Reads each weight as it is written: what is saved are tensors without memory."""

    def __init__(self, folder: HFFolder) -> None:
        super().__init__(flatten_state_dict=False)
        self.folder = folder

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the weight to write."""
        assert write_item.tensor_data is not None
        box = [(0, length) for length in write_item.tensor_data.size]
        name = write_item.index.fqn.removeprefix("model/")
        return self.folder.read(name, box).contiguous()


def from_hf(source: Path, output: Path) -> None:
    """Write a Hugging Face folder's model as a checkpoint, to start from.

    Raises:
        UserError: the folder is damaged, incomplete, or of a model that is not ours; the output
            is not empty.
    """
    if not source.exists():
        raise UserError(f"there is no {str(source)!r} (looked from {Path.cwd()})")
    folder = open_hf_folder(source)
    sizes = folder.check()
    section = describe_model(folder)
    home = source if source.is_dir() else source.parent
    if (home / "tokenizer.json").exists() or (home / "tokenizer.model").exists():
        section["tokenizer_path"] = str(home.resolve())
    values: dict[str, Any] = {f"model.{key}": value for key, value in section.items()}
    if folder.seq_len is not None:
        values["training.seq_len"] = folder.seq_len
    config = JobConfig().parse_args([], 0, ConfigSource(str(source), values))
    progress = Progress(
        step=0,
        tokens_seen=0,
        data={},
        config=config.model_dump(mode="json"),
        shape=asdict(folder.shape),
    )
    with new_folder(output) as temporary:
        tensors = {
            f"model/{name}": torch.empty(size, dtype=folder.dtype(name), device="meta")
            for name, size in sizes.items()
        }
        records = write_tensors(temporary, tensors, alone(), StreamingPlanner(folder))
        commit.commit(temporary, output, progress, records)
    lines = "\n".join(f"{key} = {toml_value(value)}" for key, value in section.items())
    print(
        f"{source} is now the checkpoint {output}. To train on:\n\n[model]\n{lines}\n\n"
        f"[checkpoint]\nenable = true\ninitial_load_path = {toml_value(str(output))}"
    )


def alone() -> dist.ProcessGroup:
    """Return the group of this process."""
    group = dist.group.WORLD
    assert group is not None
    return group


def describe_model(folder: HFFolder) -> dict[str, Any]:
    """Return the keys of [model] that give this shape: a flavor's name where one has it."""
    wanted = ModelIdentity(family=folder.family, shape=asdict(folder.shape))
    for family, entry in FAMILIES.items():
        for flavor, shape in entry.flavors.items():
            has_rows = shape.vocab_size == folder.shape.vocab_size
            known = ModelIdentity(family=family, shape=asdict(shape))
            if has_rows and not compare_models(known, wanted):
                return {"name": family, "flavor": flavor}
    # Any flavor of the family: each of its values is given.
    flavor = next(iter(FAMILIES[folder.family].flavors))
    return {"name": folder.family, "flavor": flavor, **asdict(folder.shape)}


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder, to be renamed to `target`; after an error it is gone.

    What a killed conversion to the same target left is removed.

    Raises:
        UserError: the target is there and not empty, or cannot be made.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{str(target)!r} is there already, and not empty")
    random = "[0-9a-f]" * 32
    for leftover in target.parent.glob(f".tmp-{glob.escape(target.name)}-{random}"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex}")
    with user_errors(f"{str(target)!r} cannot be written", OSError):
        temporary.mkdir(parents=True)
    try:
        with user_errors(f"{str(target)!r} cannot be written", OSError):
            yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; a faulty one ends with status 2."""
    parser = argparse.ArgumentParser(
        prog="torchtrain convert",
        description="Take a model to Hugging Face's form, and back.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("to-hf", help="from a checkpoint to a Hugging Face folder")
    out.add_argument("checkpoint", help="folder of a run, or of one of its checkpoints")
    out.add_argument("output", type=output_path, metavar="folder", help="folder to make")
    out.add_argument("--dtype", choices=DTYPES, help="type of the weights (as they are)")
    out.add_argument("--shard-size", type=float, default=5.0, help="GB of one file (%(default)s)")
    out.add_argument("--tokenizer", help="its file or folder (the run's)")
    back = commands.add_parser("from-hf", help="from a Hugging Face folder to a checkpoint")
    back.add_argument("source", type=expand_user, help="the folder, or one safetensors file in it")
    back.add_argument("output", type=output_path, help="folder of the checkpoint to make")
    given = parser.parse_args(arguments)
    if given.command == "to-hf" and not given.shard_size > 0:
        parser.error(f"--shard-size {given.shard_size}: must be above 0")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 2 for a user error, else 0."""
    end_with_rank()
    given = read_arguments(arguments)
    init_logging()
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        if given.command == "to-hf":
            to_hf(
                given.checkpoint,
                given.output,
                dtype=DTYPES.get(given.dtype),
                shard_bytes=int(given.shard_size * 10**9),
                tokenizer=given.tokenizer,
            )
        else:
            from_hf(given.source, given.output)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
