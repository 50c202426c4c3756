"""The device mesh: which ranks share what, by hand, on a fake process group of many ranks."""

import json

import pytest
import torch.distributed as dist
from helpers.forking import on_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtrain.config.layout import Degrees
from torchtrain.parallelisms.mesh import Mesh

NAMES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def find(cases, results):
    """What each of some ranks finds in a mesh of these degrees."""
    found = []
    for degrees, rank in cases:
        degrees = Degrees(**dict(zip(NAMES, degrees, strict=True)))
        size = degrees.data_parallel * degrees.ranks_per_sample
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        mesh = Mesh(degrees, "cpu", sequence_shards=degrees.tp)
        groups = {
            name: dist.get_process_group_ranks(mesh.group(name))
            for name in NAMES
            if mesh.group(name) is not None
        }
        facts = {
            "data_rank": mesh.data_rank,
            "coordinates": [mesh.rank_along(name) for name in NAMES],
            "groups": groups,
            "fsdp": [list(mesh.fsdp.shape), mesh.fsdp.mesh.flatten().tolist()],
            "all_groups": sorted(
                dist.get_process_group_ranks(group) for group in mesh.all_groups()
            ),
        }
        found.append(facts)
        dist.destroy_process_group()
    results.write_text(json.dumps(found))


# Degrees in the order of NAMES, the rank, and what it must find.
CASES = [
    (
        # Two ranks along each dimension: the coordinates are 21's binary digits, 10101.
        (2, 2, 2, 2, 2),
        21,
        {
            "coordinates": [1, 0, 1, 0, 1],
            "data_rank": 1,
            "groups": {
                "pp": [5, 21],
                "dp_replicate": [21, 29],
                "dp_shard": [17, 21],
                "cp": [21, 23],
                "tp": [20, 21],
            },
            "fsdp": [[2, 4], [17, 19, 21, 23, 25, 27, 29, 31]],
        },
    ),
    (
        (1, 2, 3, 1, 1),
        4,
        {
            "coordinates": [0, 1, 1, 0, 0],
            "data_rank": 4,
            "groups": {"dp_replicate": [1, 4], "dp_shard": [3, 4, 5]},
            "fsdp": [[2, 3], [0, 1, 2, 3, 4, 5]],
        },
    ),
    (
        (2, 1, 3, 1, 2),
        9,
        {
            "coordinates": [1, 0, 1, 0, 1],
            "data_rank": 1,
            "groups": {"pp": [3, 9], "dp_shard": [7, 9, 11], "tp": [8, 9]},
            "fsdp": [[3], [7, 9, 11]],
        },
    ),
    (
        (1, 1, 1, 1, 1),
        0,
        {
            "coordinates": [0, 0, 0, 0, 0],
            "data_rank": 0,
            "groups": {},
            "fsdp": [[1], [0]],
        },
    ),
]


def find_experts(results):
    """What ranks of pipeline 2, replicas 2, data shard 2, context 2, tensor 2 find of experts."""
    found = []
    for rank, ep in ((21, 4), (21, 1), (28, 8)):
        degrees = Degrees(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2, ep=ep)
        dist.init_process_group("fake", rank=rank, world_size=32, store=FakeStore())
        mesh = Mesh(degrees, "cpu", has_experts=True)
        groups = [dist.get_process_group_ranks(group) for group in mesh.all_groups()]
        shared = mesh.experts.mesh.tolist() if ep > 1 else [rank]
        assert ep == 1 or shared in groups
        fsdp = mesh.fsdp_experts
        assert fsdp["expert_shard"].mesh.tolist() in groups
        found.append([shared, list(fsdp.shape), fsdp.mesh.flatten().tolist(), mesh.data_rank])
        dense = Mesh(degrees, "cpu")
        assert dense.fsdp_experts is dense.fsdp
        dist.destroy_process_group()
    results.write_text(json.dumps(found))


@pytest.mark.slow
def test_experts_use_the_same_ranks_in_another_grid(tmp_path):
    """Ranks 16 to 23 are stage 1's first replica, 24 to 31 its second."""
    on_ranks(1, find_experts, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == [
        [[20, 21, 22, 23], [2, 2], [17, 21, 25, 29], 1],
        [[21], [2, 8], list(range(16, 32)), 1],
        [list(range(24, 32)), [2, 1], [20, 28], 3],
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = tmp_path_factory.mktemp("meshes") / "found.json"
    on_ranks(1, find, [(degrees, rank) for degrees, rank, _ in CASES], results)
    return json.loads(results.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_rank_finds_its_place_and_its_groups(found, number):
    expected = CASES[number][2]
    assert {key: found[number][key] for key in expected} == expected
    for ranks in expected["groups"].values():
        assert ranks in found[number]["all_groups"]


@pytest.mark.slow
def test_what_is_counted_in_a_hang_includes_the_group_over_which_fsdp_shards(found):
    """Under context parallelism that is a group of its own, of the ranks along both dimensions."""
    assert [17, 19, 21, 23] in found[0]["all_groups"]
