"""Train a small lossless SentencePiece tokenizer on documents of your own:

    python -m torchtrain.tools.train_tokenizer --output FILE [--vocab-size 2048]
                                               [--dataset text --dataset-path PATH]

The same documents and size make the same file.
"""

import argparse
import io
import sys
from collections.abc import Iterator

import sentencepiece

from torchtrain.catalog.custom_import import import_custom
from torchtrain.config.schema import Data
from torchtrain.config.sources import DataSource
from torchtrain.datasets.open import open_source
from torchtrain.datasets.tokenizer import LONG_TEXT, SentencePieceTokenizer
from torchtrain.errors import UserError
from torchtrain.utils import output_path


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> bytes:
    """Return the model file of a lossless byte-fallback BPE of `texts`, all held in memory.

    The same texts and size give the same bytes, since the number of threads is fixed and no path
    goes in.

    Raises:
        UserError: `vocab_size` is too large or too small for these texts.
    """
    if vocab_size < 260:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: "
            "256 bytes and <unk>, BOS, EOS come before any text"
        )
    model = io.BytesIO()
    # SentencePiece drops a sentence over its length limit, in bytes: long texts are given in parts.
    parts = (
        text[start : start + LONG_TEXT]
        for text in texts
        for start in range(0, len(text), LONG_TEXT)
    )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=parts,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            max_sentence_length=4 * LONG_TEXT,
            # Lossless: nothing is normalized, and what has no token is spelled in bytes.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            # Indentation as one token: source code shrinks by a third.
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].split(" Increase")[0]
        raise UserError(
            f"no tokenizer of {vocab_size} tokens can be trained on this text: {reason}"
        ) from error
    return model.getvalue()


def _train(options: argparse.Namespace) -> None:
    output = options.output
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {str(output)!r} must be a file name in a folder that exists")
    if options.custom_import:
        import_custom(options.custom_import)
    data = Data()
    data.text_key = options.text_key
    corpus = open_source(DataSource(options.dataset, options.dataset_path), data)
    model = train_tokenizer((document.text for document in corpus.documents()), options.vocab_size)
    tokenizer = SentencePieceTokenizer(model, str(output))
    try:
        output.write_bytes(model)
    except OSError as error:
        raise UserError(f"cannot write --output {str(output)!r}: {error.strerror}") from error
    size = f"{tokenizer.vocab_size:,} tokens"
    print(f"{output}: {size} from {corpus.name}, sha256 {tokenizer.fingerprint}")


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says. Returns the exit status, 2 for a user error."""
    parser = argparse.ArgumentParser(
        prog="torchtrain train-tokenizer",
        description="Train a lossless byte-fallback BPE model.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", required=True, type=output_path, metavar="FILE", help="the model file to write"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=2048, help="number of tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--dataset", default="python_stdlib", help="as training.dataset (default: %(default)s)"
    )
    parser.add_argument("--dataset-path", metavar="PATH", help="the documents' file or folder")
    parser.add_argument(
        "--text-key", default="text", help="the documents' key in a row (default: %(default)s)"
    )
    parser.add_argument("--custom-import", metavar="MODULE", help="as experimental.custom_import")
    try:
        _train(parser.parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
