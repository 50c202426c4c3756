"""The command that measures a model on text, without training.

    python -m torchtrain.tools.evaluate --checkpoint RUN_OR_STEP_OR_HF_FOLDER
        --dataset NAME [--dataset-path PATH]

It prints the loss in nats per token, the perplexity, and bits per byte of text: what a run's own
validation would log. Under torchrun, on any layout, by the run's own options.
"""

import argparse
import json
import math
from functools import partial

import torch.distributed as dist

from torchtrain.logging_utils import logger
from torchtrain.ranks import first_on_each_node, join_process_group, patient_group
from torchtrain.tools.command import add_model_options, end, report_faults
from torchtrain.tools.trained_model import load_trained
from torchtrain.validation import ValidationSet, Validator
from train import losses_of


def evaluate(given: argparse.Namespace, of_run: list[str]) -> dict[str, float | int | None]:
    """Return loss, perplexity, bits per byte and the number of sequences. A collective call.

    Raises:
        UserError: whatever is wrong with checkpoint, dataset or options, on one rank.
        PeerFault: the same, on the others.
    """
    device = join_process_group(timeout_seconds=600)
    source = {"dataset": given.dataset, "dataset_path": given.dataset_path}
    loaded = load_trained(
        given.checkpoint,
        device,
        of_run,
        dtype=given.dtype,
        tokenizer=given.tokenizer,
        defaults={
            **{f"training.{key}": value for key, value in source.items()},
            **{f"validation.{key}": value for key, value in source.items()},
            "validation.enable": True,
            "training.local_batch_size": 8,
        },
    )
    model, tokenizer = loaded.model, loaded.tokenizer
    plan, config = model.plan.validation, model.config
    separators = None
    if config.training.document_masking:
        separators = (tokenizer.bos_id, tokenizer.eos_id)
    samples = first_on_each_node(
        lambda: ValidationSet(plan, config.data, tokenizer, separators), patient_group()
    )
    validator = Validator(plan, samples, model.plan.degrees, model.mesh.data_rank, device)
    logger.info(f"evaluating {samples.describe()}")
    with model.scale_context():
        results, _ = validator.run(partial(losses_of, model))
    loss = results["val_loss"]
    assert loss is not None
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # an fp64 overflows beyond
        "bits_per_byte": results["val_bits_per_byte"],
        "sequences": validator.sequences,
    }


def read_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return what is left of it too: the run's own options."""
    parser = argparse.ArgumentParser(
        prog="torchtrain evaluate",
        description="Measure a model on text. All other options are the run's own.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--dataset", required=True, help="named as in training.dataset")
    add("--dataset-path", help="as in training.dataset_path")
    return parser.parse_known_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 2 for a user error, 1 for a crash, 130 for Ctrl-C, else 0."""
    given, of_run = read_arguments(arguments)

    def act() -> None:
        results = evaluate(given, of_run)
        if dist.get_rank() != 0:
            return
        if given.json:
            print(json.dumps(results))
            return
        for name, value in results.items():
            print(f"{name.replace('_', ' '):14}{'unknown' if value is None else f'{value:,.6g}'}")

    return report_faults(act)


if __name__ == "__main__":
    end(main())
