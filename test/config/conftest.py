"""Every test of this folder has a folder of its own, and no launcher around it."""

import pytest


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
