"""The package as pip installs it: from its wheel, outside the repository."""

import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

from helpers.launching import ROOT, environment


@dataclass
class Installed:
    """A folder with what pip would make of the wheel."""

    names: list[str]
    """Of the wheel's files."""
    packages: Path
    """What is in the place of site-packages."""
    script: Path
    """The command `torchtrain`."""

    def environment(self, ranks: int, **extra: str) -> dict[str, str]:
        """Return the environment of a run in which the repository cannot be found."""
        bare = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [str(self.packages), *(path for path in bare if path and Path(path) != ROOT)]
        return environment(ranks, **{"PYTHONPATH": os.pathsep.join(paths), **extra})


def install_wheel(folder: Path) -> Installed:
    """Build the wheel, unpack it, and write the script that its metadata asks for."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        env=environment(1),
        check=True,
        capture_output=True,
        timeout=60,
    )
    (wheel,) = folder.glob("*.whl")
    packages = folder / "packages"
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        packed.extractall(packages)
    (metadata,) = packages.glob("*.dist-info")
    (entry,) = Distribution.at(metadata).entry_points
    script = folder / entry.name
    script.write_text(
        f"#!{sys.executable}\n"
        f"import sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
    )
    script.chmod(0o755)
    return Installed(names, packages, script)
