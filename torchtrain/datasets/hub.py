"""Corpora of the Hugging Face Hub, and local folders that its package `datasets` can read.

https://huggingface.co/docs/datasets/package_reference/loading_methods
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torchtrain.catalog.datasets import DATASETS, HubSource, describe_path
from torchtrain.config.schema import Data
from torchtrain.datasets.corpora import Corpus, Part, Rows, as_row, no_field
from torchtrain.datasets.files import files_under
from torchtrain.errors import UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import (
    describe_os_error,
    expand_user,
    import_package,
    nearest,
    require_package,
)

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class _Table:
    """A table of the hub or of a local folder, and how it is read."""

    name: str
    """Name in messages."""
    source: HubSource
    """The repository at a known revision, or the folder of a local copy."""
    text_key: str
    streaming: bool


def read_hub(source: HubSource, path: Path | None, data: Data, option: str) -> Corpus:
    """Return a dataset of the hub at its newest revision, or the local copy in `path`.

    With `data.streaming` nothing is downloaded beforehand, and each of its files is a part.

    Raises:
        UserError: the hub cannot be reached, or has no such dataset; names the `option`.
    """
    if path and not path.is_dir():
        raise UserError(
            f"{describe_path(option, path)} must be a folder, a copy of {source.repository}"
        )
    for package in ("datasets", "huggingface_hub"):
        require_package(package, f"{option} of {source.repository!r}")
    given = expand_user(source.repository)
    local = path or (given if given.is_dir() else None)
    revision = None if local else _find_revision(source, option)
    source = replace(source, repository=str(local or source.repository), revision=revision)
    kind = f"{source.config or 'default'} {source.split} [{data.text_key}]"
    table = _Table(f"{source.repository} {kind}", source, data.text_key, data.streaming)
    return Corpus(
        name=table.name,
        files=files_under(local) if local else [],
        parts=_parts(table),
        even_parts=data.streaming,
        kind=kind,
        revision=None if revision is None else f"{source.repository}@{revision}",
    )


def _parts(table: _Table) -> list[Part]:
    where = f"{table.source.repository} {table.source.split}"
    if not table.streaming:
        return [partial(_rows, table, partial(_open, table), where)]
    with _faults_named(table):
        dataset = _open(table)
    parts: list[Part] = []
    for number in range(dataset.num_shards):
        shard = partial(dataset.shard, dataset.num_shards, number)
        parts.append(partial(_rows, table, shard, f"{where}, file {number + 1}"))
    return parts


def _rows(table: _Table, load: Callable[[], Iterable[Any]], where: str) -> Rows:
    with _faults_named(table):
        for number, row in enumerate(load(), start=1):
            yield as_row(row[table.text_key], f"{where}:{number}", repr(table.text_key))


@contextmanager
def _faults_named(table: _Table) -> Iterator[None]:
    """Turn faults of hub, network, file formats and the package into one line with the name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # they have no common base
        problem = str(error.__cause__ or error).strip().partition("\n")[0] or repr(error)
        raise UserError(f"{table.name} cannot be read: {problem}") from error


def _open(table: _Table) -> Any:
    """Open the table, its text field alone: the others are not even read."""
    dataset = _load(table)
    fields = dataset.column_names
    if not fields:  # a stream may not know them
        fields = list(next(iter(dataset), [table.text_key]))
    if table.text_key not in fields:
        problem = no_field(table.text_key, table.name, fields).problem
        raise UserError(f"{table.name}: {problem}")
    return dataset.select_columns([table.text_key])


def _load(table: _Table) -> Any:
    datasets = import_package("datasets", table.name)
    source, folder = table.source, Path(table.source.repository)
    saved_files = (folder / "state.json", folder / "dataset_dict.json")
    if any(file.exists() for file in saved_files):
        saved = datasets.load_from_disk(source.repository)
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[source.split]
        return saved.to_iterable_dataset() if table.streaming else saved

    def load(**settings: Any) -> Any:
        config = source.config
        if folder.is_dir() and config not in datasets.get_dataset_config_names(source.repository):
            config = None  # files of one split, copied without the description that names configs
        return datasets.load_dataset(
            source.repository, config, split=source.split, revision=source.revision, **settings
        )

    try:
        return load(streaming=table.streaming)
    except OSError as error:
        if not _is_of_closed_cache(error):
            raise
        logger.warning(
            f"{table.name}: the cache of the package datasets cannot be written "
            f"({describe_os_error(error)}: {error.filename}). So the dataset is read where it is, "
            "without a copy there; HF_HOME can name another folder"
        )
    with TemporaryDirectory() as other:  # for its locks
        if datasets.config.HF_HUB_OFFLINE and not folder.is_dir():
            owner = source.repository.rpartition("/")[0]
            _link_files(Path(datasets.config.HF_DATASETS_CACHE), Path(other), owner)
            return load(streaming=table.streaming, cache_dir=other)
        return load(streaming=True, cache_dir=other)


def _is_of_closed_cache(error: OSError) -> bool:
    """Check whether a file of the package's cache could not be made, or a folder above it."""
    import datasets
    import huggingface_hub.constants

    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or error.filename is None:
        return False
    path = Path(os.fsdecode(error.filename)).absolute()
    caches = (
        datasets.config.HF_CACHE_HOME,
        datasets.config.HF_DATASETS_CACHE,
        huggingface_hub.constants.HF_HUB_CACHE,
    )
    return any(
        path.is_relative_to(cache) or cache.is_relative_to(path)
        for cache in (expand_user(cache).absolute() for cache in caches)
    )


def _link_files(cache: Path, other: Path, owner: str) -> None:
    """Make the folders of the package's cache anew, with links to what it has prepared.

    Of the datasets of one owner alone, or of those without one.
    """
    for folder, subfolders, names in os.walk(cache):
        there = other / Path(folder).relative_to(cache)
        there.mkdir(exist_ok=True)
        if Path(folder) == cache:
            subfolders[:] = [
                name
                for name in subfolders
                if (name.startswith(f"{owner}___") if owner else "___" not in name)
                and name != "downloads"
            ]
        for name in names:
            if not name.endswith(".lock"):
                (there / name).symlink_to(Path(folder, name).absolute())


def _find_revision(source: HubSource, option: str) -> str | None:
    """Return the commit that `source` asks for; None under HF_HUB_OFFLINE=1 (any downloaded one).

    It is asked for first, with one request, since `datasets` itself tries for half a minute when
    there is no network.
    """
    from huggingface_hub import HfApi, errors

    repository = source.repository
    revision = f" at {source.revision!r}" if source.revision else ""
    given = f"{option}: {repository!r}{revision} of the Hugging Face Hub"
    try:
        return HfApi().dataset_info(repository, revision=source.revision, timeout=TIMEOUT_S).sha
    except errors.OfflineModeIsEnabled:
        return None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        close = nearest(repository, [name for name in DATASETS if "/" in name])
        hint = f"; did you mean {close}?" if close else ""
        raise UserError(
            f"{given} does not exist, or you have no access (see `hf auth login`){hint}"
        ) from error
    except Exception as error:  # its HTTP library has changed before, and the errors with it
        first_line = str(error).partition("\n")[0]
        path_option = "after its name" if option == "data.mixture" else f"{option}_path"
        raise UserError(
            f"{given} cannot be reached ({type(error).__name__}: {first_line}). Give "
            f"the path of a local copy ({path_option}), or set HF_HUB_OFFLINE=1 to use what was "
            "downloaded before"
        ) from error
