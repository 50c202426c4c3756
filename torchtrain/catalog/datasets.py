"""The datasets a run can name, as data. No torch here: the config check reads it before any heavy import.

To add one, add a line to DATASETS and, when its documents come from a new kind of place, a line to `open_corpus`.
A user's own comes from the file that `experimental.custom_import` names, see `register_corpus`.
"""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torchtrain.errors import UserError
from torchtrain.utils import expanded, nearest

Texts = Callable[[str | None], Iterable[str]]
"""A user's source: given `training.dataset_path`, the text of each document, the same ones whenever it is called."""


@dataclass(frozen=True)
class HubSource:
    """A dataset of the Hugging Face Hub."""

    repository: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    """A commit, branch or tag; None: the newest."""


@dataclass(frozen=True)
class DatasetSpec:
    """What the config check must know of a dataset before anything is read."""

    description: str
    """One line for --help and for error messages."""
    needs_path: bool = False
    """Whether `training.dataset_path` must be given (and otherwise must not be, but for a hub's or a custom one)."""
    hub: HubSource | None = None
    """Where it lies when `training.dataset_path` names no local copy."""
    texts: Texts | None = None
    """The user's function, of a custom dataset."""


C4 = HubSource("allenai/c4", "en")
FINEWEB_EDU = HubSource("HuggingFaceFW/fineweb-edu", "sample-10BT")

# Filled here and, while the config is read, by the user's own file: constant from then on.
DATASETS: dict[str, DatasetSpec] = {
    "python_stdlib": DatasetSpec("the running interpreter's standard library source"),
    "text": DatasetSpec(
        "a text file, or a folder of them: each file is a document", needs_path=True
    ),
    "jsonl": DatasetSpec(
        "a .jsonl(.gz, .zst) file, or a folder: each line's text is a document", needs_path=True
    ),
    "parquet": DatasetSpec(
        "a .parquet file, or a folder: each row's text is a document", needs_path=True
    ),
    "mixed": DatasetSpec(
        "a folder of jsonl and parquet files; every other file is a text", needs_path=True
    ),
    "tokens": DatasetSpec("a file of token ids made elsewhere: .bin, .npy", needs_path=True),
    "c4": DatasetSpec("English C4, from the Hugging Face Hub", hub=C4),
    "c4_validation": DatasetSpec(
        "its held-out split", hub=HubSource("allenai/c4", "en", "validation")
    ),
    "allenai/c4": DatasetSpec("the same as c4", hub=C4),
    "HuggingFaceFW/fineweb-edu": DatasetSpec("its sample of 10 billion tokens", hub=FINEWEB_EDU),
}


def find_dataset(name: str, path: str | None, option: str = "training.dataset") -> DatasetSpec:
    """Return what the option = `name` means, with the option + "_path" = `path`.

    A name with a slash that is not in the table is a local folder if there is one, else `owner/name` of the Hugging
    Face Hub; `@revision`, `:config` and `:config:split` may follow.

    Raises:
        UserError: unknown, without the path it needs, with one it takes no notice of, or with one that isn't there.
    """
    given = f"{option} = {name!r}"
    spec = DATASETS.get(name) or _by_place(name, given)
    if spec is None:
        close = nearest(name, DATASETS)
        hint = f", did you mean {close}?" if close else ""
        raise UserError(
            f"{given} is unknown{hint}; allowed: {', '.join(DATASETS)}, or owner/name[@revision][:config[:split]]"
        )
    if spec.needs_path and not path:
        raise UserError(f"{given} needs {option}_path: {spec.description}")
    takes_path = spec.needs_path or spec.texts or (spec.hub and name in DATASETS)
    if path and not takes_path:
        raise UserError(f"{option}_path = {path!r} has no effect: {given} takes no path")
    if path and not spec.texts and not expanded(path).exists():
        raise UserError(f"{option}_path = {path!r} does not exist (seen from {Path.cwd()})")
    return spec


def _by_place(name: str, given: str) -> DatasetSpec | None:
    if "/" not in name:
        return None
    address, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    repository, _, revision = address.partition("@")
    hub = HubSource(repository, config or None, split or "train", revision or None)
    if expanded(repository).is_dir():
        return DatasetSpec("a local folder that the package datasets can read", hub=hub)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[^:@]+)?(:[^:]*){0,2}", name):
        raise UserError(
            f"{given} is neither a folder that exists (seen from {Path.cwd()}) nor a dataset of "
            "the Hugging Face Hub, owner/name[@revision][:config[:split]]"
        )
    return DatasetSpec("a dataset of the Hugging Face Hub", hub=hub)


def register_corpus(
    name: str, description: str = "a dataset of your own"
) -> Callable[[Texts], Texts]:
    """Make the decorated function the dataset `name`: `training.dataset = "name"`.

    The function (or class) is called with `training.dataset_path`, None where it isn't given, and yields the text of
    each document. It is called more than once and must give the same documents as long as neither its file nor those
    in the path change. What is no string counts as a bad row.

    Raises:
        UserError: another dataset has this name.
    """

    def register(texts: Texts) -> Texts:
        known = DATASETS.get(name)
        if known and (known.texts is None or source_file(known.texts) != source_file(texts)):
            raise UserError(
                f"register_corpus({name!r}): there is a dataset of this name; choose another"
            )
        DATASETS[name] = DatasetSpec(description, texts=texts)
        return texts

    return register


def source_file(texts: Texts) -> Path:
    """The file that a user's function, or class, stands in."""
    return Path(inspect.getfile(texts))


def import_custom(given: str) -> None:
    """Import the user's code that `experimental.custom_import` names: a dotted module, or a path that ends in .py.

    The working directory, or the file's folder, goes to the end of Python's search path, so that the code may import
    what lies beside it and shadows nothing.

    Raises:
        UserError: not found, or whatever fault it has, with file, line and error.
    """
    path = expanded(given).absolute() if given.endswith(".py") else None
    folder = str(path.parent if path else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    option = f"experimental.custom_import = {given!r}"
    if path and not path.is_file():
        raise UserError(f"{option}: there is no such file (seen from {Path.cwd()})")
    try:
        found = importlib.import_module(path.stem if path else given).__spec__
        if path and (found is None or Path(str(found.origin)).resolve() != path.resolve()):
            raise UserError(
                f"Python knows another module of the name {path.stem!r}; rename the file"
            )
    except UserError as error:
        raise UserError(f"{option}: {error}") from error
    except (Exception, SystemExit) as error:
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and f"{given}.".startswith(f"{error.name}.")
        ):
            raise UserError(
                f"{option}: there is no module {error.name!r}; give a dotted module name that can be imported from "
                f"{folder} or PYTHONPATH, or the path of a .py file"
            ) from error
        raise UserError(
            f"{option}: {user_place(error)}: {type(error).__name__}: {error}"
        ) from error


def user_place(error: BaseException) -> str:
    """The line of the user's file where `error` came up: of the first file that is neither ours nor Python's own."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    ours = str(Path(__file__).parents[1])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(ours)
    ]
    frames = [
        frame
        for frame in frames
        if not frame.filename.startswith(("<frozen importlib", importlib.__file__))
    ]
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    return f"{frames[0].filename}:{lines[-1]}" if frames else "at its import"
