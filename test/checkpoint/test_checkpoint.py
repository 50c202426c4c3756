"""Checkpoints: bitwise on any number of ranks, complete or not there at every instant, and never executed."""

import dataclasses
import hashlib
import json
import logging
import os
import pickle
import shutil
import signal
import stat
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.forking import in_group
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from torchtrain.checkpoint import checkpointer as checkpoint
from torchtrain.checkpoint.checkpointer import INDEX, MARKER, STATE, Checkpointer, Progress
from torchtrain.config.schema import Checkpoint
from torchtrain.errors import CheckpointError, UserError

# A tiny model whose sizes no number of ranks divides


class Tiny(nn.Module):
    """[B, 6] -> [B, 7]; output is tied to the embedding, and 3 rows over 4 ranks leave one rank without any."""

    def __init__(self, width: int = 5):
        super().__init__()
        self.tok_embeddings = nn.Embedding(7, 6)
        self.layers = nn.ModuleDict({"0": nn.Linear(6, width), "1": nn.Linear(width, 6)})
        self.norm = nn.Parameter(torch.ones(3, 2))
        self.output = nn.Linear(6, 7, bias=False)
        self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens):
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return self.output(x * self.norm.flatten())


def build(
    mesh_shape: tuple[int, ...] = (), seed: int = 0, lr: float = 0.01, fused: bool = False, **shape
):
    """The sharded model and its optimizer of two groups; the mesh is of all ranks unless its shape is given."""
    torch.manual_seed(seed)
    model = Tiny(**shape)
    shape_of_mesh = mesh_shape or (dist.get_world_size(),)
    mesh = init_device_mesh(
        "cpu", shape_of_mesh, mesh_dim_names=("replicate", "shard")[-len(shape_of_mesh) :]
    )
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    decayed = [p for p in model.parameters() if p is not model.norm]
    groups = [{"params": decayed}, {"params": [model.norm], "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=lr, weight_decay=0.1, fused=fused)


def weights(model) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def of_weights(built):
    model, optimizer = built
    return weights(model), optimizer


def train(model, optimizer, steps: range) -> None:
    """The same samples on every rank, so that the number of ranks changes nothing but the rounding."""
    for step in steps:
        tokens = torch.randint(0, 7, (8,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of the training state, whole, by the name the file should give it."""
    tensors = {
        f"model/{name}": whole(t)
        for name, t in model.state_dict().items()
        if name != "output.weight"
    }
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = whole(value)
    return tensors


def assert_bitwise(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    differing = [
        k
        for k in expected
        if found[k].dtype != expected[k].dtype or not torch.equal(found[k], expected[k])
    ]
    assert not differing


def section(**options) -> Checkpoint:
    return Checkpoint(**{"enable": True, "interval": 2, "keep_latest_k": 0, **options})


def progress(step: int) -> Progress:
    return Progress(
        step,
        100 * step,
        {"next_sample": 8 * step, "corpus": "abc"},
        {"training": {"steps": 9, "seed": None}},
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoint").iterdir())


# Several ranks


def _save_on_two(run: Path) -> None:
    """Save after 3 steps; keep the whole state beside it, and that after 2 more steps."""
    model, optimizer = build()
    train(model, optimizer, range(3))
    saved = everything(model, optimizer)
    checkpointer = Checkpointer(section(), run)
    held = weights(model)
    checkpointer.prepare(held, optimizer)
    with torch.no_grad():
        model(
            torch.arange(3)
        )  # as a validation pass does, this leaves the root's parameters gathered, not sharded
    assert not isinstance(model.norm, DTensor)
    torch.manual_seed(1000 + dist.get_rank())
    checkpointer.save(held, optimizer, progress(3))
    drawn = torch.rand(4)
    torch.save(drawn, run / f"drawn-{dist.get_rank()}.pt")
    assert_bitwise(everything(model, optimizer), saved)
    train(model, optimizer, range(3, 5))
    later = everything(model, optimizer)
    if dist.get_rank() == 0:
        torch.save((saved, later), run / "expected.pt")


def _load(run: Path, mesh_shape: tuple[int, ...] = (), save_step: int | None = None) -> None:
    """Load into another initial state, on this layout, and compare; two more steps on two ranks are bitwise too."""
    saved, later = torch.load(run / "expected.pt", weights_only=True)
    model, optimizer = build(mesh_shape, seed=1, lr=0.01)
    checkpointer = Checkpointer(section(), run)
    source = checkpointer.find()
    assert source.path == run / "checkpoint" / f"step-{source.progress.step}"
    assert (source.progress, source.model_only) == (progress(3), False)
    checkpointer.load(source, weights(model), optimizer)
    assert_bitwise(everything(model, optimizer), saved)
    if dist.get_world_size() == 2:
        assert torch.equal(torch.rand(4), torch.load(run / f"drawn-{dist.get_rank()}.pt"))
        train(model, optimizer, range(3, 5))
        assert_bitwise(everything(model, optimizer), later)
    if mesh_shape:  # what HSDP writes, one process reads
        other = Checkpointer(section(folder="hsdp"), run)
        other.save(weights(model), optimizer, progress(3))
        plain_model, plain_optimizer = build(seed=2)
        other.load(other.find(), weights(plain_model), plain_optimizer)
        assert_bitwise(everything(plain_model, plain_optimizer), saved)


@pytest.mark.slow
def test_saved_on_two_ranks_loads_bitwise_on_any_layout(tmp_path):
    in_group(2, _save_on_two, tmp_path)
    assert names(tmp_path) == ["step-3"]
    marker = json.loads((tmp_path / "checkpoint/step-3" / MARKER).read_text())
    assert set(marker["files"]) == {"__0_0.distcp", "__1_0.distcp", INDEX, STATE}
    for name, record in marker["files"].items():
        content = (tmp_path / "checkpoint/step-3" / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    in_group(1, _load, tmp_path)
    in_group(2, _load, tmp_path)
    in_group(4, _load, tmp_path)
    in_group(4, _load, tmp_path, (2, 2))


def _raises_everywhere(action, said: str) -> None:
    started = time.monotonic()
    with pytest.raises(Exception, match=said):  # an Exception, which DCP's own is not
        action()
    assert time.monotonic() - started < 10


def _faults_on_one_rank(run: Path) -> None:
    rank = dist.get_rank()
    model, optimizer = build()
    checkpointer = Checkpointer(section(), run)
    checkpointer.save(weights(model), optimizer, progress(1))
    patch = pytest.MonkeyPatch()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    def no_memory(device):
        raise MemoryError("no memory for the random states")

    with patch.context() as one:
        if rank == 1:
            one.setattr(checkpoint._HashingFile, "write", no_space)
        _raises_everywhere(
            lambda: checkpointer.save(weights(model), optimizer, progress(2)),
            "rank 1.*No space left",
        )
    with patch.context() as one:
        if rank == 1:
            one.setattr(checkpoint, "_rng_tensors", no_memory)
        _raises_everywhere(
            lambda: checkpointer.save(weights(model), optimizer, progress(2)), "no memory for"
        )
    with patch.context() as one:
        one.setattr(checkpoint._HashingFileSystem, "rename", no_space)  # rank 0 alone gets there
        _raises_everywhere(
            lambda: checkpointer.save(weights(model), optimizer, progress(2)),
            "rank 0.*No space left",
        )
    with patch.context() as one:
        if rank == 1:  # its file went to a disk of its own
            one.setattr(checkpoint._HashingFileSystem, "create_stream", _elsewhere(run))
        _raises_everywhere(
            lambda: checkpointer.save(weights(model), optimizer, progress(2)),
            "that all ranks share",
        )
    with patch.context() as one:
        if rank == 1:
            one.setattr(checkpoint.Path, "exists", lambda self: False)
        _raises_everywhere(
            lambda: checkpointer.prepare(weights(model), optimizer), "that all ranks share"
        )
    dist.barrier()  # rank 0 has removed its probe
    assert names(run) == ["step-1"]
    checkpointer.save(weights(model), optimizer, progress(2))
    assert names(run) == ["step-1", "step-2"]

    target = run / "checkpoint/step-2"
    source = checkpointer.find()
    with patch.context() as one:
        if rank == 1:
            one.setattr(checkpoint._Reader, "read_data", no_space)
        _raises_everywhere(
            lambda: checkpointer.load(source, weights(model), optimizer), "rank 1.*No space left"
        )
    dist.barrier()
    if (
        rank == 0
    ):  # damage in a file that the other rank hashes: .metadata, __0_0, __1_0, train_state in turn
        flip(target / "__0_0.distcp", 2000)
    dist.barrier()
    assert checkpointer.find().progress.step == 1
    assert names(run) == ["step-1", "step-2.damaged"]


def _elsewhere(run: Path):
    @contextmanager
    def create_stream(self, path, mode):
        with checkpoint._HashingFile(run / "elsewhere") as file:
            yield file
        self.written[Path(path).name] = {"bytes": file.count, "sha256": file.sha256.hexdigest()}

    return create_stream


@pytest.mark.slow
def test_an_error_on_one_rank_is_raised_on_all_and_leaves_earlier_checkpoints(tmp_path):
    in_group(2, _faults_on_one_rank, tmp_path)


# One rank, in this process


@pytest.fixture
def alone():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def log(caplog, monkeypatch):
    """The lines logged so far, as one text."""
    logger = logging.getLogger("torchtrain")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="torchtrain")
    return caplog


def saved_run(run: Path, steps: tuple[int, ...] = (1, 2, 3), **options) -> SimpleNamespace:
    """A run that saved after those steps, with the whole state at each."""
    model, optimizer = build()
    checkpointer = Checkpointer(section(**options), run)
    states, done = {}, 0
    for step in steps:
        train(model, optimizer, range(done, step))
        done = step
        checkpointer.save(weights(model), optimizer, progress(step))
        states[step] = everything(model, optimizer)
    return SimpleNamespace(
        model=model, optimizer=optimizer, checkpointer=checkpointer, states=states
    )


def loaded(run: Path, **options) -> tuple[int, dict[str, torch.Tensor]]:
    """What a new launch finds: its step and, after loading, the whole state."""
    model, optimizer = build(seed=5)
    checkpointer = Checkpointer(section(**options), run)
    source = checkpointer.find()
    checkpointer.load(source, weights(model), optimizer)
    return source.progress.step, everything(model, optimizer)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)


def test_which_steps_are_saved():
    due = Checkpointer.should_save

    def steps(**options):
        return [s for s in range(1, 8) if due(SimpleNamespace(config=section(**options)), s, 7)]

    assert steps() == [2, 4, 6, 7]
    assert steps(enable_first_step_checkpoint=True) == [1, 2, 4, 6, 7]
    assert steps(load_only=True) == steps(enable=False) == []


@pytest.mark.parametrize("fused", [False, True])
def test_hyperparameters_are_never_loaded_and_missing_states_are_made(tmp_path, alone, fused):
    first = saved_run(tmp_path, (2,))
    model, optimizer = build(seed=1, lr=0.5, fused=fused)
    optimizer.param_groups[0]["weight_decay"] = 0.7
    assert not optimizer.state
    checkpointer = Checkpointer(section(), tmp_path)
    checkpointer.load(checkpointer.find(), weights(model), optimizer)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.5, 0.7),
        (0.5, 0.0),
    ]
    assert_bitwise(everything(model, optimizer), first.states[2])
    assert model.output.weight is model.tok_embeddings.weight


def test_states_made_for_the_checkpoint_are_those_of_the_first_step(tmp_path, alone):
    for fused in (False, True):
        untouched, prepared = build(fused=fused), build(fused=fused)
        Checkpointer(section(folder=f"{fused}"), tmp_path).prepare(
            weights(prepared[0]), prepared[1]
        )
        train(*untouched, range(2))
        train(*prepared, range(2))
        assert_bitwise(everything(*prepared), everything(*untouched))
        pairs = zip(untouched[1].state.values(), prepared[1].state.values(), strict=True)
        assert all(
            a[k].device == b[k].device and a[k].dtype == b[k].dtype for a, b in pairs for k in a
        )


def test_disabled_or_empty_means_a_start_at_zero(tmp_path, alone):
    saved_run(tmp_path, (1,))
    assert Checkpointer(section(enable=False), tmp_path).find() is None
    assert Checkpointer(section(), tmp_path / "fresh").find() is None
    unfinished = tmp_path / "fresh/checkpoint/.tmp-step-3-abc"
    unfinished.mkdir(parents=True)
    (unfinished / MARKER).write_text("{}")
    assert Checkpointer(section(), tmp_path / "fresh").find() is None


def test_the_same_step_is_not_written_again(tmp_path, alone, log):
    run = saved_run(tmp_path, (2,))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint/step-2").iterdir()}
    train(run.model, run.optimizer, range(1))
    run.checkpointer.save(weights(run.model), run.optimizer, progress(2))
    assert "already there" in log.text
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint/step-2").iterdir()
    }
    (tmp_path / "checkpoint/step-2" / MARKER).unlink()
    run.checkpointer.save(weights(run.model), run.optimizer, progress(2))
    assert names(tmp_path) == ["step-2", "step-2.incomplete"]
    assert "step-2.incomplete" in log.text
    assert_bitwise(loaded(tmp_path)[1], everything(run.model, run.optimizer))


def test_a_slice_that_dcp_lost_fails_the_save(tmp_path, alone, monkeypatch):
    run = saved_run(tmp_path, (1,))
    write_data = checkpoint._Writer.write_data

    def lossy(self, plan, planner):
        return write_data(self, dataclasses.replace(plan, items=plan.items[:-1]), planner)

    monkeypatch.setattr(checkpoint._Writer, "write_data", lossy)
    with pytest.raises(CheckpointError, match=r"DCP wrote \d+ of \d+ slices"):
        run.checkpointer.save(weights(run.model), run.optimizer, progress(2))
    assert names(tmp_path) == ["step-1"]


def test_retention_counts_only_complete_checkpoints(tmp_path, alone):
    run = saved_run(tmp_path, (1, 2, 3, 4, 5))
    (tmp_path / "checkpoint/step-4" / MARKER).unlink()
    (tmp_path / "checkpoint/.tmp-step-9-dead").mkdir()
    limited = Checkpointer(section(keep_latest_k=3), tmp_path)
    limited.save(weights(run.model), run.optimizer, progress(6))
    assert names(tmp_path) == ["step-3", "step-4", "step-5", "step-6"]
    Checkpointer(section(keep_latest_k=1), tmp_path).save(
        weights(run.model), run.optimizer, progress(7)
    )
    assert names(tmp_path) == ["step-4", "step-7"]


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, alone, log, monkeypatch):
    run = saved_run(tmp_path, (1,))

    def busy(path, **_):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    Checkpointer(section(keep_latest_k=1), tmp_path).save(
        weights(run.model), run.optimizer, progress(2)
    )
    assert "could not be removed" in log.text
    monkeypatch.undo()
    assert loaded(tmp_path)[0] == 2


DAMAGE = {
    "truncated tensors": lambda step: os.truncate(step / "__0_0.distcp", 3000),
    "flipped bit in the tensors": lambda step: flip(step / "__0_0.distcp", 2500),
    "flipped bit in the index": lambda step: flip(step / INDEX, 100),
    "flipped bit in the state": lambda step: flip(step / STATE, 20),
    "longer tensors": lambda step: (step / "__0_0.distcp").open("ab").write(b"x"),
    "missing tensors": lambda step: (step / "__0_0.distcp").unlink(),
    "missing index": lambda step: (step / INDEX).unlink(),
    "missing state": lambda step: (step / STATE).unlink(),
    "missing marker": lambda step: (step / MARKER).unlink(),
    "empty marker": lambda step: (step / MARKER).write_text(""),
    "marker of nothing": lambda step: (step / MARKER).write_text('{"format": 1, "files": {}}'),
    "marker that leads outside": lambda step: (step / MARKER).write_text(
        (step / MARKER).read_text().replace(STATE, f"../step-1/{STATE}")
    ),
    "empty folder": lambda step: [path.unlink() for path in step.iterdir()],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_used(tmp_path, alone, log, kind):
    run = saved_run(tmp_path, (1, 2))
    DAMAGE[kind](tmp_path / "checkpoint/step-2")
    with pytest.raises(UserError, match=r"checkpoint\.load_step = 2 .*Complete steps in .*: 1\."):
        Checkpointer(section(load_step=2), tmp_path).find()
    assert Checkpointer(section(load_only=True), tmp_path).find().progress.step == 1
    assert names(tmp_path) == ["step-1", "step-2"]
    step, state = loaded(tmp_path)
    assert step == 1
    assert_bitwise(state, run.states[1])
    aside = "step-2.incomplete" if kind in ("missing marker", "empty folder") else "step-2.damaged"
    assert names(tmp_path) == ["step-1", aside]
    warning = next(
        r.getMessage()
        for r in log.records
        if r.levelno == logging.WARNING and aside in r.getMessage()
    )
    assert "step-2 is not usable" in warning
    # The step is taken again, and may be damaged again.
    run.checkpointer.save(weights(run.model), run.optimizer, progress(2))
    DAMAGE[kind](tmp_path / "checkpoint/step-2")
    assert loaded(tmp_path)[0] == 1
    assert names(tmp_path) == ["step-1", aside, f"{aside}-2"]


def test_training_never_starts_over_when_all_checkpoints_are_damaged(tmp_path, alone):
    saved_run(tmp_path, (1, 2))
    for step in (1, 2):
        flip(tmp_path / f"checkpoint/step-{step}" / STATE, 5)
    elsewhere = tmp_path / "elsewhere"
    saved_run(elsewhere, (4,))
    for _ in range(2):  # at the next launch too, when they have been renamed
        with pytest.raises(UserError, match="none of them is a complete checkpoint"):
            Checkpointer(
                section(initial_load_path=str(elsewhere / "checkpoint/step-4")), tmp_path
            ).find()
    assert names(tmp_path) == ["step-1.damaged", "step-2.damaged"]


def test_load_step_takes_that_step_and_supersedes_later_ones(tmp_path, alone, log):
    run = saved_run(tmp_path, (1, 2, 3))
    with pytest.raises(
        UserError, match=r"checkpoint\.load_step = 7 .*not there.*Complete steps in .*: 1, 2, 3"
    ):
        Checkpointer(section(load_step=7), tmp_path).find()
    step, state = loaded(tmp_path, load_step=1, load_only=True)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
    step, state = loaded(tmp_path, load_step=1)
    assert step == 1
    assert_bitwise(state, run.states[1])
    assert names(tmp_path) == ["step-1", "step-2.superseded", "step-3.superseded"]
    assert "step-3.superseded" in log.text


def test_initial_load_path(tmp_path, alone, log):
    other = saved_run(tmp_path / "other", (4,))
    path = tmp_path / "other/checkpoint/step-4"

    def source(run, **options):
        return Checkpointer(section(initial_load_path=str(path), **options), tmp_path / run).find()

    # The weights alone: optimizer states stay those of a new run.
    found = source("new")
    assert (found.path, found.model_only, found.progress) == (path, True, progress(4))
    model, optimizer = build(seed=3)
    Checkpointer(section(), tmp_path / "new").load(found, weights(model), optimizer)
    expected = {key: value for key, value in other.states[4].items() if key.startswith("model/")}
    assert_bitwise(everything(model, optimizer), expected)
    # All of it.
    found = source("new", initial_load_model_only=False)
    assert not found.model_only
    Checkpointer(section(), tmp_path / "new").load(found, weights(model), optimizer)
    assert_bitwise(everything(model, optimizer), other.states[4])
    # The run's own go first, and that is said.
    saved_run(tmp_path / "new", (1,))
    assert source("new").progress.step == 1
    assert "initial_load_path is not used" in log.text
    # A foreign checkpoint is never renamed.
    flip(path / "__0_0.distcp", 2000)
    with pytest.raises(UserError, match=r"initial_load_path = .*__0_0\.distcp is damaged"):
        source("third")
    assert names(tmp_path / "other") == ["step-4"]
    path = tmp_path / "nowhere"
    with pytest.raises(UserError, match=r"initial_load_path = .*it is not there"):
        source("third")


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, alone):
    saved_run(tmp_path, (1,))
    checkpointer = Checkpointer(section(), tmp_path)
    source = checkpointer.find()
    with pytest.raises(
        UserError, match=r"another shape model/layers\.0\.bias \[5\] instead of \[9\]"
    ):
        checkpointer.load(source, *of_weights(build(width=9)))
    model, _ = build()
    model.extra = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match="lacks model/extra, optimizer/extra/exp_avg,"):
        checkpointer.load(source, weights(model), optimizer)
    model, optimizer = build()
    model.norm = None
    with pytest.raises(UserError, match="has, unknown to this model, model/norm"):
        checkpointer.load(source, weights(model), None)
    torch.manual_seed(0)
    half = Tiny().bfloat16()
    with pytest.raises(
        UserError, match=r"another precision model/.* torch.float32 instead of torch.bfloat16"
    ):
        checkpointer.load(source, weights(half), torch.optim.AdamW(half.parameters()))
    checkpointer.load(source, weights(half), None)  # weights alone are converted
    assert names(tmp_path) == ["step-1"]


def test_a_later_format_is_refused_and_left_alone(tmp_path, alone):
    saved_run(tmp_path, (1,))
    marker = tmp_path / "checkpoint/step-1" / MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 2, "news": 1}))
    with pytest.raises(UserError, match="has format 2"):
        Checkpointer(section(), tmp_path).find()
    assert names(tmp_path) == ["step-1"]


# Before training


def test_room_for_two_checkpoints_is_asked_for(tmp_path, alone, monkeypatch):
    model, optimizer = build()
    parameters = sum(p.numel() for p in model.parameters())
    needed = 2 * (3 * 4 * parameters + 4 * len(list(model.parameters())))  # + Adam's steps
    checkpointer = Checkpointer(section(), tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    checkpointer.prepare(weights(model), optimizer)
    assert names(tmp_path) == []
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(
        UserError, match=f"{tmp_path}/checkpoint has .* GiB free, but two checkpoints need"
    ):
        checkpointer.prepare(weights(model), optimizer)


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, alone):
    (tmp_path / "checkpoint").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpointer(section(), tmp_path).prepare(*of_weights(build()))


def test_what_dead_runs_left_is_swept(tmp_path, alone):
    saved_run(tmp_path, (1,))
    (tmp_path / "checkpoint/.tmp-step-2-dead").mkdir()
    (tmp_path / "checkpoint/.tmp-step-2-dead/__0_0.distcp").write_text("half")
    (tmp_path / "checkpoint/.tmp-probe-dead").write_text("x")
    Checkpointer(section(), tmp_path).prepare(*of_weights(build()))
    assert names(tmp_path) == ["step-1"]


# Nothing from a file is executed


class _Payload:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _reseal(step: Path) -> None:
    """Make the marker's sizes and digests match the files again, as one who tampers would."""
    marker = json.loads((step / MARKER).read_text())
    for name, record in marker["files"].items():
        content = (step / name).read_bytes()
        record.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (step / MARKER).write_text(json.dumps(marker))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, alone):
    saved_run(tmp_path, (1,))
    step, proof = tmp_path / "checkpoint/step-1", tmp_path / "it ran"
    good = (step / INDEX).read_bytes()

    def edited(change) -> bytes:
        index = pickle.loads(good)
        change(index)
        return pickle.dumps(index)

    def lead_outside(index):
        next(iter(index.storage_data.values())).relative_path = "../../secret"

    dotted = b"\x80\x04\x8c\x27torch.distributed.checkpoint.metadata\x8c\x1aMetadata.__init__.__globals__\x93."
    attacks = {
        "os.mkdir": pickle.dumps(_Payload(os.mkdir, str(proof))),
        "builtins.exec": pickle.dumps(_Payload(exec, f"open({str(proof)!r}, 'w')")),
        "in an entry": edited(
            lambda index: index.state_dict_metadata.update(bad=_Payload(os.mkdir, str(proof)))
        ),
        "bytes": edited(
            lambda index: index.state_dict_metadata.update({"model/norm": BytesStorageMetadata()})
        ),
        "no tensor": edited(lambda index: index.state_dict_metadata.update({"model/norm": "text"})),
        "a dotted name": dotted,
        "another file": edited(lead_outside),
        "no index": pickle.dumps({"a": 1}),
        "no pickle": b"not a pickle",
    }
    for name, attack in attacks.items():
        (step / INDEX).write_bytes(attack)
        _reseal(step)
        checkpointer = Checkpointer(section(), tmp_path)
        source = checkpointer.find()
        with pytest.raises(UserError, match="is refused"):
            checkpointer.load(source, *of_weights(build()))
        assert not proof.exists(), name
    # The attack is a real one: an unrestricted unpickler falls for it.
    pickle.loads(attacks["os.mkdir"])
    assert proof.exists()


def test_tensors_are_read_without_running_code(tmp_path, alone):
    saved_run(tmp_path, (1,))
    step, proof = tmp_path / "checkpoint/step-1", tmp_path / "it ran"
    index = pickle.loads((step / INDEX).read_bytes())
    first = next(iter(index.storage_data.values()))
    torch.save(_Payload(os.mkdir, str(proof)), tmp_path / "attack.pt")
    attack = (tmp_path / "attack.pt").read_bytes()
    content = (step / first.relative_path).read_bytes()
    first.offset, first.length = len(content), len(attack)
    (step / first.relative_path).write_bytes(content + attack)
    (step / INDEX).write_bytes(pickle.dumps(index))
    _reseal(step)
    checkpointer = Checkpointer(section(), tmp_path)
    with pytest.raises(CheckpointError, match=r"rank 0.*Weights only load failed"):
        checkpointer.load(checkpointer.find(), *of_weights(build()))
    assert not proof.exists()


# A crash at any instant


def test_all_is_synced_before_the_rename_and_the_rename_after(tmp_path, alone, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename

    def recording_fsync(descriptor):
        state = os.fstat(descriptor)
        events.append((state.st_ino, None if stat.S_ISDIR(state.st_mode) else state.st_size))
        fsync(descriptor)

    def recording_rename(source, target):
        events.append((Path(source).name.split("-")[0], Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    saved_run(tmp_path, (1,))
    monkeypatch.undo()
    step = tmp_path / "checkpoint/step-1"
    at = events.index((".tmp", "step-1"))
    for path in step.iterdir():  # with its full size: flushed first
        assert (path.stat().st_ino, path.stat().st_size) in events[:at], path.name
    marker = (step / MARKER).stat()
    assert events[:at][-2:] == [(marker.st_ino, marker.st_size), (step.stat().st_ino, None)]
    assert events[at + 1 :] == [(step.parent.stat().st_ino, None)]


class Crash:
    """An audit hook that lets N operations on a folder pass and then none, as if the process had died there."""

    EVENTS = frozenset(
        {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"}
    )

    def __init__(self, folder: Path, die: bool = False):
        self.folder, self.die, self.left, self.last = str(folder), die, None, ""
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.left is None or event not in self.EVENTS or self.folder not in str(arguments[0]):
            return
        self.last = f"{event} {arguments[0]}"
        self.left -= 1
        if self.left < 0:
            if self.die:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(5, "crashed")


def test_a_crash_before_any_file_operation_leaves_a_whole_checkpoint(tmp_path, alone):
    """Save step 2 over step 1, keeping one; die before the first, second, … operation; launch again."""
    run = saved_run(tmp_path / "start", (1,))
    before = run.states[1]
    train(run.model, run.optimizer, range(1, 2))
    after = everything(run.model, run.optimizer)
    folder = tmp_path / "run"
    crash = Crash(folder)
    outcomes = []
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "start", folder)
        checkpointer = Checkpointer(section(keep_latest_k=1), folder)
        crash.left = len(outcomes)
        with suppress(OSError, RuntimeError):
            checkpointer.save(weights(run.model), run.optimizer, progress(2))
        died, crash.left = crash.left < 0, None
        step, state = loaded(folder)
        assert_bitwise(state, {1: before, 2: after}[step])
        outcomes.append(step)
        again = Checkpointer(section(keep_latest_k=1), folder)
        again.save(weights(run.model), run.optimizer, progress(3))
        assert not [name for name in names(folder) if name.startswith(".tmp-")]
        if not died:
            break
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}
    assert len(outcomes) > 15


def _killed_while_saving(run: Path, operations: int) -> None:
    model, optimizer = build()
    train(model, optimizer, range(2))
    crash = Crash(run, die=True)
    crash.left = operations
    Checkpointer(section(keep_latest_k=1), run).save(weights(model), optimizer, progress(2))


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path, alone):
    run = saved_run(tmp_path / "start", (1,))
    train(run.model, run.optimizer, range(1, 2))
    after = everything(run.model, run.optimizer)
    outcomes = set()
    for operations in (
        6,
        11,
        19,
        22,
    ):  # among the tensors, before the marker, while the old one is removed
        folder = tmp_path / f"run-{operations}"
        shutil.copytree(tmp_path / "start", folder)
        in_group(1, _killed_while_saving, folder, operations, expect=-signal.SIGKILL)
        step, state = loaded(folder)
        assert_bitwise(state, {1: run.states[1], 2: after}[step])
        outcomes.add(step)
    assert outcomes == {1, 2}
