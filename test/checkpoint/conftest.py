import logging

import pytest
import torch.distributed as dist


@pytest.fixture
def alone():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def log(caplog, monkeypatch):
    """The lines logged so far, as one text."""
    logger = logging.getLogger("torchtrain")
    monkeypatch.setattr(logger, "handlers", [])  # pytest's own go there too, in some orders
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="torchtrain")
    return caplog
