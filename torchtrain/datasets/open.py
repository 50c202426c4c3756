"""The front door: from a data source of the config to its documents, or to its tokens."""

from dataclasses import replace
from functools import partial
from typing import Literal

from torchtrain.catalog.custom_import import user_location
from torchtrain.catalog.datasets import Texts, describe_path, find_dataset, source_file
from torchtrain.config.schema import Data
from torchtrain.config.sources import DataSource
from torchtrain.datasets.cache_folder import cache_root
from torchtrain.datasets.corpora import Corpus, Rows, as_row, split_corpus, split_text
from torchtrain.datasets.files import files_under, read_files, read_stdlib
from torchtrain.datasets.hub import read_hub
from torchtrain.datasets.token_cache import Encode, TokenCache, open_token_cache
from torchtrain.datasets.token_file import open_token_file
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import UserError
from torchtrain.utils import expand_user


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
    """
    corpus = open_corpus(
        source.dataset,
        source.path,
        data.text_key,
        data.on_bad_row,
        streaming=data.streaming,
        option=source.option,
    )
    if source.held_out_share == 0:
        return corpus
    is_one_text = source.dataset == "text" and len(corpus.files) == 1
    split = split_text if is_one_text else split_corpus
    return split(corpus, source.held_out_share, source.side)


def open_corpus(
    dataset: str,
    dataset_path: str | None,
    text_key: str,
    on_bad_row: Literal["error", "skip"] = "error",
    *,
    streaming: bool = False,
    option: str = "training.dataset",
) -> Corpus:
    """Open the documents of a dataset.

    Args:
        dataset: its name, as `training.dataset` takes it.
        dataset_path: file or folder, for datasets that read one.
        text_key: `data.text_key`.
        on_bad_row: `data.on_bad_row`.
        streaming: `data.streaming`.
        option: the option that names the dataset, for messages.

    Raises:
        UserError: unknown dataset; path missing, of the wrong kind, or without files that count;
            a hub that cannot be reached.
    """
    spec = find_dataset(dataset, dataset_path, option)
    path = expand_user(dataset_path) if dataset_path else None
    if spec.texts is not None:
        corpus = read_custom(dataset, spec.texts, dataset_path)
    elif spec.hub is not None:
        corpus = read_hub(spec.hub, path, text_key, streaming=streaming, option=option)
    elif path is None:
        corpus = read_stdlib()
    elif dataset == "tokens":
        raise UserError(f"{describe_path(option, path)} is a token file, which has no text")
    else:
        corpus = read_files(dataset, path, text_key, option)
    return replace(corpus, on_bad_row=on_bad_row)


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
