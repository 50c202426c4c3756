"""Text from a model: the cache changes nothing, the choices are what they say, on any ranks."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.forking import on_ranks
from helpers.hf import SHAPES, build
from helpers.launching import ROOT, environment
from helpers.trained import write_run

from torchtrain.tools import generate
from torchtrain.tools.cached_attention import begin_sequences
from torchtrain.tools.sampling import Limits, Sampling, choose, continue_prompts

GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 5, 900, 33, 12, 2000, 7], [1, 8], [1, 44, 3, 90]]


def limits(count, eos_id=-1):
    return Limits(max_new_tokens=count, eos_id=eos_id, vocab_size=2048)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_the_cache_gives_the_logits_of_a_whole_forward(name):
    """In pieces of any size, rows of different lengths beside each other."""
    tokens = torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
    whole = build(SHAPES[name])(tokens)
    later = build(SHAPES[name])(tokens[1:, 5:])
    model = build(SHAPES[name])
    begin_sequences(model, torch.tensor([0, 5]), 24)
    parts = [model(part) for part in tokens.split([7, 1, 1, 12, 3], dim=1)]
    logits = torch.cat(parts, dim=1)
    torch.testing.assert_close(logits[0], whole[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1, 5:], later[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_greedy_tokens_are_those_of_whole_forwards_for_each_prompt(name, alone):
    expected = []
    for prompt in PROMPTS:
        model, tokens = build(SHAPES[name]), torch.tensor([prompt])
        for _ in range(12):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(dim=-1)], dim=1)
        expected.append(tokens[0, len(prompt) :].tolist())
    assert continue_prompts(build(SHAPES[name]), PROMPTS, GREEDY, limits(12)) == expected
    again = build(SHAPES[name])
    for _ in range(2):  # a model may go on to other prompts
        assert continue_prompts(again, PROMPTS[:1], GREEDY, limits(12)) == expected[:1]


def test_a_text_ends_with_eos_and_the_others_go_on(alone):
    whole = continue_prompts(build(SHAPES["llama"]), PROMPTS, GREEDY, limits(12))
    eos = whole[0][3]
    ended = continue_prompts(build(SHAPES["llama"]), PROMPTS, GREEDY, limits(12, eos))
    for text, other in zip(ended, whole, strict=True):
        end = other.index(eos) + 1 if eos in other else len(other)
        assert text == other[:end]


def test_a_prompts_text_does_not_depend_on_those_beside_it(alone):
    sampling = Sampling(temperature=1.0, top_k=50, seed=3)
    model = build(SHAPES["llama"])
    together = continue_prompts(model, PROMPTS, sampling, limits(10))
    for prompt, text in zip(PROMPTS, together, strict=True):
        assert continue_prompts(model, [prompt], sampling, limits(10)) == [text]
    twice = continue_prompts(model, PROMPTS[:1] * 2, sampling, limits(10))
    assert twice[0] == together[0] != twice[1]
    assert together == continue_prompts(model, PROMPTS, sampling, limits(10))
    other = Sampling(temperature=1.0, top_k=50, seed=9)
    assert together != continue_prompts(model, PROMPTS, other, limits(10))


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, {0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}),
        ({"top_k": 2}, {0: 0.625, 1: 0.375}),
        ({"top_p": 0.7}, {0: 0.625, 1: 0.375}),
        ({"top_p": 0.5}, {0: 1.0}),
        ({"top_k": 3, "top_p": 0.6}, {0: 0.625, 1: 0.375}),
        ({"temperature": 0.5}, {0: 0.25, 1: 0.09, 2: 0.0225, 3: 0.0025}),
        ({"temperature": 0}, {0: 1.0}),
    ],
)
def test_choices_have_the_probabilities_worked_out_by_hand(settings, allowed):
    draws = 4000
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().expand(draws, -1)
    ids = [1, 3, 2, 0]  # from the likeliest to the least likely
    generators = [torch.Generator().manual_seed(number) for number in range(draws)]
    chosen = choose(logits, Sampling(**{"temperature": 1.0, **settings}), generators)
    total = sum(allowed.values())
    for rank, token in enumerate(ids):
        share = allowed.get(rank, 0.0) / total
        found = (chosen == token).double().mean().item()
        assert abs(found - share) <= 4 * math.sqrt(share * (1 - share) / draws), (rank, found)


@pytest.mark.parametrize("temperature", [1e-45, 1e-5])
def test_the_lowest_temperatures_take_the_likeliest(temperature):
    logits = torch.tensor([[30.0, -80.0, 31.0], [1.0, 0.5, -torch.inf]])
    generators = [torch.Generator().manual_seed(number) for number in range(2)]
    assert choose(logits, Sampling(temperature=temperature), generators).tolist() == [2, 0]


def test_an_unfinished_character_is_held_back_and_not_lost(capsys):
    tokenizer = SimpleNamespace(decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    writer = generate.Writer(SimpleNamespace(tokenizer=tokenizer), list(b"a"))
    shown = []
    for byte in "b€".encode() + "é".encode()[:1]:
        writer.add([byte])
        shown.append(capsys.readouterr().out)
    assert shown == ["b", "", "", "€", ""]
    writer.finish()
    assert capsys.readouterr().out == "\ufffd"


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    folder = tmp_path_factory.mktemp("written") / "run"
    try:
        write_run(folder, data)
    finally:
        dist.destroy_process_group()
    return folder


@pytest.fixture
def command(run, capsys, monkeypatch):
    """command(*arguments): the exit status, stdout and stderr."""

    def call(*arguments, checkpoint=run):
        try:
            status = generate.main(["--checkpoint", str(checkpoint), *arguments])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


SHORT = ("--max-new-tokens", "6", "--temperature", "0")


def test_json_has_a_record_per_prompt(command, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "two"}\n{"prompt": "three"}\n')
    file = ("--prompts-file", str(tmp_path / "prompts.jsonl"))
    status, out, err = command("--prompt", "one", *file, *SHORT, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [record["prompt"] for record in records] == ["one", "two", "three"]
    for record in records:
        assert len(record["tokens"]) == 6
        assert record["ended_by"] == "length"
        assert record["tokens_per_second"] > 0


def test_the_text_follows_its_prompt_as_it_is_made_or_typed(command, monkeypatch):
    import io

    _, out, _ = command("--prompt", "one", *SHORT, "--json")
    text = json.loads(out)["text"]
    assert command("--prompt", "one", *SHORT)[1] == f"one{text}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\none\n"))
    assert command(*SHORT)[1] == f"one{text}\n" * 2


def test_beyond_the_trained_length_is_a_warning(command):
    status, out, err = command("--prompt", "one", "--max-new-tokens", "40", "--seed", "1")
    assert status == 0
    assert out.startswith("one")
    assert "the model was trained on sequences of 32" in err


def test_faults_are_one_message(command, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    for arguments, message in (
        (("--prompts-file", str(tmp_path / "no")), "No such file"),
        (("--prompts-file", str(tmp_path / "empty.txt")), "has no prompt"),
        (
            ("--prompts-file", str(tmp_path / "bad.jsonl")),
            'bad.jsonl:1 is not JSON with a "prompt"',
        ),
        (("--prompt", "a", "--tokenizer", str(tmp_path / "no")), "does not exist"),
        (("--prompt", "a", "--model.dimm", "3"), "dimm"),
    ):
        status, out, err = command(*arguments)
        assert (status, out) == (2, ""), err
        assert message in err
        assert "Traceback" not in err
    status, _, err = command("--prompt", "a", checkpoint=tmp_path / "nowhere")
    assert (status, err.count("\n")) == (2, 1)
    for wrong in (("--top-p", "0"), ("--top-k", "-1"), ("--temperature", "-1"), ("--prompt", "")):
        with pytest.raises(SystemExit, match="2"):
            command(*wrong)


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(run):
    asked = ["--checkpoint", str(run), "--prompt", "one", "--prompt", "another", *SHORT]
    one = on_ranks(1, generate.main, asked)
    assert len(one) > 10
    for layout in ([], TENSOR):
        assert on_ranks(2, generate.main, [*asked, *layout]) == one, layout


SPARSE = {
    "model.name": "mixtral",
    "model.flavor": "debugmodel",
    "model.n_experts": 4,
    "model.expert_hidden_dim": 64,
}
TENSOR = ("--parallelism.tensor_parallel_degree", "2")
EXPERT = ("--parallelism.expert_parallel_degree", "2")


@pytest.mark.slow
def test_ranks_that_share_experts_write_what_one_writes(tmp_path, data, alone):
    """Of one new token too, which tensor-parallel ranks cannot share evenly."""
    write_run(tmp_path / "run", {**data, **SPARSE})
    asked = [
        "--checkpoint",
        str(tmp_path / "run"),
        "--prompt",
        "one",
        "--prompt",
        "another",
        *SHORT,
    ]
    one = on_ranks(1, generate.main, asked)
    assert len(one) > 10
    for layout in (TENSOR, TENSOR + EXPERT):
        assert on_ranks(2, generate.main, [*asked, *layout]) == one, layout


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_fault(run):
    asked = ["--checkpoint", str(run), "--prompt", "one", "--max-new-tokens", "60"]
    with subprocess.Popen(
        [sys.executable, "-m", "torchtrain.tools.generate", *asked],
        cwd=ROOT,
        env=environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(timeout=200) == 0, said
    assert "Traceback" not in said
