"""Each layout that there are devices for trains the same model on them: the parity tool's table."""

import json
import subprocess
import sys

import pytest
from helpers.launching import ROOT, environment

from torchtrain.tools.layouts import LAYOUTS

PATIENCE_S = 3000
pytestmark = pytest.mark.timeout(PATIENCE_S)

ON_CPU = ("accumulate", "selective-op-ac", "bf16", "accumulate-documents", "fsdp2", "tp2")
"""The dry run's: what it tries out is this file."""
KINDS = ("documents", "experts", "muon")
"""Of tasks that are no plain ones; a reference that fails ends its own table and no other."""


def list_layouts():
    """Return the names of the layouts by (number of ranks, kind of task)."""
    groups = {}
    for name, layout in LAYOUTS.items():
        kind = next((kind for kind in KINDS if layout.task.startswith(kind)), "plain")
        groups.setdefault((layout.ranks, kind), []).append(name)
    return groups


def find_worst(rows, key):
    """Return the largest difference of rows that ran, and whose it is, as text."""
    ran = [row for row in rows if row[key] is not None]
    if not ran:
        return "-"
    worst = max(ran, key=lambda row: row[key])
    return f"{worst[key]:.1e} ({worst['layout']})"


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [pytest.param(*group, marks=pytest.mark.cuda(devices=group[0])) for group in list_layouts()],
)
def test_layouts_train_as_one_process_does(tmp_path, device, record_property, ranks, kind):
    names = list_layouts()[ranks, kind]
    on_cpu = device.type == "cpu"
    if on_cpu:
        names = [name for name in names if name in ON_CPU]
        if not names:
            pytest.skip("not in the dry run")
    file = tmp_path / "table.json"
    command = [sys.executable, "-m", "torchtrain.tools.parity", "--json", str(file)]
    ended = subprocess.run(
        [*command, "--layouts", ",".join(names)],
        env=environment(1),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ended.returncode in (0, 1), ended.stderr
    assert f"on {'the CPU' if on_cpu else 'GPUs'}:" in ended.stdout
    rows = json.loads(file.read_text())["layouts"]
    agree = [row for row in rows if row["verdict"] == "same"]
    record_property("same", f"{len(agree)} of {len(names)}")
    for precision in ("fp32", "bf16"):
        of_precision = [row for row in rows if ("bf16" in row["layout"]) == (precision == "bf16")]
        if of_precision:
            record_property(f"{precision} gradient", find_worst(of_precision, "gradient"))
    assert {row["layout"]: row["verdict"] for row in rows if row not in agree} == {}
    assert sorted(row["layout"] for row in rows) == sorted(names)
