"""How much memory is left for a process: by the kernel, and by the limits of its cgroups."""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Version:
    """Where a version of cgroups tells of memory."""

    mounted: Path
    limit: str
    used: str
    reclaimable: str
    """In memory.stat: pages of files that are not in use, which count as free."""


VERSIONS = {
    "": Version(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    "memory": Version(
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}
"""By the name that stands before a process' cgroup: none in version 2."""


def find_available_bytes() -> float:
    """Return how much can be allocated without swapping; infinity where it is not known.

    Containers and Slurm limit memory by a cgroup, that of this process or one around it.
    """
    return min([math.inf, *_read_machine(), *_read_cgroups()])


def _read_machine() -> Iterator[float]:
    with suppress(OSError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield 1024 * float(line.split()[1])


def _read_cgroups() -> Iterator[float]:
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, name, path = line.split(":", 2)
            if name in VERSIONS:
                version = VERSIONS[name]
                own = version.mounted / path.lstrip("/")
                for folder in (own, *own.parents):
                    if folder.is_relative_to(version.mounted):
                        yield from _read_limit(folder, version)


def _read_limit(folder: Path, version: Version) -> Iterator[float]:
    """Yield what a cgroup has left, unless it has no limit, as that of the whole machine."""
    with suppress(OSError, ValueError, KeyError):
        limit = float((folder / version.limit).read_text())
        used = float((folder / version.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield limit - used + float(stat[version.reclaimable])
