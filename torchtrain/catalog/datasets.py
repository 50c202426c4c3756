"""The datasets that a config can name, as data. No torch here: the config check reads it.

To add one, add a line to DATASETS and, where its documents come from a new kind of place, a line to
`datasets.open.open_source`. A user's own comes from the file that `experimental.custom_import`
names, see `register_corpus`.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torchtrain.errors import UserError
from torchtrain.utils import expand_user, nearest

Texts = Callable[[str | None], Iterable[str]]
"""A user's source: given `training.dataset_path`, the text of each document, always the same."""


@dataclass(frozen=True)
class HubSource:
    """A dataset on the Hugging Face Hub."""

    repository: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    """A commit, branch or tag; None: the newest."""


@dataclass(frozen=True)
class DatasetSpec:
    """What the config check must know of a dataset before anything is read."""

    description: str
    """One line for --help and for messages."""
    needs_path: bool = False
    """Whether `training.dataset_path` must be given."""
    hub: HubSource | None = None
    """Where it is when `training.dataset_path` names no local copy."""
    texts: Texts | None = None
    """The user's function, for a custom dataset."""


C4 = HubSource("allenai/c4", config="en")
C4_VALIDATION = HubSource("allenai/c4", config="en", split="validation")
FINEWEB_EDU = HubSource("HuggingFaceFW/fineweb-edu", config="sample-10BT")

# What is read from training.dataset_path.
YOUR_FILES = {
    "text": "a text file, or a folder of them: each file is a document",
    "jsonl": "a .jsonl, .ndjson or .json file, also with .gz or .zst, or a folder: a document is a "
    "line, or an element of an array",
    "parquet": "a .parquet file, or a folder: each row's text is a document",
    "mixed": "a folder of jsonl and parquet files; every other file is a text",
    "tokens": "a file of token ids made elsewhere: .bin, .npy",
}
DATASETS = {
    "python_stdlib": DatasetSpec("the running interpreter's standard library source"),
    **{name: DatasetSpec(text, needs_path=True) for name, text in YOUR_FILES.items()},
    "c4": DatasetSpec("English C4, from the Hugging Face Hub", hub=C4),
    "c4_validation": DatasetSpec("C4's validation split", hub=C4_VALIDATION),
    "allenai/c4": DatasetSpec("the same as c4", hub=C4),
    "HuggingFaceFW/fineweb-edu": DatasetSpec("its sample of 10 billion tokens", hub=FINEWEB_EDU),
}
"""By name. Filled here and by the user's own file as the config is read, then constant."""

NOT_INCLUDED = {
    "c4_test": "it is an asset of torchtitan's own tests; set c4, or python_stdlib for a first run",
}
"""Names of datasets that exist elsewhere, with what to do."""

ADDRESS = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[^:@]+)?(:[^:]*){0,2}")
"""owner/name[@revision][:config[:split]] on the Hugging Face Hub."""


def find_dataset(name: str, path: str | None, option: str = "training.dataset") -> DatasetSpec:
    """Return what a dataset's name and path stand for.

    A name with a slash that is not in the table is a local folder if there is one, else
    `owner/name` on the Hugging Face Hub; `@revision`, `:config` and `:config:split` may follow.

    Args:
        name: the dataset.
        path: its path, or None.
        option: where the name was given: training.dataset or validation.dataset, whose path is in
            the option + "_path", or data.mixture, where it follows the name.

    Raises:
        UserError: unknown, without the path it needs, with one it ignores, or with a missing one.
    """
    given = f"{option} = {name!r}"
    path_option = f"{option}_path"
    if option == "data.mixture":
        given = f"data.mixture: {name!r}"
        path_option = "after its name"
    spec = DATASETS.get(name) or _find_by_address(name, given)
    if spec is None:
        raise UserError(f"{given} {_why_unknown(name)}")
    if spec.needs_path and not path:
        raise UserError(f"{given} needs a path ({path_option}): {spec.description}")
    takes_path = spec.needs_path or spec.texts or (spec.hub and name in DATASETS)
    if path and not takes_path:
        raise UserError(f"{given} takes no path, but {path!r} is given ({path_option})")
    if path and not spec.texts and not expand_user(path).exists():
        raise UserError(
            f"{given}: {path!r} ({path_option}) does not exist (looked from {Path.cwd()})"
        )
    return spec


def describe_path(option: str, path: str | Path) -> str:
    """Return a dataset's path with where it was given, for messages.

    Args:
        option: the option that names the dataset, see `find_dataset`.
        path: the path.
    """
    if option == "data.mixture":
        return f"the path {str(path)!r} in data.mixture"
    return f"{option}_path = {str(path)!r}"


def _why_unknown(name: str) -> str:
    if not name:
        return "names no dataset; set it, for example to jsonl with its path, or c4 from the Hub"
    if name in NOT_INCLUDED:
        return f"is not included: {NOT_INCLUDED[name]}"
    close = nearest(name, DATASETS)
    hint = f", did you mean {close}?" if close else ""
    return (
        f"is unknown{hint}; allowed: {', '.join(DATASETS)}, or owner/name[@revision]"
        "[:config[:split]]"
    )


def _find_by_address(name: str, given: str) -> DatasetSpec | None:
    if "/" not in name:
        return None
    address, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    repository, _, revision = address.partition("@")
    hub = HubSource(
        repository, config=config or None, split=split or "train", revision=revision or None
    )
    if expand_user(repository).is_dir():
        return DatasetSpec("a local folder that the package datasets can read", hub=hub)
    if not ADDRESS.fullmatch(name):
        raise UserError(
            f"{given} is neither a folder that exists (looked from {Path.cwd()}) nor a dataset on "
            "the Hugging Face Hub, owner/name[@revision][:config[:split]]"
        )
    return DatasetSpec("a dataset on the Hugging Face Hub", hub=hub)


def register_corpus(
    name: str, description: str = "a dataset of your own"
) -> Callable[[Texts], Texts]:
    """Make the decorated function the dataset `name`: `training.dataset = "name"`.

    The function (or class) is called with `training.dataset_path`, None where it is not given, and
    yields the text of each document. It is called more than once and must give the same documents
    as long as neither its file nor the files in the path change. What is not a string counts as a
    bad row.

    Raises:
        UserError: another dataset has this name.
    """

    def register(texts: Texts) -> Texts:
        known = DATASETS.get(name)
        if known and (known.texts is None or source_file(known.texts) != source_file(texts)):
            raise UserError(
                f"register_corpus({name!r}): this dataset exists already; choose another name"
            )
        DATASETS[name] = DatasetSpec(description, texts=texts)
        return texts

    return register


def source_file(texts: Texts) -> Path:
    """Return the file that holds a user's function, or class."""
    return Path(inspect.getfile(texts))
