import logging

import pytest


@pytest.fixture
def log(caplog, monkeypatch):
    """The lines logged so far, as one text."""
    logger = logging.getLogger("torchtrain")
    monkeypatch.setattr(logger, "handlers", [])  # pytest's own go there too, in some orders
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="torchtrain")
    return caplog
