"""The largest models on their hundreds of GPUs, set up without any: a fake process group, the meta device."""

import json
import subprocess
import sys

import pytest
from launching import ROOT

SET_UP = """
import json, sys, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtrain.config_manager import JobConfig, model_shape
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms.apply import parallelize
from torchtrain.parallelisms.parallel_dims import ParallelDims

config = JobConfig().parse_args(["--job.config_file", sys.argv[1], "--compile.enable=false"], int(sys.argv[2]))
dist.init_process_group("fake", rank=0, world_size=int(sys.argv[2]), store=FakeStore())
dims = ParallelDims.from_config(config.parallelism, dist.get_world_size())
mesh = dims.build_mesh("cpu")
with torch.device("meta"):
    model = Transformer(model_shape(config.model))
parallelize(model, mesh, dims, config)
parameters = dict(model.named_parameters())
print(json.dumps({
    "mesh": [list(mesh.mesh_dim_names), list(mesh.shape)],
    "whole": sum(p.numel() for p in parameters.values()),
    "local": sum(p.to_local().numel() for p in parameters.values()),
    "dims": [len(p.placements) for p in parameters.values()],
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "ranks", "parameters"),
    [
        ("llama2_70b", 256, 68_976_648_192),
        ("llama3_70b", 256, 70_553_706_496),
        ("llama3_405b", 512, 405_853_388_800),
    ],
)
def test_the_largest_models_are_laid_out_evenly(file, ranks, parameters):
    toml = str(ROOT / "train_configs" / f"{file}.toml")
    process = subprocess.run(
        [sys.executable, "-c", SET_UP, toml, str(ranks)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr
    facts = json.loads(process.stdout.splitlines()[-1])
    assert facts["mesh"] == [["dp_shard", "tp"], [ranks // 8, 8]]
    assert facts["whole"] == parameters
    assert set(facts["dims"]) == {2}, "a parameter is on neither or on one dimension of the mesh alone"
    # Norms are whole on each rank of tensor parallelism, so a rank holds a little more than its even share.
    assert parameters / ranks <= facts["local"] < 1.01 * parameters / ranks
