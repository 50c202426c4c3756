"""What is left of a machine's memory, by the kernel and by cgroups of both versions."""

import math

import pytest

from torchtrain import host_memory
from torchtrain.host_memory import VERSIONS, find_available_bytes

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(lines of /proc/self/cgroup, {cgroup's folder: limit}): 64 GiB are available."""

    def machine_(cgroup, limits):
        (tmp_path / "meminfo").write_text("MemFree: 1024 kB\nMemAvailable: 67108864 kB\n")
        (tmp_path / "cgroup").write_text(cgroup)
        monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(host_memory, "OWN_CGROUPS", tmp_path / "cgroup")
        versions = {}
        for name, version in VERSIONS.items():
            mounted = tmp_path / f"fs{name}"
            versions[name] = host_memory.Version(
                mounted, version.limit, version.used, version.reclaimable
            )
            mounted.mkdir(exist_ok=True)
            for folder, limit in limits.items():
                (mounted / folder).mkdir(parents=True, exist_ok=True)
                (mounted / folder / version.limit).write_text(f"{limit}\n")
                (mounted / folder / version.used).write_text(f"{3 * GIB}\n")
                stat = f"file 5\n{version.reclaimable} {GIB}\n"
                (mounted / folder / "memory.stat").write_text(stat)
        monkeypatch.setattr(host_memory, "VERSIONS", versions)
        return find_available_bytes() / GIB

    return machine_


def test_what_the_kernel_says_counts_where_no_cgroup_limits_it(machine):
    assert machine("", {}) == 64
    assert machine("0::/\n", {}) == 64
    assert machine("0::/job/step\n", {"job/step": "max", "job": "max"}) == 64
    assert machine("0::/job\n", {"job": 200 * GIB}) == 64


@pytest.mark.parametrize("line", ["0::/job/step\n", "9:cpu:/x\n4:memory:/job/step\n"])
def test_the_least_of_the_cgroups_around_counts(machine, line):
    """Of 10 GiB, 3 are used, and 1 of them for files."""
    assert machine(line, {"job/step": "max", "job": 10 * GIB}) == 8
    assert machine(line, {"job/step": 6 * GIB, "job": 10 * GIB, "other": GIB}) == 4


def test_without_linux_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(host_memory, "OWN_CGROUPS", tmp_path / "none")
    assert find_available_bytes() == math.inf
