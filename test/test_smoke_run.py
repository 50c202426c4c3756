"""The smoke run's command; what it runs is in test/gpu."""

import subprocess

import pytest
from helpers.launching import ROOT


@pytest.mark.parametrize("given", [["--device", "tpu"], ["--device=tpu"], ["--device"]])
def test_a_device_that_is_none_is_refused_before_anything_is_installed(given, tmp_path):
    ended = subprocess.run(
        [ROOT / "test" / "gpu.sh", *given],
        env={"PATH": "/usr/bin:/bin", "TORCHTRAIN_VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    device = "tpu" if "tpu" in "".join(given) else ""
    assert ended.stderr == f"--device '{device}': must be cuda or cpu\n"
    assert not list(tmp_path.iterdir())
