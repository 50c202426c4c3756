"""What a tokenizer cannot represent: text that does not come back from its tokens.

A BPE without an unknown token and without bytes to fall back on drops a character that it does not
know in silence; others make it the unknown token. So a sample of the documents is encoded and
decoded, and the characters that are missing then are counted: in any order, and whatever became of
whitespace, case and compatible forms (NFKC), which many tokenizers change on purpose.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Event, Thread
from typing import Any

from torchtrain.datasets.corpora import Corpus, Skipped
from torchtrain.datasets.tokenizer import SPACE_MARK, Tokenizer
from torchtrain.errors import UserError
from torchtrain.logging_utils import logger

SURE_CHARACTERS = 1 << 16
"""Sampled characters that are enough to judge a tokenizer by."""
FIRST_DOCUMENTS = 64
"""So many of a corpus are tried before a run that tokenizes as it reads, unless they are long."""
FIRST_CHARACTERS = 1 << 12
"""They have at least so many characters, or more documents are tried. A run is not refused for
fewer, unless the corpus has no more: a stream, which reads on, judges by more."""
FIRST_SECONDS = 30.0
"""For those of a source that is slow or hangs, of which a stream knows more to say."""
WHOLE_CHARACTERS = 1 << 19
"""Up to this many characters of a corpus all documents are sampled."""
LATER_SHARE = 64
"""Of what comes after, one character in so many."""


@dataclass
class RoundTrip:
    """Counts what a tokenizer loses of the documents of a corpus, in their order."""

    name: str
    """Of the corpus, in messages."""
    tokenizer: Tokenizer
    seen: int = 0
    """Characters of all documents so far."""
    characters: int = 0
    """Of the sample."""
    lost: Counter[str] = field(default_factory=Counter)
    """How often each did not come back."""

    def watch(self, texts: Iterable[str]) -> Iterator[str]:
        """Hand on the documents, after checking that a sample of them comes back.

        Raises:
            UserError: most of what was sampled is lost, and enough was sampled to know.
        """
        for text in texts:
            self.add(text)
            if self.characters >= SURE_CHARACTERS:
                self.require_most()
            yield text
        self.require_most()

    def add(self, text: str) -> None:
        """Count what is lost of a document, if the sample still needs one."""
        wanted = WHOLE_CHARACTERS + self.seen // LATER_SHARE
        self.seen += len(text)
        if self.characters < wanted and self.tokenizer.decodes:
            text = text[:WHOLE_CHARACTERS]
            self.characters += _count(text).total()
            self.lost += lost_characters(self.tokenizer, text)

    def require_most(self) -> None:
        """Check that most of the sample comes back.

        Raises:
            UserError: it does not.
        """
        if 2 * self.lost.total() > self.characters:
            raise UserError(
                f"{self.name}: {self.describe()}. Most of the text would be lost: give "
                "model.tokenizer_path a tokenizer that was made for such text, or one that falls "
                "back on bytes"
            )

    def say(self, *, is_enough: bool = True) -> None:
        """Log what is lost, if anything is.

        Raises:
            UserError: most is, and the sample `is_enough` to know.
        """
        if is_enough:
            self.require_most()
        if self.lost:
            logger.warning(f"{self.name}: {self.describe()}")

    def describe(self) -> str:
        """Return what is lost, in words."""
        return describe_loss(self.characters, self.lost.total(), self.examples)

    def findings(self) -> dict[str, Any]:
        """Return what was found, as the manifest of a token cache has it."""
        return {
            "characters_sampled": self.characters,
            "characters_lost": self.lost.total(),
            "lost_examples": self.examples,
        }

    @property
    def examples(self) -> list[str]:
        """The characters that are lost most often."""
        return [character for character, _ in self.lost.most_common(3)]


def try_beginning(corpus: Corpus, tokenizer: Tokenizer) -> RoundTrip:
    """Try the documents at the beginning of a corpus, as many as are enough to judge by.

    No more: those of a side that is held out lie far apart.

    Raises:
        UserError: most is lost, or a row is faulty.
    """
    tried = RoundTrip(corpus.name, tokenizer)
    for document in replace(corpus, skipped=Skipped()).documents():
        tried.add(document.text)
        if tried.seen >= SURE_CHARACTERS:
            break
    tried.require_most()
    return tried


def try_first_documents(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Try the first documents of a corpus that streams will read, and say what is lost.

    What is wrong with the source ends the sample alone: a stream says it in its turn.

    Raises:
        UserError: most is lost of a sample that is large enough, or the whole corpus.
    """
    texts: list[str] = []
    is_over, is_whole = Event(), Event()

    def read() -> None:
        with suppress(Exception):
            for document in replace(corpus, skipped=Skipped()).documents():
                texts.append(document.text[:SURE_CHARACTERS])
                if is_over.is_set() or _are_enough(texts):
                    return
            is_whole.set()

    reading = Thread(target=read, daemon=True)
    reading.start()
    reading.join(FIRST_SECONDS)
    is_over.set()  # what is slow does not read on beside the streams
    has_all = is_whole.is_set()
    tried = RoundTrip(corpus.name, tokenizer)
    for text in list(texts):
        tried.add(text)
    tried.say(is_enough=has_all or tried.seen >= FIRST_CHARACTERS)


def _are_enough(texts: list[str]) -> bool:
    characters = sum(map(len, texts))
    are_many = len(texts) >= FIRST_DOCUMENTS and characters >= FIRST_CHARACTERS
    return are_many or characters >= SURE_CHARACTERS


def describe_loss(characters: int, lost: int, examples: list[str]) -> str:
    """Return how many of the sampled characters are lost, in words."""
    shown = ", ".join(f"{ascii(one) if not one.isprintable() else one!r}" for one in examples)
    return (
        f"the tokenizer cannot represent {lost:,} of {characters:,} characters of a sample "
        f"({lost / max(characters, 1):.2%}), such as {shown}: they are dropped, or become the "
        "unknown token"
    )


def lost_characters(tokenizer: Tokenizer, text: str) -> Counter[str]:
    """Return how often each character of `text` is missing in what its tokens stand for."""
    (ids,) = tokenizer.encode_batch([text])
    back = tokenizer.decode(ids[ids != tokenizer.unknown_id].tolist())
    return Counter() if back == text else _count(text) - _count(back)


def _count(text: str) -> Counter[str]:
    folded = unicodedata.normalize("NFKC", text.replace(SPACE_MARK, " ")).casefold()
    return Counter("".join(folded.split()))
