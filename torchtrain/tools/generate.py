"""The command that lets a model write.

    python -m torchtrain.tools.generate --checkpoint RUN_OR_STEP_OR_HF_FOLDER --prompt TEXT

Config and tokenizer are the run's own. Without a prompt they are typed in turn. A model that one
device cannot hold is shared: `torchrun --nproc_per_node 2 -m torchtrain.tools.generate …`, by FSDP,
or by `--parallelism.tensor_parallel_degree 2`; all other options are the run's own too.
"""

import argparse
import json
import sys
import time

import torch.distributed as dist

from torchtrain.errors import SharedUserError, UserError
from torchtrain.logging_utils import logger
from torchtrain.parallelisms.fsdp import free_gathered
from torchtrain.ranks import join_process_group, on_rank_zero, patient_group
from torchtrain.sampling import INCOMPLETE, Sampling, encode_prompts, text_after
from torchtrain.tools.cached_attention import pad_sparse_layers
from torchtrain.tools.command import add_model_options, end, report_faults
from torchtrain.tools.sampling import Limits, continue_prompts
from torchtrain.tools.trained_model import TrainedModel, load_trained
from torchtrain.utils import expand_user, user_errors

# Each rank computes the same few tokens: a sequence is not split, and logits come whole.
DEFAULTS = {
    "parallelism.disable_sequence_parallel": True,
    "parallelism.disable_loss_parallel": True,
}


class Writer:
    """Writes the text of one prompt as it is made."""

    def __init__(self, loaded: TrainedModel, prompt: list[int]) -> None:
        self.tokenizer = loaded.tokenizer
        self.ids = list(prompt)
        self.before = self.tokenizer.decode(self.ids)
        self.written = 0

    def add(self, tokens: list[int]) -> None:
        """Print what the next token adds, once its characters are complete."""
        self.ids.append(tokens[0])
        text = text_after(self.tokenizer.decode(self.ids), self.before)
        if not text.endswith(INCOMPLETE):
            print(text[self.written :], end="", flush=True)
            self.written = len(text)

    def finish(self) -> None:
        """Print what is left: a character that was never completed."""
        text = text_after(self.tokenizer.decode(self.ids), self.before)
        print(text[self.written :], end="", flush=True)


def write_texts(
    loaded: TrainedModel, prompts: list[str], given: argparse.Namespace, *, as_made: bool = False
) -> list[dict[str, object]]:
    """Continue the prompts; return a record of each. A collective call."""
    tokenizer = loaded.tokenizer
    encoded = encode_prompts(tokenizer, prompts)
    longest = max(map(len, encoded)) + given.max_new_tokens
    if longest > loaded.trained.seq_len:
        logger.warning(
            f"up to {longest:,} tokens: the model was trained on sequences of "
            f"{loaded.trained.seq_len:,}"
        )
    writer = Writer(loaded, encoded[0])
    started = time.monotonic()
    parts = loaded.model.parts
    with loaded.model.scale_context():
        continued = continue_prompts(
            parts[0],
            encoded,
            Sampling(
                temperature=given.temperature, top_k=given.top_k, top_p=given.top_p, seed=given.seed
            ),
            Limits(
                max_new_tokens=given.max_new_tokens,
                eos_id=tokenizer.eos_id,
                vocab_size=tokenizer.vocab_size,
            ),
            on_tokens=writer.add if as_made else lambda tokens: None,
        )
    seconds = time.monotonic() - started
    if as_made:
        writer.finish()
    free_gathered(parts.values())
    return [
        {
            "prompt": prompt,
            "text": text_after(tokenizer.decode(ids + tokens), tokenizer.decode(ids)),
            "tokens": tokens,
            "ended_by": "eos" if tokens[-1] == tokenizer.eos_id else "length",
            "tokens_per_second": round(len(tokens) / seconds, 2),
        }
        for prompt, ids, tokens in zip(prompts, encoded, continued, strict=True)
    ]


def read_prompts(given: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line and of the file.

    Raises:
        UserError: the file cannot be read, has no prompt, or a line of JSON without one.
    """
    prompts = list(given.prompt or [])
    if given.prompts_file is None:
        return prompts
    path = expand_user(given.prompts_file)
    with user_errors(f"--prompts-file {given.prompts_file}", OSError, UnicodeDecodeError):
        lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        for number, line in enumerate(lines, start=1):
            message = f'--prompts-file {path}:{number} is not JSON with a "prompt"'
            with user_errors(message, ValueError, KeyError, TypeError):
                prompts.append(str(json.loads(line)["prompt"]))
    else:
        prompts += [line for line in lines if line]
    if not prompts:
        raise UserError(f"--prompts-file {given.prompts_file} has no prompt")
    return prompts


def write_all(loaded: TrainedModel, given: argparse.Namespace, prompts: list[str]) -> None:
    """Continue the prompts that were given, and print them. A collective call."""
    single = len(prompts) == 1 and not given.json
    is_first = dist.get_rank() == 0
    if single and is_first:
        print(prompts[0], end="", flush=True)
    records = write_texts(loaded, prompts, given, as_made=single and is_first)
    if not is_first:
        return
    if single:
        print()
    for record in [] if single else records:
        print(json.dumps(record) if given.json else f"{record['prompt']}{record['text']}\n")


def talk(loaded: TrainedModel, given: argparse.Namespace) -> None:
    """Continue prompts that are typed, until Ctrl-D. A collective call."""
    is_first = dist.get_rank() == 0

    def ask() -> str | None:
        try:
            return input("prompt> " if sys.stdin.isatty() else "")
        except EOFError:
            return None

    group = patient_group()  # the other ranks wait while somebody thinks
    while (prompt := on_rank_zero(ask, group)) is not None:
        if prompt:
            write_all(loaded, given, [prompt])
    if is_first and sys.stdin.isatty():
        print()


def read_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return what is left of it too: the run's own options."""
    parser = argparse.ArgumentParser(
        prog="torchtrain generate",
        description="Let a model write. All other options are the run's own.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--prompt", action="append", help="text to continue; may be given several times")
    add("--prompts-file", help='a prompt per line; a .jsonl file has them as "prompt"')
    add("--max-new-tokens", type=int, default=128, help="per prompt (%(default)s)")
    add("--temperature", type=float, default=0.8, help="0: the likeliest token (%(default)s)")
    add("--top-k", type=int, default=0, help="choose among so many; 0: all (%(default)s)")
    add("--top-p", type=float, default=1.0, help="choose within this probability (%(default)s)")
    add("--seed", type=int, default=0, help="of the choices (%(default)s)")
    given, of_run = parser.parse_known_args(arguments)
    bounds = {
        "--max-new-tokens must be at least 1": given.max_new_tokens >= 1,
        "--temperature must be at least 0": 0 <= given.temperature < float("inf"),
        "--top-k must be at least 0": given.top_k >= 0,
        "--top-p must be above 0 and at most 1": 0 < given.top_p <= 1,
        "--seed must be at least 0": given.seed >= 0,
        "--prompt must not be empty": all(given.prompt or ["-"]),
    }
    for message, is_held in bounds.items():
        if not is_held:
            parser.error(message)
    return given, of_run


def generate(given: argparse.Namespace, of_run: list[str]) -> None:
    """Load the model and write."""
    device = join_process_group(timeout_seconds=600)
    loaded = load_trained(
        given.checkpoint,
        device,
        of_run,
        dtype=given.dtype,
        tokenizer=given.tokenizer,
        defaults=DEFAULTS,
    )
    degrees = loaded.model.plan.degrees
    if degrees.pp > 1 or degrees.cp > 1:
        raise SharedUserError(
            "a text is made on FSDP's and tensor-parallel ranks: leave out "
            "parallelism.pipeline_parallel_degree and parallelism.context_parallel_degree"
        )
    if degrees.tp > 1:
        pad_sparse_layers(loaded.model.parts[0], degrees.tp)
    prompts = on_rank_zero(lambda: read_prompts(given))
    if prompts:
        write_all(loaded, given, prompts)
    else:
        talk(loaded, given)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 2 for a user error, 1 for a crash, 130 for Ctrl-C, else 0."""
    given, of_run = read_arguments(arguments)
    return report_faults(lambda: generate(given, of_run))


if __name__ == "__main__":
    end(main())
