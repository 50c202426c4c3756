"""Corpora by the name of their dataset, as a config names them."""

from typing import Any

from torchtrain.config.schema import Data
from torchtrain.config.sources import DataSource
from torchtrain.datasets.corpora import Corpus
from torchtrain.datasets.open import open_source


def open_corpus(
    dataset: str,
    path: str | None,
    text_key: str,
    on_bad_row: str = "error",
    option: str = "training.dataset",
    **data: Any,
) -> Corpus:
    """Open the documents of a dataset that `option` names; `data` are further keys of [data]."""
    section = Data(text_key=text_key, on_bad_row=on_bad_row, **data)
    return open_source(DataSource(dataset, path, option=option), section)
