"""The largest models on hundreds of GPUs, set up without any: fake groups, the meta device."""

import json

import pytest
import torch
import torch.distributed as dist
from helpers.forking import on_ranks
from helpers.launching import ROOT
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtrain.config.plans import plan_run
from torchtrain.config_manager import JobConfig
from torchtrain.loss import sequence_losses
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms.apply import Techniques, build_parts, collect_weights, find_own_stages
from torchtrain.parallelisms.mesh import Mesh
from torchtrain.parallelisms.pipeline_parallel import Pipeline

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def facts(config, ranks, rank):
    """What this one of so many ranks has of the model."""
    plan = plan_run(config, ranks)
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    mesh = Mesh(plan.degrees, "cpu", sequence_shards=plan.sequence_shards)
    stages = find_own_stages(plan.stages, config.parallelism.pipeline_parallel_schedule, mesh)
    techniques = Techniques(
        training=config.training,
        parallelism=config.parallelism,
        activation_checkpoint=config.activation_checkpoint,
        compile=config.compile,
    )
    parts = build_parts(Transformer, plan.shape, stages, mesh, techniques)
    if plan.pipeline is not None:
        cpu = torch.device("cpu")
        Pipeline(parts, plan, mesh, cpu, torch.bfloat16, sequence_losses)
    weights = collect_weights(parts.values())
    found = {
        "mesh": {name: mesh.get(name).size() for name in DIMENSIONS if mesh.has(name)},
        "data_rank": mesh.data_rank,
        "names": list(weights),
        "whole": sum(p.numel() for p in weights.values()),
        "local": sum(p.to_local().numel() for p in weights.values()),
        "dims": sorted({len(p.placements) for p in weights.values()}),
        "microbatches": None if plan.pipeline is None else plan.pipeline.microbatches,
    }
    dist.destroy_process_group()
    return found


def find_facts(file, ranks, of, results):
    config = JobConfig().parse_args(
        ["--job.config_file", file, "--training.dataset=c4", "--compile.enable=false"], ranks
    )
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
    assert found["mesh"] == {"dp_shard": ranks // 8, "tp": 8}
    assert found["whole"] == parameters
    assert found["dims"] == [2], "a parameter is on neither or on one dimension of the mesh alone"
    # Norms are whole on each rank of tensor parallelism: it holds a little more than its share.
    assert parameters / ranks <= found["local"] < 1.01 * parameters / ranks


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_405b_is_cut_into_stages_that_together_are_the_model(tmp_path):
    ranks, pipeline, parameters = 512, 8, 405_853_388_800
    each = facts_of(
        tmp_path, "llama3_405b", ranks, [stage * ranks // pipeline for stage in range(pipeline)]
    )
    assert all(stage["mesh"] == {"pp": 8, "dp_shard": 8, "tp": 8} for stage in each)
    assert sum(stage["whole"] for stage in each) == parameters
    names = [name for stage in each for name in stage["names"]]
    assert len(names) == len(set(names)) == 126 * 9 + 3
    for stage in each:
        assert stage["dims"] == [2]
        assert stage["microbatches"] >= pipeline
        # Layers differ by two between stages, norms are whole on each rank of tensor parallelism.
        assert stage["local"] == pytest.approx(parameters / ranks, rel=0.15)
