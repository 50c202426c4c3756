"""What set_up makes of a config: that options reach what they name, and that ranks agree."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers.forking import on_ranks, run_trainer
from helpers.launching import options, write_corpus

from torchtrain import ranks, set_up
from torchtrain.config.schema import ParameterGroup
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError


@pytest.fixture(scope="module")
def device():
    yield ranks.join_process_group(60)
    dist.destroy_process_group()


def made(data, device, **overrides):
    """The weights, and the tokens of the first step, of a run with these options."""
    config = JobConfig().parse_args(options({**data, **overrides}), world_size=1)
    trainer = set_up.set_up(config, device)
    weights = {name: weight.to_local().clone() for name, weight in trainer.weights.items()}
    return weights, trainer.loader.step_batches(1)[0].tokens


def test_the_seed_reaches_every_matrix_and_the_samples(data, device):
    weights, tokens = made(data, device, **{"debug.seed": 5})
    same_weights, same_tokens = made(data, device, **{"debug.seed": 5})
    other_weights, other_tokens = made(data, device, **{"debug.seed": 6})
    assert torch.equal(tokens, same_tokens)
    assert not torch.equal(tokens, other_tokens)
    for name, weight in weights.items():
        assert torch.equal(weight, same_weights[name]), name
        assert torch.equal(weight, other_weights[name]) == (weight.ndim == 1), name


def test_the_compiler_is_silenced(data, device):
    from torch._inductor.lowering import _warn_complex_not_supported  # here: it takes a second

    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        made(data, device)
        _warn_complex_not_supported.cache_clear()  # it is given once per process
        _warn_complex_not_supported()
    assert not [warning for warning in given if "complex operators" in str(warning.message)]


def test_names_of_a_users_model_are_checked_before_it_is_made(data, device, monkeypatch):
    config = JobConfig().parse_args(options(data), world_size=1)  # which knows no user's model
    config.optimizer.groups = [ParameterGroup(pattern="tok_embedding.*", lr=0.1)]
    monkeypatch.setattr(set_up, "set_up_model", None)
    with pytest.raises(UserError, match=r"matches no parameter .* such as tok_embeddings.weight"):
        set_up.set_up(config, device)


def train_on_own_corpus(arguments, corpora):
    """A rank of a run in which each rank finds another corpus where the config says."""
    corpus = corpora[int(os.environ["RANK"])]
    return run_trainer([*arguments, "--training.dataset_path", str(corpus)])


@pytest.mark.slow
def test_ranks_that_see_different_corpora_are_refused(tmp_path):
    """As on two hosts of which one has an older copy."""
    corpora = [write_corpus(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    given = {
        "training.dataset": "text",
        "data.cache_folder": tmp_path / "cache",
        "job.dump_folder": tmp_path / "run",
    }
    printed = on_ranks(2, train_on_own_corpus, options(given), corpora, expect=2)
    assert printed.count("the corpus, as each rank reads it, differs between ranks") == 1
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
