"""The largest models on their hundreds of GPUs, set up without any: a fake process group, the meta device."""

import json

import pytest
import torch
import torch.distributed as dist
from helpers.forking import on_ranks
from helpers.launching import ROOT
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtrain.config.layout import plan_batch
from torchtrain.config.plans import plan_shape
from torchtrain.config_manager import JobConfig
from torchtrain.loss import sequence_losses
from torchtrain.parallelisms.apply import build_parts, named_weights
from torchtrain.parallelisms.mesh import ParallelDims
from torchtrain.parallelisms.pipeline_parallel import Pipeline


def facts(config, ranks, rank):
    """What this one of so many ranks has of the model."""
    dims = ParallelDims.from_config(config.parallelism, ranks)
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    mesh = dims.build_mesh("cpu")
    parts = build_parts(plan_shape(config.model), mesh, dims, config)
    plan = None
    if dims.pp > 1:
        size = plan_batch(config.training, dims.data_parallel).microbatch_size
        plan = Pipeline(parts, mesh, dims, config, size, torch.device("cpu"), sequence_losses).plan
    weights = named_weights(parts.values())
    dist.destroy_process_group()
    return {
        "mesh": [list(mesh.mesh_dim_names), list(mesh.shape)],
        "names": list(weights),
        "whole": sum(p.numel() for p in weights.values()),
        "local": sum(p.to_local().numel() for p in weights.values()),
        "dims": sorted({len(p.placements) for p in weights.values()}),
        "stages": list(parts),
        "microbatches": None if plan is None else plan.microbatches,
    }


def find_facts(file, ranks, of, results):
    config = JobConfig().parse_args(["--job.config_file", file, "--compile.enable=false"], ranks)
    results.write_text(json.dumps([facts(config, ranks, rank) for rank in of]))


def facts_of(folder, file, ranks, of):
    """Of these ranks, as they would see the model."""
    toml = str(ROOT / "train_configs" / f"{file}.toml")
    on_ranks(1, find_facts, toml, ranks, of, folder / "facts.json")
    return json.loads((folder / "facts.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "ranks", "parameters"),
    [("llama2_70b", 256, 68_976_648_192), ("llama3_70b", 256, 70_553_706_496)],
)
def test_70b_is_laid_out_evenly(tmp_path, file, ranks, parameters):
    (found,) = facts_of(tmp_path, file, ranks, [0])
    assert found["mesh"] == [["dp_shard", "tp"], [ranks // 8, 8]]
    assert found["whole"] == parameters
    assert found["dims"] == [2], "a parameter is on neither or on one dimension of the mesh alone"
    # Norms are whole on each rank of tensor parallelism, so a rank holds a little more than its even share.
    assert parameters / ranks <= found["local"] < 1.01 * parameters / ranks


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_405b_is_cut_into_stages_that_together_are_the_model(tmp_path):
    ranks, pipeline, parameters = 512, 8, 405_853_388_800
    each = facts_of(
        tmp_path, "llama3_405b", ranks, [stage * ranks // pipeline for stage in range(pipeline)]
    )
    assert all(stage["mesh"] == [["pp", "dp_shard", "tp"], [8, 8, 8]] for stage in each)
    assert sum(stage["whole"] for stage in each) == parameters
    names = [name for stage in each for name in stage["names"]]
    assert len(names) == len(set(names)) == 126 * 9 + 3
    for stage in each:
        assert stage["dims"] == [2]
        assert stage["microbatches"] >= pipeline
        # Layers differ by two between stages, norms are whole on each rank of tensor parallelism.
        assert stage["local"] == pytest.approx(parameters / ranks, rel=0.15)
