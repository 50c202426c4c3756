"""The examples work as they are: a user's dataset, model, optimizer and metric."""

import pytest
import torch
from helpers.forking import train, train_in_turn
from helpers.launching import ROOT, metrics

EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.slow


def losses_of(folder, ranks, overrides):
    train(ranks, {**overrides, "job.dump_folder": folder})
    return [line["loss"] for line in metrics(folder)]


def test_the_model_trains_the_same_on_one_process_and_on_two(data, tmp_path):
    own = {
        **data,
        "experimental.custom_import": EXAMPLES / "own_model.py",
        "model.name": "geglu",
        "model.flavor": "small",
    }
    one = losses_of(tmp_path / "one", 1, own)
    tensor = {**own, "parallelism.tensor_parallel_degree": 2}
    train_in_turn(
        2,
        [
            {**given, "job.dump_folder": tmp_path / name}
            for name, given in (("fsdp", own), ("tensor", tensor))
        ],
    )
    for name in ("fsdp", "tensor"):
        two = [line["loss"] for line in metrics(tmp_path / name)]
        assert torch.allclose(torch.tensor(one), torch.tensor(two), rtol=1e-6), name
    llama = losses_of(tmp_path / "llama", 1, data)
    assert one[0] != llama[0]


def test_the_optimizer_resumes_bit_for_bit(data, tmp_path):
    own = {
        **data,
        "experimental.custom_import": EXAMPLES / "own_optimizer.py",
        "optimizer.name": "Lion",
        "optimizer.lr": 1e-3,
        "checkpoint.enable": True,
        "lr_scheduler.total_steps": 4,
    }
    whole = losses_of(tmp_path / "whole", 2, own)
    losses_of(tmp_path / "halves", 2, own | {"training.steps": 2})
    assert losses_of(tmp_path / "halves", 2, own) == whole
    assert whole[-1] < whole[0]


def test_the_dataset_is_read(data, tmp_path):
    own = {
        "data.cache_folder": data["data.cache_folder"],
        "experimental.custom_import": EXAMPLES / "own_dataset.py",
        "training.dataset": "counting",
    }
    assert len(losses_of(tmp_path / "run", 1, own)) == 4


def test_the_metric_is_that_of_the_whole_job(data, tmp_path):
    own = {
        **data,
        "experimental.custom_import": EXAMPLES / "own_metric.py",
        "optimizer.name": "WatchedAdamW",
    }
    largest = []
    for ranks in (1, 2):
        losses_of(tmp_path / str(ranks), ranks, own)
        largest.append([line["gradient/largest"] for line in metrics(tmp_path / str(ranks))])
    assert min(largest[0]) > 0
    assert torch.allclose(torch.tensor(largest[0]), torch.tensor(largest[1]), rtol=1e-5)
