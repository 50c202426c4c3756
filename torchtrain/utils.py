"""Small helpers without torch, shared by every room."""

import argparse
import difflib
import errno
import glob
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchtrain.errors import UserError

IGNORE_INDEX = -100
"""A label that is not valid: it adds nothing to the loss, the gradient or the count. PyTorch's own
default."""

# How the address of another storage begins: s3://, gs://, hf://, file:// and so on.
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
VARIABLE = re.compile(r"\$\w|\$\{")

# In the run's folder, JSON objects line by line:
METRICS_FILE = "metrics.jsonl"  # one per logged step
SAMPLES_FILE = "samples.jsonl"  # step, prompt, and text: what the model wrote after it


def plural(count: int, noun: str) -> str:
    """Return "1 document", "2,000 documents", "2 batches"."""
    if count == 1:
        return f"1 {noun}"
    ending = "es" if noun.endswith(("ch", "s", "x")) else "s"
    return f"{count:,} {noun}{ending}"


def first_few(items: list[str]) -> str:
    """Return the first four, and how many more there are."""
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(items[:4]) + more


def describe_differences(differences: Mapping[str, list[str]]) -> str:
    """Return "it lacks a, b; it has in another shape c" of names by verb; empty without any."""
    found = [f"it {verb} {first_few(names)}" for verb, names in differences.items() if names]
    return "; ".join(found)


def make_printable(text: str) -> str:
    """Return the text with control characters replaced by U+FFFD: it cannot move the cursor.

    Newlines stay, and tabs become spaces.
    """
    characters = text.expandtabs(4)
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in characters)


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name closest in spelling to `name`, or None when nothing comes near."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return matches[0] if matches else None


def expand_user(path: str | Path) -> Path:
    """Return `path` with its `~` resolved.

    That of an unknown user stays as it is, where `Path.expanduser` raises.
    """
    return Path(os.path.expanduser(path))


def describe_no_folder(given: str) -> str | None:
    """Return why a run cannot write there: it is no path, but looks like a mistake for one.

    None where it is a path.
    """
    if ADDRESS.match(given):
        return (
            "is an address, and a run writes to folders alone: name one, for example where that "
            "storage is mounted, or copy what the run has written"
        )
    if VARIABLE.search(given):
        return "has a variable, which only a shell replaces: write what it stands for"
    return None


def output_path(given: str) -> Path:
    """Return the path of what a command writes, its `~` resolved.

    Raises:
        ArgumentTypeError: it is none, which argparse says.
    """
    if fault := describe_no_folder(given):
        raise argparse.ArgumentTypeError(f"{given!r} {fault}")
    return expand_user(given)


def load_attribute(path: str, what: str) -> Any:
    """Import what the catalog names as "module:attribute".

    Raises:
        UserError: there is no such module or attribute; names `what` asked for it.
    """
    module, _, name = path.partition(":")
    message = f"{what} is registered as {path!r}, which cannot be imported"
    with user_errors(message, ImportError, AttributeError):
        return getattr(importlib.import_module(module), name)


def import_package(name: str, asked_by: str) -> Any:
    """Import a package that only some options need.

    Raises:
        UserError: it is not installed, or broken; names what asked for it.
    """
    require_package(name, asked_by)
    with user_errors(f"{asked_by} needs the package {name}, which cannot be imported", Exception):
        return importlib.import_module(name)


def require_package(name: str, asked_by: str, install: str | None = None) -> None:
    """Check that a package is there, without importing it.

    Args:
        name: of its module.
        asked_by: the option that needs it.
        install: its name where that is another.

    Raises:
        UserError: it is not installed.
    """
    is_there = False
    with suppress(ModuleNotFoundError):  # of the module that it is in
        is_there = name in sys.modules and sys.modules[name] is not None
        is_there = is_there or find_spec(name) is not None
    if not is_there:
        package = install or name
        raise UserError(f"{asked_by} needs the package {package}: pip install {package}")


def wants_help(args: list[str]) -> bool:
    """Return whether the command line asks for help, anywhere."""
    return "-h" in args or "--help" in args


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def user_errors(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an error of these kinds into a UserError: `message`, and what the error says."""
    try:
        yield
    except kinds as error:
        cause = describe_os_error(error) if isinstance(error, OSError) else error
        raise UserError(f"{message}: {cause}") from error


def writing(what: Path | str) -> AbstractContextManager[None]:
    """Turn an OSError while `what` is written into a UserError that names it and the cause."""
    return user_errors(f"{what} cannot be written", OSError)


def describe_os_error(error: OSError) -> str:
    """Return the cause of a failure to write or read, in plain words where there are some."""
    words = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file is as large as files may be there, or as `ulimit -f` allows",
        errno.EROFS: "the file system is read-only",
    }
    cause = error.strerror or str(error)
    return f"{words[error.errno]} ({cause})" if error.errno in words else cause


def fsync_folder(folder: Path) -> None:
    """Make the folder's own entries (new names, renames) durable.

    The contents of its files are synced by those who write them.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing; a power cut does not take them away."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        with suppress(PermissionError):  # what lies above may be closed to us
            fsync_folder(path.parent)
    if not new:  # it may be of a run that was killed right here
        with suppress(OSError):  # not every parent can be synced, such as that of a mount
            fsync_folder(folder.parent)


def write_durably(path: Path, text: str) -> None:
    """Replace what is in `path` by `text`, at once.

    A reader, or a crash at any instant, sees either the old file or the new one, whole. A crash
    can leave a temporary file beside it, see `remove_unfinished`.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def remove_unfinished(path: Path) -> None:
    """Remove what `write_durably(path, …)` left where it was killed; nobody may be writing now."""
    random = "[a-z0-9_]" * 8  # as tempfile names
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{random}"):
        remove_if_possible(leftover)


def remove_if_possible(file: Path) -> None:
    """Remove a file, or leave it where that fails, as on a read-only file system."""
    with suppress(OSError):
        file.unlink()
