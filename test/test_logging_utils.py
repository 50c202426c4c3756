"""Which rank's lines go where, and that progress does not stay in their way."""

import io
import logging
import sys

import pytest

from torchtrain.logging_utils import (
    clear_progress,
    draw_progress,
    init_logging,
    line_width,
    logger,
)
from torchtrain.utils import plural


@pytest.fixture(autouse=True)
def logger_as_it_was(monkeypatch):
    level = logger.level
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.delenv("LOG_RANK", raising=False)
    yield
    logger.setLevel(level)


def say(rank=0, world_size=1, **given):
    init_logging(rank, world_size, **given)
    logger.info("a line")
    logger.warning("beware")
    logger.error("it failed")


def test_errors_go_to_stderr_the_rest_to_stdout(capsys):
    say()
    assert tuple(capsys.readouterr()) == ("a line\nwarning: beware\n", "error: it failed\n")


@pytest.mark.parametrize(
    ("log_rank", "rank", "out", "err"),
    [
        (None, 1, "", "error: it failed\n"),
        ("1", 0, "", "error: [rank 0] it failed\n"),
        ("1", 1, "[rank 1] a line\nwarning: [rank 1] beware\n", "error: [rank 1] it failed\n"),
        ("0,1", 0, "[rank 0] a line\nwarning: [rank 0] beware\n", "error: [rank 0] it failed\n"),
        # A rank that does not exist; the launcher refuses it, torchrun knows nothing of it.
        ("7", 0, "a line\nwarning: beware\n", "error: it failed\n"),
    ],
)
def test_ranks_speak_as_asked(capsys, monkeypatch, log_rank, rank, out, err):
    if log_rank is not None:
        monkeypatch.setenv("LOG_RANK", log_rank)
    say(rank, 2)
    assert tuple(capsys.readouterr()) == (out, err)


def test_labels_are_colored_on_a_terminal_of_their_own(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    say()
    out, err = capsys.readouterr()
    assert "\x1b[33mwarning\x1b[0m: beware" in out
    assert "error: it failed" in err, "stderr is not a terminal here"
    say(disable_color=True)
    assert "\x1b" not in capsys.readouterr().out


def test_a_line_clears_the_progress_before_it(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    init_logging()
    draw_progress("reading: 10 MB of a long name")
    assert capsys.readouterr().err == "\r\x1b[Kreading: 10 MB of a", "cut: it must not wrap"
    logger.info("a line")
    assert tuple(capsys.readouterr()) == ("a line\n", "\r\x1b[K")
    clear_progress()
    assert capsys.readouterr().err == "\r\x1b[K"


def test_progress_is_not_drawn_into_a_file(capsys):
    init_logging()
    draw_progress("reading: 10 MB")
    clear_progress()
    logger.info("a line")
    assert tuple(capsys.readouterr()) == ("a line\n", "")


def test_a_lines_width(monkeypatch):
    init_logging()
    monkeypatch.setenv("COLUMNS", "72")
    assert line_width() == 100, "a file has no columns"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert line_width() == 72
    monkeypatch.setenv("LOG_RANK", "0,1")
    init_logging(1, 2)
    assert line_width() == 72 - len("[rank 1] ")


class ClosedPipe(io.StringIO):
    """What is left of `| head -1`."""

    def write(self, text):
        raise BrokenPipeError


def test_a_closed_output_does_not_end_the_run(monkeypatch):
    init_logging()
    monkeypatch.setattr(logging, "raiseExceptions", False)
    handler, _ = logger.handlers
    monkeypatch.setattr(handler, "stream", ClosedPipe())
    logger.info("a line")


@pytest.mark.parametrize(
    ("count", "noun", "expected"),
    [
        (1, "document", "1 document"),
        (0, "file", "0 files"),
        (2000, "logged line", "2,000 logged lines"),
        (1, "batch", "1 batch"),
        (3, "microbatch", "3 microbatches"),
    ],
)
def test_plurals(count, noun, expected):
    assert plural(count, noun) == expected
