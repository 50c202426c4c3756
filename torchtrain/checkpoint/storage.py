"""The files of tensors: hashed while written, and read by an index that cannot run code."""

import io
import os
import pickle
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from torchtrain.checkpoint.commit import INDEX, MARKER, Marker
from torchtrain.checkpoint.digests import FileRecord, make_record, new_hasher
from torchtrain.errors import CheckpointError, UserError
from torchtrain.utils import plural, remove_if_possible, user_errors, writing

PROBE_BYTES = 2**24
"""At most so many bytes are written per rank to find out how fast the disk is."""


def write_tensors(
    folder: Path,
    tensors: dict[str, Tensor],
    group: dist.ProcessGroup,
    planner: dcp.SavePlanner | None = None,
) -> dict[str, FileRecord]:
    """Write this rank's share of the tensors; return a record of each file that it wrote.

    Args:
        folder: where to.
        tensors: by name.
        group: of all ranks.
        planner: where the tensors are not what is to be written, but says where that comes from.

    Raises:
        CheckpointError: writing failed on any rank.
    """
    # To copy from the device ahead of writing waits for its stream: nothing for a copy on the host.
    on_host = all(tensor.device.type == "cpu" for tensor in tensors.values())
    writer = Writer(folder, copy_ahead=0 if on_host else 10**7)
    planner = planner or DefaultSavePlanner(flatten_state_dict=False)
    try:
        with plain_faults(f"writing {folder}"), without_crc32():
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointError as fault:
        # What a full disk raises need not say so: a stream that is cut off fails in its own words.
        free = shutil.disk_usage(folder.parent).free / 2**30
        raise CheckpointError(f"{fault} ({free:,.2f} GiB are free there)") from fault
    return writer.files.written


@contextmanager
def without_crc32() -> Iterator[None]:
    """Have torch.save leave out its own checksums: nothing reads them, and they take time."""
    before = get_crc32_options()
    set_crc32_options(compute_crc32=False)
    try:
        yield
    finally:
        set_crc32_options(before)


def read_tensors(
    folder: Path, metadata: Metadata, tensors: dict[str, Tensor], group: dist.ProcessGroup
) -> None:
    """Read into these tensors, in place; DCP does it with `torch.load(weights_only=True)`.

    Raises:
        CheckpointError: reading failed on any rank.
    """
    reader = Reader(folder, metadata)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    with plain_faults(f"reading {folder}"):
        dcp.load(tensors, storage_reader=reader, planner=planner, process_group=group)


class HashingFile(io.BufferedWriter):
    """A new file that hashes what passes through, and when closed is flushed and then synced."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(io.FileIO(path, "xb"))
        self.hasher = new_hasher()
        self.count = 0
        self.fault: OSError | None = None
        """The disk's, of the write that failed first."""

    def write(self, data: Any) -> int:
        """Write, hash and count."""
        try:
            written = super().write(data)
        except OSError as fault:
            self.fault = self.fault or fault
            raise
        self.hasher.update(data)
        self.count += written
        return written

    def close(self) -> None:
        """Flush, sync and close."""
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
        finally:
            super().close()


def time_writing(path: Path, size: int) -> float:
    """Return how many seconds it takes to write `size` bytes to a new file, by a part of them.

    A small part can fit a cache on the way to the disk: what is left to do is longer than this.

    Raises:
        UserError: it cannot be written.
    """
    piece = os.urandom(2**20)  # not zeros, which some file systems do not write
    part = min(size, PROBE_BYTES)
    began = time.monotonic()
    try:
        with writing(path), HashingFile(path) as file:
            for begin in range(0, part, len(piece)):
                file.write(piece[: part - begin])
    finally:
        remove_if_possible(path)
    return (time.monotonic() - began) * size / max(part, 1)


class HashingFileSystem(FileSystem):
    """DCP's access to the disk while saving; `written` holds a record of each file by its name."""

    def __init__(self) -> None:
        self.written: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(  # type: ignore[override]
        self, path: str | os.PathLike[str], mode: str
    ) -> Iterator[io.IOBase]:
        """Open a new file to write to.

        Raises:
            OSError: the disk's fault, over which torch's zip writer raises one of its own.
        """
        assert mode == "wb"
        with HashingFile(path) as file:
            try:
                yield file
            except RuntimeError as fault:
                raise file.fault or fault from None
        self.written[Path(path).name] = make_record(file.count, file.hasher)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename, as DCP does to finish the index."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class Writer(dcp.FileSystemWriter):
    """One thread and one file per rank, through the hashing file system, which also syncs."""

    def __init__(self, path: Path, copy_ahead: int) -> None:
        super().__init__(
            path,
            single_file_per_rank=True,
            sync_files=False,
            thread_count=1,
            per_thread_copy_ahead=copy_ahead,
            overwrite=False,
        )
        self.files = HashingFileSystem()
        self.fs = self.files

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, after counting what was written: DCP can swallow a writer's error."""
        planned = sum(len(entry.chunks) for entry in list_entries(metadata).values())
        written = sum(map(len, results))
        if written != planned:
            raise CheckpointError(f"DCP wrote {written} of {planned} slices to {self.path}")
        super().finish(metadata, results)

    def storage_meta(self) -> StorageMeta:
        """Return nothing: the temporary path is of no use, and one class more to unpickle."""
        return StorageMeta()


class Reader(dcp.FileSystemReader):
    """Reads by an index that was unpickled and checked before."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index, without reading the file again."""
        return self.metadata


@contextmanager
def plain_faults(doing: str) -> Iterator[None]:
    """Turn DCP's exception into a CheckpointError of one line.

    DCP raises the faults of all ranks on all ranks, as a BaseException with stacks.
    """
    try:
        yield
    except dcp.CheckpointException as fault:
        causes = [
            f"rank {rank}: {type(error).__name__}: {error}"
            for rank, (error, _) in sorted(fault.failures.items())
        ]
        raise CheckpointError(f"{doing} failed on {'; '.join(causes)}") from fault


# The classes of which DCP's index of tensors is made, and no function that does anything.
UNPICKLED = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),  # looks a name up in a table
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    }
)


# What other programs' indexes name besides: entries that are no tensors, which nothing reads, and
# the folder that they were written to.
UNPICKLED_ELSEWHERE = UNPICKLED | {
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class IndexUnpickler(pickle.Unpickler):
    """An unpickler that knows the `allowed` names and the dtypes of torch alone."""

    def __init__(self, content: bytes, allowed: Collection[tuple[str, str]]) -> None:
        super().__init__(io.BytesIO(content))
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """Return the class of that name, if it is allowed."""
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_dtype or (module, name) in self.allowed:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which no index of tensors needs"
        )


def list_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Return the index's entries by name.

    Raises:
        UnpicklingError: an entry is raw bytes, which DCP would unpickle without restriction.
    """
    entries = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"its entry {name!r} is not a tensor")
        entries[name] = entry
    return entries


def find_contradiction(folder: Path, marker: Marker) -> str | None:
    """Say in what the marker differs from the index, whose digest was checked, if in anything.

    Raises:
        UserError: the index is not one of tensors in files of its folder.
    """
    metadata = read_index(folder, None)
    files = {info.relative_path for info in metadata.storage_data.values()}
    for name in sorted(files - marker.files.keys()):
        return f"its {MARKER} is damaged: it does not name {name}"
    ranks = {name.split("/")[1] for name in list_entries(metadata) if name.startswith("rng/")}
    if ranks and len(ranks) != marker.world_size:
        return (
            f"its {MARKER} is damaged: its world_size is {marker.world_size}, and it has the "
            f"random states of {plural(len(ranks), 'rank')}"
        )
    return None


def read_index(
    folder: Path, own_files: Collection[str] | None, *, foreign: bool = False
) -> Metadata:
    """Read DCP's index with the restricted unpickler.

    Args:
        folder: of the checkpoint.
        own_files: the names of its files; None: any in its folder.
        foreign: whether another program wrote it; its entries that are no tensors are left out.

    Raises:
        UserError: it holds anything but tensors in the checkpoint's own files.
    """
    path = folder / INDEX
    # A pickle that was tampered with can raise anything.
    with user_errors(f"{path} is refused, and nothing in it was run", Exception):
        allowed = UNPICKLED_ELSEWHERE if foreign else UNPICKLED
        metadata: Metadata = IndexUnpickler(path.read_bytes(), allowed).load()
        if foreign:
            metadata.state_dict_metadata = {
                name: entry
                for name, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
        list_entries(metadata)
        files = {info.relative_path for info in metadata.storage_data.values()}
    if own_files is None:
        own_files = [name for name in files if Path(name).name == name]
    outside = sorted(files - set(own_files))
    if outside:
        raise UserError(
            f"{path} is refused: it points to files that are not the checkpoint's: {outside}"
        )
    return metadata
