import logging

import pytest

from torchtrain.logging_utils import logger


class Keep(logging.Handler):
    """Keeps the lines, a warning's with its label as it is printed."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        label = "warning: " if record.levelno == logging.WARNING else ""
        self.lines.append(label + record.getMessage())


@pytest.fixture
def logged(monkeypatch):
    """The lines that are logged from here on; the test may clear the list."""
    handler = Keep()
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    before = logger.level
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.setLevel(before)
