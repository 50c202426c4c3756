"""What a config leaves to a published rule: the run's length and its rate, by hand."""

import json
from fractions import Fraction

import pytest
from helpers.configs import assert_one_fault, parse, report

from torchtrain.catalog.models import FAMILIES, Family
from torchtrain.catalog.parameters import ParameterCount, count_parameters
from torchtrain.config.plans import plan_run, plan_shape
from torchtrain.config.reading import Source, read_config
from torchtrain.config.rules import plan_rate
from torchtrain.config.schema import Optimizer
from torchtrain.config.toml import to_toml
from torchtrain.errors import UserError

BATCH = "global_batch_size = 16\nlocal_batch_size = 4\nseq_len = 64"  # 1,024 tokens per step


def planned(training="", more="", *args, world_size=1):
    config = parse(f"[training]\n{BATCH}\n{training}\n{more}", *args, world_size=world_size)
    return plan_run(config, world_size, tokenizer_size=1000)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ("10_240", 10_240),
        ("10e3", 10_000),
        ('"10e3"', 10_000),
        ('"1.5e3"', 1500),
        ("1", 1),
        ("10240.5", 10_241),
        ("1024", 1024),
        ("1025", 1025),
    ],
)
def test_tokens_are_rounded_up_to_whole_steps(given, tokens):
    plan = planned(f"tokens = {given}")
    assert plan.steps == plan.schedule.total_steps == plan.validation.last_step
    assert 1024 * (plan.steps - 1) < tokens <= 1024 * plan.steps
    assert f": {tokens:,} tokens, 1,024 per step" in plan.length.source


@pytest.mark.parametrize("ratio", ["20", "0.5", "1e1"])
@pytest.mark.parametrize("name", ["llama2", "mixtral"])
def test_a_multiple_of_the_parameters_that_compute_a_token(name, ratio):
    """With embedding and output; of a layer's experts, those of one token."""
    plan = planned(f'tokens = "{ratio}x"', f'[model]\nname = "{name}"')
    count = count_parameters(name, plan.shape)
    assert (count.active < count.total) == (name == "mixtral")
    assert 1024 * (plan.steps - 1) < Fraction(ratio) * count.active <= 1024 * plan.steps
    what = "active parameters" if name == "mixtral" else "parameters"
    assert f'"{ratio}x" of {count.active:,} {what}, embedding counted' in plan.length.source


def test_the_world_size_changes_nothing_where_the_batch_is_given():
    lengths = {planned('tokens = "20x"', world_size=ranks).length for ranks in (1, 2, 8)}
    assert len(lengths) == 1


def test_steps_need_no_words():
    assert planned("steps = 7").length.source == planned().length.source == ""
    assert (planned("steps = 7").steps, planned().steps) == (7, 10_000)


def test_steps_and_tokens_in_one_place_contradict():
    text = 'training.steps = 5, training.tokens = "20x": both say how long the run is; give one'
    assert_one_fault(report('[training]\nsteps = 5\ntokens = "20x"'), "run.toml", [text])
    said = report("", "--training.steps=5", "--training.tokens=20x")
    assert_one_fault(said, "command line", [text])


def test_the_command_line_takes_precedence_whichever_it_gives():
    assert planned("steps = 5", "", "--training.tokens=20480").steps == 20
    assert planned("tokens = 20480", "", "--training.steps=5").steps == 5
    assert planned("tokens = 20480", "", "--training.tokens=10_240").steps == 10
    assert planned("tokens = 20480", "", "--training.tokens=none").steps == 10_000
    assert planned("steps = 5", "", "--training.tokens=none").steps == 5


def test_tokens_that_are_unset_again_give_way_to_the_steps_that_they_displaced():
    beneath, more = Source("beneath", {"training.steps": 100}), ["--training.tokens=20x"]
    above = Source("above", {"training.tokens": None})
    assert read_config(more, 1, beneath)[0].training.tokens == "20x"
    config, _ = read_config(more, 1, beneath, above)
    assert (config.training.steps, config.training.tokens) == (100, None)
    config, _ = read_config(["--training.steps=5"], 1, Source("a", {"training.tokens": 9}), above)
    assert (config.training.steps, config.training.tokens) == (5, None)


def test_the_merged_config_keeps_what_was_given():
    config = parse('[training]\nsteps = 5\n[optimizer]\nlr = "auto"', "--training.tokens=20x")
    text = to_toml(config)
    assert 'tokens = "20x"\n' in text
    assert 'lr = "auto"\n' in text
    again = parse(text)
    assert (again.training, again.optimizer) == (config.training, config.optimizer)
    json.dumps(config.model_dump(mode="json"))


@pytest.mark.parametrize("given", ["1000", "1_000", "1e3", "1000.0"])
def test_a_whole_number_of_tokens_stays_one(given):
    for config in (parse(f"[training]\ntokens = {given}"), parse("", f"--training.tokens={given}")):
        assert "tokens = 1000\n" in to_toml(config)
        assert "training.tokens = 1000: 1,000 tokens" in plan_run(config, 1).length.source
    assert "tokens = 1000.5\n" in to_toml(parse("[training]\ntokens = 1000.5"))


def test_tokens_out_of_bounds():
    """With no number: the check counts no vocabulary, which is the tokenizer's."""
    for ratio, much in (("0x", "no"), ("10e9x", "too many")):
        text = f'"{ratio}" is {much} tokens; it must be 1 to 1,000,000,000,000,000 of them'
        assert_one_fault(report(f'[training]\ntokens = "{ratio}"'), "run.toml", [text])
    for text in ("0.5", "0", "1e16"):
        said = report(f'[training]\ntokens = "{text}"')
        assert_one_fault(said, "run.toml", [f'"{text}": must be a finite number >= 1 and <= 1,'])
    assert parse('[training]\ntokens = "1e15"').training.tokens == "1e15"


def test_tokens_just_out_of_bounds_are_refused_in_the_same_words_with_the_vocabulary():
    given = 10**15 // count_parameters("llama3", plan_shape(parse("").model)).active
    config = parse(f'[training]\ntokens = "{given}x"')
    with pytest.raises(UserError, match=r"is too many tokens; it must be 1 to 1,000,"):
        plan_run(config, 1, tokenizer_size=1000)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ('[training]\ntokens = "20x"', "give the number of tokens"),
        ('[optimizer]\nlr = "auto"', "give a number"),
    ],
)
def test_a_rule_needs_parameters_that_can_be_counted(monkeypatch, text, fragment):
    flavors = FAMILIES["llama2"].flavors
    monkeypatch.setitem(FAMILIES, "mine", Family("somewhere:Model", flavors))
    said = report(f'{text}\n[model]\nname = "mine"')
    assert_one_fault(said, "run.toml", ["a model class of your own are not known here", fragment])
    assert parse('[training]\ntokens = 1e6\n[model]\nname = "mine"')


# ---- the rate ----

AUTO = '[optimizer]\nlr = "auto"'


def step_law(inner, tokens, batch):
    share = min(1, batch / (0.58 * tokens**0.571))
    return 1.79 / inner**0.713 * tokens**0.307 * share**0.5


def test_the_rate_of_the_papers_largest_run():
    """1.07 billion parameters and 100 billion tokens, at the law's best batch and at a quarter."""
    count = ParameterCount(total=2 * 10**9, active=2 * 10**9, inner=1_070_000_000)
    auto = Optimizer(lr="auto")
    rates = [plan_rate(auto, count, 10**11, batch, 0.1).lr for batch in (10**7, 277_178)]
    assert rates == [1.56e-3, 7.78e-4]


def test_a_last_rate_far_from_that_of_the_laws_runs_is_said():
    """They ended at 1e-5, whatever the largest rate was."""
    count = ParameterCount(total=2 * 10**9, active=2 * 10**9, inner=1_070_000_000)
    for factor in (0.1, 0.0, 0.01, 0.005):
        source = plan_rate(Optimizer(lr="auto"), count, 10**11, 10**7, factor).source
        said = (
            f"; extrapolated: the law was fitted to a last rate of 1e-05, not {1.56e-3 * factor:g}"
        )
        assert source.endswith(said) == (factor in (0.1, 0.0))
        assert ("extrapolated" in source) == (factor in (0.1, 0.0))


@pytest.mark.parametrize("batch", [16, 512, 4096])
def test_the_rate_by_hand(batch):
    """A batch above the best one has the rate of the best one."""
    more = f'{AUTO}\n[model]\nflavor = "1B"'
    given = f"global_batch_size = {batch}\nseq_len = 512"
    config = parse(f"[training]\n{given}\ntokens = 20e9\n{more}")
    plan = plan_run(config, 1, tokenizer_size=1000)
    inner = count_parameters("llama3", plan.shape).inner
    seen = plan.steps * batch * 512
    assert plan.rate.lr == pytest.approx(step_law(inner, seen, batch * 512), rel=5e-3)
    assert plan.rate.lr == float(f"{plan.rate.lr:.3g}")
    best = 0.58 * seen**0.571
    assert 512 * 512 < best < 4096 * 512
    assert ("for so small a batch" in plan.rate.source) == (batch < 4096)
    assert f"{inner:,} parameters beside embedding and output, {seen:,} tokens" in plan.rate.source
    said = "extrapolated: the law was fitted to a last rate of 1e-05, not"
    assert (said in plan.rate.source) == ("extrapolated" in plan.rate.source) == (batch > 16)


def test_what_the_law_was_not_fitted_to_is_said():
    source = planned("steps = 10", AUTO).rate.source
    fitted = "extrapolated: the law was fitted to 60,000,000 to 1,100,000,000 parameters"
    assert f"{fitted}, 1,000,000,000 to 100,000,000,000 tokens" in source
    large = planned("tokens = 200e9", f'{AUTO}\nname = "Muon"\n[model]\nflavor = "1B"').rate
    assert "to 100,000,000,000 tokens, AdamW, not Muon" in large.source
    assert "parameters, 1" not in large.source


def test_the_rate_is_that_of_the_whole_schedule():
    """So a run that is made longer as planned goes on at the rate that it had."""
    first, whole = (
        planned(f"steps = {steps}", f"{AUTO}\n[lr_scheduler]\ntotal_steps = 50")
        for steps in (5, 50)
    )
    assert first.rate == whole.rate == planned("steps = 50", AUTO).rate
    assert first.rate.lr > planned("steps = 5", AUTO).rate.lr


def test_a_given_rate_is_that_number():
    rate = planned("", "[optimizer]\nlr = 0.1234567").rate
    assert (rate.lr, rate.source) == (0.1234567, "")


def test_the_vocabulary_changes_no_rate():
    more = f"{AUTO}\n[model]\nvocab_size = 5000"
    assert planned("steps = 9", more).rate == planned("steps = 9", AUTO).rate
    assert plan_shape(parse(more).model).vocab_size == 5000
