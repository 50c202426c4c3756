"""Text that the model writes while it trains: what it is, on every layout; nothing notices it."""

import json
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from helpers import forking
from helpers.launching import metrics, options

import train
from torchtrain import ranks
from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError
from torchtrain.logging_utils import init_logging
from torchtrain.parallelisms.fsdp import free_gathered
from torchtrain.sampling import Sampling, encode_prompts
from torchtrain.set_up import set_up
from torchtrain.shards import local
from torchtrain.utils import make_printable

PROMPTS = ["def ", "import os.path"]
WRITES = {
    "text_samples.prompts": ",".join(PROMPTS),
    "text_samples.freq": 2,
    "text_samples.max_new_tokens": 8,  # with BOS and a prompt, no multiple of what layouts cut
}


def samples_of(folder):
    """The lines of samples.jsonl."""
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def device():
    device = ranks.join_process_group(60)
    yield device
    torch.distributed.destroy_process_group()


@pytest.fixture
def build(tmp_path, data, device):
    """build(**overrides): a trainer of one rank with initial weights."""

    def build_(**overrides):
        given = {**data, "job.dump_folder": tmp_path, **WRITES, **overrides}
        return set_up(JobConfig().parse_args(options(given)), device)

    return build_


@pytest.fixture
def run(tmp_path, data, device, capsys):
    """run(name, **overrides): a run of one rank in this process; what it printed."""

    def run_(name, **overrides):
        folder = tmp_path / name
        config = JobConfig().parse_args(
            options({**data, "job.dump_folder": folder, **WRITES, **overrides})
        )
        init_logging(disable_color=True)
        train.run(config, device)
        return capsys.readouterr().out

    return run_


def written(trainer):
    """What the model writes after this step."""
    compute = partial(train.compute_of_logits, trainer)
    texts, reason = trainer.text_sampler.run(trainer.step, compute, trainer.device)
    assert reason == 0
    free_gathered(trainer.parts.values())
    return texts


def at_temperature(trainer, temperature, step=0, seed=0):
    """The texts at this temperature."""
    sampler = trainer.text_sampler
    sampler.sampling = replace(sampler.sampling, temperature=temperature, seed=seed)
    trainer.step = step
    return [sample.text for sample in written(trainer)]


@torch.no_grad()
def fill(trainer, name, value):
    """Give all values of a weight."""
    local(trainer.weights[name]).fill_(value)


# ---- what is written ----


def test_greedy_texts_are_those_by_hand(build):
    trainer = build(**{"text_samples.temperature": 0, "model.vocab_size": 2100})
    assert trainer.text_sampler.sampling == Sampling(temperature=0, seed=0)
    tokenizer = trainer.text_sampler.tokenizer
    expected = []
    for prompt in PROMPTS:
        (encoded,) = tokenizer.encode_batch([prompt])
        ids = [tokenizer.bos_id, *encoded.tolist()]
        for _ in range(8):
            with torch.no_grad():
                logits = trainer.parts[0](torch.tensor([ids]))[0, -1, : tokenizer.vocab_size]
            ids.append(logits.argmax().item())
        assert tokenizer.eos_id not in ids
        expected.append(tokenizer.decode(ids).removeprefix(prompt))
    samples = written(trainer)
    assert [sample.prompt for sample in samples] == PROMPTS
    assert [sample.text for sample in samples] == expected
    assert at_temperature(trainer, 1e-6) == expected, "nearly 0: the likeliest too"


def test_chance_is_a_function_of_seed_step_prompt_and_position(build):
    trainer = build(**{"text_samples.prompts": "def ,def "})
    first = at_temperature(trainer, 1.0)
    torch.rand(3)
    assert at_temperature(trainer, 1.0) == first
    assert first[0] != first[1], "the same prompt again gets another text"
    assert at_temperature(trainer, 1.0, step=1) != first
    assert at_temperature(trainer, 1.0, seed=1) != first
    trainer.text_sampler.prompts.pop()
    trainer.text_sampler.section.prompts.pop()
    assert at_temperature(trainer, 1.0) == first[:1], "the other prompts do not matter"


def test_a_text_ends_with_eos_or_where_training_sequences_end(build):
    trainer = build(**{"text_samples.max_new_tokens": 64, "text_samples.temperature": 0})
    sampler = trainer.text_sampler
    assert sampler.length == 32
    lengths = []
    sampler._decode = lambda texts: lengths.extend(len(text) for text in texts)
    written(trainer)
    assert lengths == [32, 32]

    lengths.clear()
    # With these, every token's likeliest successor is EOS.
    fill(trainer, "tok_embeddings.weight", 1.0)
    fill(trainer, "output.weight", 0.0)
    local(trainer.weights["output.weight"]).detach()[sampler.tokenizer.eos_id] = 1.0
    written(trainer)
    assert lengths == [len(prompt) + 1 for prompt in sampler.prompts]


def test_a_model_that_is_broken_ends_its_text(build):
    trainer = build()
    fill(trainer, "norm.weight", float("nan"))
    assert [sample.text for sample in written(trainer)] == ["", ""]


def test_a_prompt_without_room_is_refused(build):
    with pytest.raises(UserError, match=r"text_samples.prompts: one has \d+ tokens, BOS included"):
        build(**{"text_samples.prompts": "import os; " * 20})


def test_a_prompt_begins_as_a_document_does_with_bos_if_there_is_one():
    tokenizer = load_tokenizer(DEBUG_TOKENIZER)
    (ids,) = tokenizer.encode_batch(["def "])
    assert encode_prompts(tokenizer, ["def ", ""]) == [[tokenizer.bos_id, *ids], [tokenizer.bos_id]]
    tokenizer.bos_id = None
    assert encode_prompts(tokenizer, ["def "]) == [ids.tolist()]
    with pytest.raises(UserError, match="prompt '' has no token to begin with"):
        encode_prompts(tokenizer, [""])


# ---- where it is written ----


def test_writes_after_every_freq_steps_and_the_last(run, tmp_path):
    printed = run("a", **{"training.steps": 5})
    lines = samples_of(tmp_path / "a")
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, prompt) for step in (2, 4, 5) for prompt in PROMPTS
    ]
    for line in lines:
        assert line.keys() == {"step", "prompt", "text"}
        shown = make_printable(line["prompt"] + line["text"]).rstrip().split("\n")
        assert "\n".join(f"  | {text}"[:100] for text in shown) in printed
    order = [text for text in printed.splitlines() if text.startswith(("step", "after"))]
    assert [text[:14].rstrip() for text in order[2:4]] == ["after step 2 t", "step 3/5  loss"]


@pytest.mark.slow
def test_texts_go_to_tensorboard(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("a", **{"metrics.enable_tensorboard": True})
    events = EventAccumulator(str(tmp_path / "a" / "tb"))
    events.Reload()
    lines = samples_of(tmp_path / "a")
    for number, prompt in enumerate(PROMPTS, start=1):
        written = events.Tensors(f"text_samples/{number}/text_summary")
        assert [event.step for event in written] == [2, 4]
        for event, line in zip(written, (x for x in lines if x["prompt"] == prompt), strict=True):
            (text,) = event.tensor_proto.string_val
            assert text.decode().startswith(f"    {prompt}"), "as code"
            last_words = make_printable(line["text"]).split("\n")[-1].rstrip()
            assert text.decode().endswith(last_words)


def test_nothing_that_moves_the_cursor_is_printed():
    assert make_printable("a\tb\x1b[2Jc\r\nd\u2028\x00") == "a   b\ufffd[2Jc\ufffd\nd\ufffd\ufffd"


@pytest.mark.slow
def test_training_does_not_notice(run, tmp_path):
    """Dropout or the like would take the process's random state; none may be taken."""
    run("quiet", **{"text_samples.prompts": "none"})
    state = torch.random.get_rng_state()
    run("writing")
    assert torch.equal(torch.random.get_rng_state(), state)
    quiet, writing = metrics(tmp_path / "quiet"), metrics(tmp_path / "writing")
    for key in ("loss", "max_loss", "grad_norm", "lr", "tokens_seen"):
        assert [line[key] for line in writing] == [line[key] for line in quiet]
    assert not (tmp_path / "quiet" / "samples.jsonl").exists()


def test_a_stop_does_not_wait_for_texts(run, monkeypatch):
    combine = train.combine_ranks
    monkeypatch.setattr(train, "combine_ranks", lambda *given: (combine(*given)[0], 15))
    monkeypatch.setattr(train, "show_texts", lambda *given: pytest.fail("written"))
    with pytest.raises(train.Stopped):
        run("a", **{"text_samples.freq": 1})


def test_a_stop_is_heard_between_two_tokens(run, tmp_path, monkeypatch):
    """The texts are left out, and the step is saved."""
    tokens = []

    def find_reason(stop):
        return 15 * (len(tokens) >= 3)

    def count_token(*given):
        tokens.append(1)
        return compute(*given)

    compute = train.compute_of_logits
    monkeypatch.setattr(train, "compute_of_logits", count_token)
    monkeypatch.setattr(train.StopRequest, "find_reason", find_reason)
    with pytest.raises(train.Stopped):
        run("a", **{"checkpoint.enable": True, "checkpoint.interval": 100})
    assert len(tokens) == 4, "no more than the one that it was heard with"
    assert not (tmp_path / "a" / "samples.jsonl").exists()
    assert [path.name for path in (tmp_path / "a" / "checkpoint").iterdir()] == ["step-2"]


@pytest.mark.slow
def test_a_resumed_run_writes_what_the_untouched_one_does(run, tmp_path):
    saves = {"checkpoint.enable": True, "checkpoint.interval": 2, "training.steps": 6}
    run("untouched", **saves)
    run("resumed", **saves)
    run("resumed", **saves, **{"checkpoint.load_step": 2})
    assert samples_of(tmp_path / "resumed") == samples_of(tmp_path / "untouched")
    superseded = (tmp_path / "resumed" / "samples.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in superseded] == [4, 4, 6, 6]
    run("resumed")
    assert (tmp_path / "resumed" / "previous-1" / "samples.superseded.jsonl").exists()
    assert (tmp_path / "resumed" / "previous-1" / "samples.jsonl").exists()


# ---- every layout ----

TP = {"parallelism.tensor_parallel_degree": 2}
CP = {"parallelism.context_parallel_degree": 2}
PP = {"parallelism.pipeline_parallel_degree": 2}
EP = {"parallelism.expert_parallel_degree": 2}
SCHEDULE = "parallelism.pipeline_parallel_schedule"
WHOLE = {"parallelism.disable_loss_parallel": True}
SPARSE = {"model.n_experts": 4, "model.experts_per_token": 2, "model.n_layers": 4}
TIED = {"model.tied_embeddings": True}

# name: (ranks, layout); what follows a colon is another model, whose reference is one rank of it.
LAYOUTS = {
    "one": (1, {}),
    "one:sparse": (1, SPARSE),
    "one:tied": (1, TIED),
    "fsdp2-offload": (2, {"training.enable_cpu_offload": True}),
    "tp2-whole-logits": (2, {**TP, **WHOLE}),
    "cp2-ring": (2, CP),
    "cp2-ulysses": (2, {**CP, "parallelism.context_parallel_method": "ulysses"}),
    "pp2-cp2-v": (4, {**PP, **CP, SCHEDULE: "ZBVZeroBubble"}),
    "pp2-tp2": (4, {**PP, **TP}),
    "pp2:tied": (2, {**PP, **TIED}),
    "ep2-full-ac:sparse": (2, {**EP, **SPARSE, "activation_checkpoint.mode": "full"}),
    "pp2-ep2-overlap:sparse": (4, {**PP, **EP, **SPARSE, SCHEDULE: "DualPipeV"}),
}


@pytest.fixture(scope="module")
def texts_of(tmp_path_factory, data):
    """texts_of(layout): the lines that its run wrote, after each of its two steps."""
    scratch = tmp_path_factory.mktemp("layouts")
    common = {**data, **WRITES, "training.steps": 2, "text_samples.temperature": 1.0}
    common["text_samples.freq"] = 1
    common["text_samples.max_new_tokens"] = 4  # no multiple of what layouts cut either

    @cache
    def train_on(ranks):
        runs = [
            {**common, "job.dump_folder": scratch / name.replace(":", "-"), **layout}
            for name, (count, layout) in LAYOUTS.items()
            if count == ranks
        ]
        forking.train_in_turn(ranks, runs)

    def lines(name):
        train_on(LAYOUTS[name][0])
        return samples_of(scratch / name.replace(":", "-"))

    return lines


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if not name.startswith("one")])
def test_every_layout_writes_the_same(texts_of, name):
    _, colon, model = name.partition(":")
    expected = texts_of(f"one{colon}{model}")
    assert [line["step"] for line in expected] == [1, 1, 2, 2]
    assert len({line["text"] for line in expected}) == 4
    assert texts_of(name) == expected
