"""A made-up corpus of short documents, so that every sequence of a small run holds several.

--experimental.custom_import torchtrain.tools.short_documents --training.dataset short-documents
"""

import random
from collections.abc import Iterator

from torchtrain.catalog.datasets import register_corpus


@register_corpus("short-documents", "made-up documents of some ten tokens, for the parity tool")
def short_documents(path: str | None) -> Iterator[str]:
    """Yield sums of small numbers, the same everywhere."""
    numbers = random.Random(0)
    for _ in range(2000):
        terms = [numbers.randrange(10) for _ in range(numbers.randint(2, 9))]
        yield f"{' + '.join(map(str, terms))} = {sum(terms)}"
