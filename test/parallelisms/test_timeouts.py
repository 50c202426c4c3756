"""The timeout of every process group that a rank has, by PyTorch's own registry of them."""

import json

import pytest
import torch
import torch.distributed as dist
from helpers.forking import in_group
from helpers.launching import options

from torchtrain.checkpoint import Checkpointer
from torchtrain.config_manager import JobConfig
from torchtrain.set_up import set_up
from torchtrain.watchdog import Watchdog

CP = "parallelism.context_parallel_degree"
TP = "parallelism.tensor_parallel_degree"
PP = "parallelism.pipeline_parallel_degree"
REPLICAS = "parallelism.data_parallel_replicate_degree"
SPARSE = {
    "model.n_experts": 4,
    "model.experts_per_token": 2,
    "parallelism.expert_parallel_degree": 2,
}

INITIAL_S = 41
TRAINING_S = 17
HOURS = 6 * 3600

# Each on four ranks, with the groups that it has beside that of all ranks and those that wait for a
# disk: how PyTorch describes them, and of how many ranks they are.
LAYOUTS = {
    "FSDP": ({}, {}),
    "CP, TP": ({CP: 2, TP: 2}, {"dp_shard": 1, "cp": 2, "tp": 2, "dp_shard_cp": 2}),
    "CP, PP": ({CP: 2, PP: 2}, {"pp": 2, "dp_shard": 1, "cp": 2, "dp_shard_cp": 2}),
    "CP, replicas": (
        {CP: 2, REPLICAS: 2},
        {"dp_replicate": 2, "dp_shard": 1, "cp": 2, "dp_shard_cp": 2},
    ),
    "FSDP, CP": ({CP: 2}, {"dp_shard": 2, "cp": 2}),
    "FSDP, TP, experts": (
        {TP: 2, **SPARSE},
        {"dp_shard": 2, "tp": 2, "pp": 1, "dp_replicate": 1, "expert_shard": 2, "ep": 2},
    ),
}


def find_timeouts():
    """Return the description of each group, and its timeout in seconds, by its name."""
    return {
        group.group_name: (
            group.group_desc.removeprefix("mesh_"),
            group._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
        )
        for group in dist.distributed_c10d._world.pg_map
    }


def list_groups(data, results):
    """Set up each layout in turn; list all groups then, and after the first step."""
    found = {}
    for name, (given, _) in LAYOUTS.items():
        earlier = find_timeouts()
        arguments = {
            **data,
            **given,
            "checkpoint.enable": True,
            "checkpoint.async_mode": "async",
            "comm.init_timeout_seconds": INITIAL_S,
            "comm.train_timeout_seconds": TRAINING_S,
        }
        config = JobConfig().parse_args(options(arguments))
        folder = results.parent / name
        Checkpointer(config.checkpoint, folder)
        trainer = set_up(config, torch.device("cpu"))
        before = find_timeouts()
        Watchdog(config.comm, folder, trainer.mesh, loop=list_groups).end_step()
        sizes = {
            group.group_desc.removeprefix("mesh_"): dist.get_world_size(group)
            for group in dist.distributed_c10d._world.pg_map
            if group.group_name not in earlier and not group.group_desc.startswith("patient")
        }
        found[name] = {"sizes": sizes, "before": before, "after": find_timeouts()}
    if dist.get_rank() == 0:
        results.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory, data):
    results = tmp_path_factory.mktemp("groups") / "found.json"
    in_group(4, list_groups, data, results)
    return json.loads(results.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_group_has_the_timeout_of_the_time(found, name):
    assert found[name]["sizes"] == LAYOUTS[name][1]
    before, after = found[name]["before"], found[name]["after"]
    assert before.keys() == after.keys()
    patient = sorted(text for text, _ in before.values() if text.startswith("patient"))
    assert patient == ["patient: checkpoint", "patient: main"], "each costs a file per rank"
    for group, (description, seconds) in before.items():
        is_patient = description in patient
        assert seconds == (HOURS if is_patient else INITIAL_S), description
        assert after[group][1] == (HOURS if is_patient else TRAINING_S), description
