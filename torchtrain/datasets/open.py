"""The front door: from a data source of the config to its documents, or to its tokens."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from torchtrain.catalog.custom_import import user_location
from torchtrain.catalog.datasets import Texts, describe_path, find_dataset, source_file
from torchtrain.config.schema import Data
from torchtrain.config.sources import DataSource
from torchtrain.datasets.cache_folder import cache_root
from torchtrain.datasets.corpora import Corpus, Rows, as_row, split_corpus, split_text
from torchtrain.datasets.files import files_under, read_files, read_stdlib
from torchtrain.datasets.hub import read_hub
from torchtrain.datasets.token_cache import Encode, TokenCache, open_token_cache
from torchtrain.datasets.token_file import map_token_file, open_token_file
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import expand_user


def check_sources(sources: Iterable[DataSource], data: Data, tokenizer: Tokenizer) -> None:
    """Check that each of several sources can be opened, before the first of them is tokenized.

    Of the first that is known at once, when it is opened.

    Raises:
        UserError: one cannot.
    """
    distinct: dict[tuple[str, str | None], DataSource] = {}
    for source in sources:  # where training and validation read the same, training's key is named
        distinct.setdefault((source.dataset, source.path), source)
    for source in [*distinct.values()][1:]:
        if source.dataset == "tokens":
            map_token_file(source.path, data.token_dtype, tokenizer)
        else:
            _open_all(source, data)


def open_tokens(
    source: DataSource, data: Data, tokenizer: Tokenizer, encode: Encode | None = None
) -> TokenCache:
    """Open the tokens of a source: of a token file as they are, of text from the token cache.

    Args:
        source: what to read, or the side of it that is meant.
        data: how it is read.
        tokenizer: the model's.
        encode: how the token cache is built if need be; unset: in this process.

    Raises:
        UserError: whatever is wrong with the source or the cache folder.
    """
    root = cache_root(data.cache_folder)
    if source.dataset == "tokens":
        return open_token_file(source.path, data.token_dtype, tokenizer, root)
    return open_token_cache(open_source(source, data), tokenizer, root, encode)


def open_source(source: DataSource, data: Data) -> Corpus:
    """Open the documents of a source, or the side of them that is meant.

    Of a single text, which is one document, the last lines are held out.

    Raises:
        UserError: unknown dataset; path missing, of the wrong kind, or without files that count;
            a hub that cannot be reached.
    """
    corpus = replace(_open_all(source, data), on_bad_row=data.on_bad_row)
    is_said = source.held_out_share > 0 and source.side == "validation"  # of the training side
    if not is_said and (others := corpus.describe_other_files()):
        logger.warning(others)
    if source.held_out_share == 0:
        return corpus
    is_one_text = source.dataset == "text" and len(corpus.files) == 1
    split = split_text if is_one_text else split_corpus
    return split(corpus, source.held_out_share, source.side)


def _open_all(source: DataSource, data: Data) -> Corpus:
    spec = find_dataset(source.dataset, source.path, source.option)
    path = expand_user(source.path) if source.path else None
    if spec.texts is not None:
        return read_custom(source.dataset, spec.texts, source.path)
    if spec.hub is not None:
        return read_hub(spec.hub, path, data, source.option)
    if path is None:
        return read_stdlib()
    if source.dataset == "tokens":
        raise UserError(f"{describe_path(source.option, path)} is a token file, which has no text")
    return read_files(source.dataset, path, data.text_key, source.option)


def read_custom(name: str, texts: Texts, dataset_path: str | None) -> Corpus:
    """Return what a user's function yields; a fault inside it becomes a UserError.

    Whether the documents may have changed is seen from the function's own file and the files in
    `dataset_path`. Without files nothing can tell: then they are read once at every start.
    """
    files = []
    if dataset_path and expand_user(dataset_path).exists():
        files = [source_file(texts), *files_under(expand_user(dataset_path))]
    return Corpus(
        name=name if not dataset_path else f"{name} {dataset_path}",
        files=files,
        parts=[partial(_custom_rows, name, texts, dataset_path)],
        kind=name,
    )


def _custom_rows(name: str, texts: Texts, dataset_path: str | None) -> Rows:
    number = 0
    try:
        for number, text in enumerate(texts(dataset_path), start=1):
            yield as_row(text, f"{name}:{number}", "what it yields")
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        problem = f"{user_location(error)}: {type(error).__name__}: {error}"
        raise UserError(f"{name}, after document {number}: {problem}") from error
