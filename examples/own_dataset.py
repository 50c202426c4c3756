"""A dataset of your own: counting, as text.

    ./run_llama_train.sh --experimental.custom_import examples/own_dataset.py \\
        --training.dataset counting

It is tokenized once, like any corpus, and again when this file changes.
"""

from collections.abc import Iterator

from torchtrain.catalog.datasets import register_corpus


@register_corpus("counting", "sequences of numbers that count up")
def counting(dataset_path: str | None) -> Iterator[str]:
    """Yield the text of each document: the same ones whenever it is called."""
    for start in range(2000):
        yield " ".join(str(number) for number in range(start, start + 100))
