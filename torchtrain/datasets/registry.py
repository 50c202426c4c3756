"""The datasets a run can name, as data. No torch here: the config check reads it before any heavy import.

To add one, add a line to DATASETS and, when its documents come from a new kind of place, a reader to `corpora.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetSpec:
    """What the config check must know of a dataset before anything is read."""

    reader: str
    """Key of the function in `corpora.READERS` that opens it."""
    needs_path: bool
    """Whether `training.dataset_path` must be given (and otherwise must not be)."""
    description: str
    """One line for --help and for error messages."""


DATASETS: dict[str, DatasetSpec] = {
    "python_stdlib": DatasetSpec("python_stdlib", False, "the running interpreter's standard library source"),
    "text": DatasetSpec("text_files", True, "a text file, or a folder of them: each file is a document"),
    "jsonl": DatasetSpec("jsonl_files", True, "a .jsonl file, or a folder of them: each line's text is a document"),
}
