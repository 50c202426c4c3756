"""Several ranks: bitwise on any layout, and a fault of one rank is raised on all."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.checkpoints import (
    assert_bitwise,
    build,
    everything,
    flip,
    names,
    progress,
    record_of,
    section,
    train,
    weights,
)
from helpers.forking import in_group
from torch.distributed.tensor import DTensor

from torchtrain.checkpoint import Checkpointer, state, storage
from torchtrain.checkpoint.commit import INDEX, MARKER, STATE
from torchtrain.checkpoint.digests import make_record

pytestmark = pytest.mark.slow


def save_on_two(run: Path) -> None:
    """Save after 3 steps; keep the whole state beside it, and that after 2 more steps."""
    model, optimizer = build()
    train(model, optimizer, range(3))
    saved = everything(model, optimizer)
    saver = Checkpointer(section(), run)
    held = weights(model)
    with pytest.MonkeyPatch.context() as patch:  # room for two, in which what is shared counts once
        needed = 2 * sum(tensor.nbytes for tensor in saved.values())
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
        saver.prepare(held, optimizer)
    # As a validation pass does, this leaves the root's parameters gathered, not sharded.
    with torch.no_grad():
        model(torch.arange(3))
    assert not isinstance(model.norm, DTensor)
    torch.manual_seed(1000 + dist.get_rank())
    saver.save(held, optimizer, progress(3))
    torch.save(torch.rand(4), run / f"drawn-{dist.get_rank()}.pt")
    assert_bitwise(everything(model, optimizer), saved)
    train(model, optimizer, range(3, 5))
    later = everything(model, optimizer)
    if dist.get_rank() == 0:
        torch.save((saved, later), run / "expected.pt")


def load_in_one_mesh_and_in_two(run: Path) -> None:
    load(run)
    load(run, (2, 2))


def load(run: Path, mesh_shape: tuple[int, ...] = ()) -> None:
    """Load into another initial state, on this layout, and compare.

    Two more steps on two ranks are bitwise too.
    """
    saved, later = torch.load(run / "expected.pt", weights_only=True)
    model, optimizer = build(mesh_shape, seed=1)
    loader = Checkpointer(section(), run)
    source = loader.find()
    assert source.path == run / "checkpoint" / "step-3"
    assert source.progress == progress(3)
    assert not source.model_only
    random = torch.get_rng_state()
    loader.load(source, weights(model), optimizer)
    assert_bitwise(everything(model, optimizer), saved)
    if dist.get_world_size() != 2:  # the random states belong to the ranks of the layout that saved
        assert torch.equal(torch.get_rng_state(), random)
    if dist.get_world_size() == 2:
        assert torch.equal(torch.rand(4), torch.load(run / f"drawn-{dist.get_rank()}.pt"))
        train(model, optimizer, range(3, 5))
        assert_bitwise(everything(model, optimizer), later)
    if mesh_shape:  # what HSDP writes can be read
        other = Checkpointer(section(folder="hsdp"), run)
        other.save(weights(model), optimizer, progress(3))
        plain_model, plain_optimizer = build(seed=2)
        other.load(other.find(), weights(plain_model), plain_optimizer)
        assert_bitwise(everything(plain_model, plain_optimizer), saved)


def test_saved_on_two_ranks_loads_bitwise_on_any_layout(tmp_path):
    in_group(2, save_on_two, tmp_path)
    assert names(tmp_path) == ["step-3"]
    marker = json.loads((tmp_path / "checkpoint/step-3" / MARKER).read_text())
    assert set(marker["files"]) == {"__0_0.distcp", "__1_0.distcp", INDEX, STATE}
    for name, record in marker["files"].items():
        content = (tmp_path / "checkpoint/step-3" / name).read_bytes()
        assert record == record_of(content)
    in_group(1, load, tmp_path)
    in_group(2, load, tmp_path)
    in_group(4, load_in_one_mesh_and_in_two, tmp_path)


def no_space(*_):
    raise OSError(28, "No space left on device")


def no_memory(*_):
    raise MemoryError("no memory for the random states")


def elsewhere(run: Path):
    """Return a `create_stream` that writes to a disk of this rank's own."""

    @contextmanager
    def create_stream(self, path, mode):
        with storage.HashingFile(run / "elsewhere") as file:
            yield file
        self.written[Path(path).name] = make_record(file.count, file.hasher)

    return create_stream


SAVE_FAULTS = {
    "a full disk": (1, storage.HashingFile, "write", no_space, "rank 1.*No space left"),
    "no memory": (1, state, "list_random_states", no_memory, "no memory for"),
    "index": (0, storage.HashingFileSystem, "rename", no_space, "rank 0.*No space left"),
}
"""By name: on which rank, what is replaced, and what all ranks say."""


def faults_on_one_rank(run: Path) -> None:
    rank = dist.get_rank()
    model, optimizer = build()
    saver = Checkpointer(section(), run)
    train(model, optimizer, range(1))
    saver.save(weights(model), optimizer, progress(1))

    def fails(action, said: str) -> None:
        with pytest.raises(Exception, match=said):  # an Exception, which DCP's own is not
            action()
        dist.barrier()  # both have failed, and rank 0 has removed what it had written
        assert names(run) == ["step-1"]
        dist.barrier()  # both have looked

    def save() -> None:
        saver.save(weights(model), optimizer, progress(2))

    for failing, owner, name, fault, said in SAVE_FAULTS.values():
        with pytest.MonkeyPatch.context() as patch:
            if rank == failing:
                patch.setattr(owner, name, fault)
            fails(save, said)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(storage.HashingFileSystem, "create_stream", elsewhere(run))
        fails(save, "that all ranks share")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Path, "exists", lambda self: False)
        fails(lambda: saver.prepare(weights(model), optimizer), "that all ranks share")
    save()
    assert names(run) == ["step-1", "step-2"]

    source = saver.find()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(storage.Reader, "read_data", no_space)
        with pytest.raises(Exception, match=r"rank 1.*No space left"):
            saver.load(source, weights(model), optimizer)
    if rank == 0:  # the other rank hashes it: .metadata, __0_0, __1_0, train_state.json in turn
        flip(run / "checkpoint/step-2/__0_0.distcp", 2000)
    dist.barrier()
    assert saver.find().progress.step == 1
    assert names(run) == ["step-1", "step-2.damaged"]


def test_an_error_on_one_rank_is_raised_on_all_and_leaves_earlier_checkpoints(tmp_path):
    in_group(2, faults_on_one_rank, tmp_path)
