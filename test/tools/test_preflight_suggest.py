"""The layouts that are suggested: the fastest of all that are allowed and fit."""

import pytest
from helpers.published import configure, read

from torchtrain.config.checks import check
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.tools.preflight.candidates import (
    apply_options,
    list_candidates,
    list_degrees,
    plan_candidate,
)
from torchtrain.tools.preflight.devices import find_device
from torchtrain.tools.preflight.step_time import TYPICAL, predict_step, time_step
from torchtrain.tools.preflight.suggest import (
    Bounds,
    Search,
    describe,
    describe_options,
    rank_of,
    write_config,
)

RANKS = 4
DEVICE = find_device("h100")
SMALL = {
    "model.n_layers": 6,
    "model.dim": 1024,
    "model.n_heads": 8,
    "model.n_kv_heads": 2,
    "model.ffn_hidden_dim": 4096,
    "model.vocab_size": 4096,
    "training.global_batch_size": 8,
    "training.seq_len": 4096,
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture(scope="module")
def config():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE", raising=False)
        return read(SMALL, RANKS)


def measure(config):
    """A memory that grows with microbatches and shrinks with shards and with recomputation."""
    keeps = {"none": 4, "selective": 2, "full": 1}[config.activation_checkpoint.mode]
    shards = config.parallelism.data_parallel_shard_degree
    return config.training.local_batch_size * keeps + 4 // shards


def search(config, limit=5, **changes):
    fields = {"config": config, "world_size": RANKS, "device": DEVICE, "measure": measure}
    return Search(**fields | {"limit": limit * 2**40} | changes)


def everything(config):
    for degrees in list_degrees(config, RANKS):
        bounds = Bounds(config, degrees, DEVICE)
        for candidate in list_candidates(config, degrees):
            plan = plan_candidate(config, candidate, RANKS)
            changed = apply_options(config, candidate.options)
            if plan is not None and not check(changed, RANKS):
                yield candidate, bounds, changed, plan


def test_the_best_are_the_fastest_of_all_that_fit(config):
    found = search(config, measure=lambda each: measure(each) * 2**40).find_best()
    times = {}
    for candidate, bounds, changed, plan in everything(config):
        seconds = time_step(changed, plan, DEVICE, TYPICAL).total()
        assert bounds.seconds(candidate) < 1.001 * seconds, candidate
        if measure(changed) <= 5:
            times[candidate] = rank_of(seconds), candidate.order
    expected = sorted(times, key=times.__getitem__)[: len(found)]
    assert len(times) > 20
    assert [each.options for each in found] == [each.options for each in expected]


def test_what_is_suggested_is_allowed_and_the_same_each_time(config):
    searched = search(config, measure=lambda each: measure(each) * 2**40)
    found = searched.find_best(5)
    assert [each.options for each in found] == [each.options for each in searched.find_best(5)]
    for each in found:
        assert not check(each.config, RANKS)
        assert each.plan.degrees.data_parallel * each.plan.degrees.ranks_per_sample == RANKS
        assert each.memory <= searched.limit


def test_the_best_in_words_with_the_reason(config):
    found = search(config, measure=lambda each: measure(each) * 2**40).find_best()
    text = "\n".join(describe(found, predict_step(found[0].config, found[0].plan, DEVICE)))
    assert text.count("[parallelism]") == len(found)
    assert "\n1 beats 2 by " in text or "\n1 and 2 take the same time" in text
    assert describe_options({"a.b": 1, "a.c": "x", "d.e": True}) == [
        "[a]",
        "b = 1",
        'c = "x"',
        "[d]",
        "e = true",
    ]


def test_the_config_that_is_written_is_accepted_and_nothing_is_overwritten(config, tmp_path):
    best = search(config, measure=lambda each: measure(each) * 2**40).find_best(1)[0]
    path = tmp_path / "best.toml"
    write_config(best.config, path)
    again = JobConfig().parse_args(["--job.config_file", str(path)], RANKS)
    for key, value in best.options.items():
        section, _, name = key.partition(".")
        assert getattr(getattr(again, section), name) == value
    written = path.read_text()
    with pytest.raises(UserError, match="exists already"):
        write_config(best.config, path)
    assert path.read_text() == written
    with pytest.raises(UserError, match="No such file"):
        write_config(best.config, tmp_path / "none" / "best.toml")


def test_nothing_fits_or_nothing_can_be_compared(config):
    with pytest.raises(UserError, match="no layout of 4 ranks fits into"):
        search(config, limit=0.0001).find_best()
    free = read(SMALL | {"training.global_batch_size": -1}, RANKS)
    with pytest.raises(UserError, match="global_batch_size = -1"):
        search(free).find_best()


def test_bounds_of_memory_are_below_what_a_large_model_takes():
    # Llama 3 8B without recomputation on one H100 does not fit, on eight with it does.
    large = configure("llama3_8b", 8, {})
    kept = {}
    for degrees in list_degrees(large, 8):
        bounds = Bounds(large, degrees, DEVICE)
        for candidate in list_candidates(large, degrees):
            kept[degrees, candidate.recomputation, candidate.sequences] = bounds.memory(candidate)
    alone = [size for (degrees, *_), size in kept.items() if degrees.dp_replicate == 8]
    assert min(alone) > 1.2e11
    assert min(kept.values()) < 3e10
