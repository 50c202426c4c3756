"""A model is measured without training: the numbers are those of the run's own validation."""

import json
import math

import pytest
import torch.distributed as dist
from helpers.forking import on_ranks
from helpers.forking import train as train_on_ranks
from helpers.launching import metrics, write_corpus

from torchtrain.tools import evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A run that validates on other documents, with document masking; and those."""
    folder = tmp_path_factory.mktemp("evaluated")
    held_out = write_corpus(folder / "held out", documents=6, seed=5)
    given = {
        **data,
        "job.dump_folder": folder / "run",
        "training.document_masking": True,
        "training.steps": 2,
        "checkpoint.enable": True,
        "validation.enable": True,
        "validation.dataset": "text",
        "validation.dataset_path": held_out,
    }
    train_on_ranks(1, given)
    return folder / "run", held_out


def arguments(run, data, *more):
    folder, held_out = run
    where = ["--checkpoint", str(folder), "--dataset", "text", "--dataset-path", str(held_out)]
    return [*where, "--data.cache_folder", data["data.cache_folder"], "--json", *more]


def evaluate_and_write(given, target):
    results = evaluate.evaluate(*evaluate.read_arguments(given))
    if dist.get_rank() == 0:
        target.write_text(json.dumps(results))
    return 0


def test_the_numbers_are_those_of_the_runs_validation(run, data, capsys):
    try:
        assert evaluate.main(arguments(run, data)) == 0
    finally:
        dist.destroy_process_group()
    results = json.loads(capsys.readouterr().out)
    last = metrics(run[0])[-1]
    assert results["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert results["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-6)
    assert results["perplexity"] == pytest.approx(math.exp(last["val_loss"]), rel=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        [],
        ["--parallelism.tensor_parallel_degree", "2"],
        ["--parallelism.pipeline_parallel_degree", "2"],
    ],
)
def test_two_ranks_find_the_same(run, data, tmp_path, layout):
    on_ranks(2, evaluate_and_write, arguments(run, data, *layout), tmp_path / "results")
    results = json.loads((tmp_path / "results").read_text())
    assert results["loss"] == pytest.approx(metrics(run[0])[-1]["val_loss"], rel=1e-6)


def test_faults_are_one_message(run, data, tmp_path, capsys):
    for more, message in (
        (["--dataset-path", str(tmp_path / "no")], "no"),
        (["--dataset", "txt"], "validation.dataset"),
        (["--tokenizer", "no"], "does not exist"),
    ):
        assert evaluate.main(arguments(run, data, *more)) == 2
        if dist.is_initialized():
            dist.destroy_process_group()
        said = capsys.readouterr()
        assert message in said.err
        assert not said.out
        assert "Traceback" not in said.err
