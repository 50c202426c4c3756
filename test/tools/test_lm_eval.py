"""EleutherAI's harness, run on an export as docs/using-the-model.md says, finds our numbers."""

import json
import math
import shlex
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from helpers.launching import ROOT, TIMEOUT_S, TINY, environment
from helpers.trained import write_run

from torchtrain.tools import convert
from torchtrain.tools.trained_model import load_trained

pytestmark = pytest.mark.slow

DOCS = (ROOT / "docs/using-the-model.md").read_text(encoding="utf-8")
ON_TEXTS = "lm_eval --model hf --model_args pretrained=my-model,add_bos_token=False"
ON_OTHERS = "lm_eval --model hf --model_args pretrained=my-model --tasks"
LENGTH = TINY["training.seq_len"]
TEXTS = [
    "def f(x):\n    return x + 1\n" * 8,  # three windows
    "one two",
    " Ünïcödé 漢字 🙂 ",
    "<s> is text here",
]
QUESTIONS = ["one two three", "def f(x):\n    return", "Q: why?\nA:", "漢字 "]
CHOICES = ["x", "four five", "because of it", "0.5 + y * z"]
CHOICE_TASK = """
task: my_choices
dataset_path: json
dataset_kwargs: {data_files: {test: my-tasks/my_choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
GENERATION_TASK = """
task: my_prompts
dataset_path: json
dataset_kwargs: {data_files: {test: my-tasks/my_choices.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "-"
generation_kwargs: {until: ["\\0"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""
RUN_ALL = """
import json
import sys
from functools import partialmethod
from importlib.metadata import entry_points

from lm_eval.tasks import TaskManager

# Thousands of tasks that come with the harness, and are not asked for, need not be indexed.
TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
(script,) = entry_points(group="console_scripts", name="lm_eval")
main = script.load()
for command in json.loads(sys.argv[1]):
    sys.argv = command
    main()
"""


class Ours:
    """The run's model and tokenizer, without Hugging Face's."""

    def __init__(self, run):
        loaded = load_trained(str(run), torch.device("cpu"), [])
        (self.model,) = loaded.model.parts.values()
        self.tokenizer = loaded.tokenizer

    def encode(self, text):
        """Return a text's tokens without BOS."""
        return self.tokenizer.encode_batch([text])[0].tolist()

    @torch.no_grad()
    def log_likelihood(self, tokens, last):
        """Return that of the last ones of `tokens`, given all before."""
        logits = self.model(torch.tensor([tokens[:-1]]))[0].double()
        each = logits.log_softmax(dim=-1).gather(1, torch.tensor(tokens[1:]).unsqueeze(1))
        return each[-last:].sum().item()

    def of_text(self, text, before):
        """Return a text's, after the tokens `before` it.

        In windows that predict LENGTH tokens each, and see LENGTH, the last window too.
        """
        tokens = self.encode(text)
        total = 0.0
        for start in range(0, len(tokens), LENGTH):
            window = tokens[start : start + LENGTH]
            seen = [*before, *tokens[: start + len(window)]][-LENGTH - 1 :]
            total += self.log_likelihood(seen, len(window))
        return total

    def of_choices(self, question, before):
        """Return that of each choice after its question and a space."""
        context = self.encode(question.rstrip())
        wholes = [self.encode(f"{question} {choice}") for choice in CHOICES]
        return [
            self.log_likelihood([*before, *whole], len(whole) - len(context)) for whole in wholes
        ]

    @torch.no_grad()
    def go_on(self, prompt, count):
        """Return the likeliest tokens after BOS and the prompt."""
        tokens = torch.tensor([[self.tokenizer.bos_id, *self.encode(prompt)]])
        for _ in range(count):
            tokens = torch.cat([tokens, self.model(tokens)[:, -1:].argmax(dim=-1)], dim=1)
        return tokens[0, -count:].tolist()


def documented(beginning):
    """Return the words of the docs' command that begins so."""
    command = DOCS[DOCS.index(f"\n    {beginning}") :].replace("\\\n", " ")
    return shlex.split(command.strip().splitlines()[0])


def documented_task():
    """Return the YAML file of the docs."""
    block = DOCS[DOCS.index("\n    task: my_texts") :].lstrip("\n").split("\n\n")[0]
    return "\n".join(line.removeprefix("    ") for line in block.splitlines()) + "\n"


def write_tasks(folder, answers):
    folder.mkdir()
    (folder / "my_texts.yaml").write_text(documented_task(), encoding="utf-8")
    (folder / "my_choices.yaml").write_text(CHOICE_TASK, encoding="utf-8")
    (folder / "my_prompts.yaml").write_text(GENERATION_TASK, encoding="utf-8")
    texts = [{"text": text} for text in TEXTS]
    questions = [
        {"question": question, "choices": CHOICES, "answer": answer}
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]
    for name, documents in (("my_texts", texts), ("my_choices", questions)):
        lines = "\n".join(map(json.dumps, documents))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def command_on(beginning, home, tasks):
    """Return the docs' command for these tasks, and the folder that it writes to."""
    command = documented(beginning)
    command[command.index("--tasks") + 1] = ",".join(tasks)
    output = home / "-".join(tasks)
    command += ["--include_path", "my-tasks", "--output_path", str(output), "--log_samples"]
    return command, output


def measure(home, commands):
    """Run commands of `lm_eval` where `my-model` and `my-tasks` are.

    In one process and without the harness's own tasks, since imports and these take long. The
    network is closed to it: the Hub is off, and no proxy answers.
    """
    closed = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(commands)],
        cwd=home,
        env=environment(1, HF_HUB_OFFLINE="1", HF_HOME=str(home / "cache"), **closed),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr


def read_output(output, tasks):
    """Return the results and the responses to each task's documents."""
    (results,) = output.glob("*/results_*.json")
    responses = {}
    for task in tasks:
        (file,) = output.glob(f"*/samples_{task}_*.jsonl")
        responses[task] = [json.loads(line)["resps"] for line in file.read_text().splitlines()]
    return json.loads(results.read_text())["results"], responses


@pytest.fixture(scope="module")
def exported(tmp_path_factory, data):
    """A folder with an export, `my-model`, and `my-tasks`; and the model that was exported."""
    folder = tmp_path_factory.mktemp("harness")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        write_run(folder / "run", data)
        convert.to_hf(str(folder / "run"), folder / "my-model")
        ours = Ours(folder / "run")
    finally:
        dist.destroy_process_group()
    answers = []  # the likeliest, but for the first question
    for question in QUESTIONS:
        scores = ours.of_choices(question, [ours.tokenizer.bos_id])
        wrong = not answers
        answers.append((scores.index(max(scores)) + wrong) % len(CHOICES))
    write_tasks(folder / "my-tasks", answers)
    return folder, ours


@pytest.fixture(scope="module")
def measured(exported):
    """What the two commands found."""
    folder = exported[0]
    asked = ((ON_TEXTS, ["my_texts"]), (ON_OTHERS, ["my_choices", "my_prompts"]))
    made = [command_on(beginning, folder, tasks) for beginning, tasks in asked]
    measure(folder, [command for command, _ in made])
    return [read_output(made[place][1], tasks) for place, (_, tasks) in enumerate(asked)]


def test_the_likelihood_of_whole_texts_is_ours(exported, measured):
    ours, (results, responses) = exported[1], measured[0]
    bos = ours.tokenizer.bos_id
    expected = [ours.of_text(text, [bos]) for text in TEXTS]
    found = [float(value) for ((value,),) in responses["my_texts"]]
    assert found == pytest.approx(expected, rel=1e-5)
    bits = -sum(expected) / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert results["my_texts"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    for before in ([], [bos, bos]):
        other = ours.of_text(TEXTS[1], before)  # in one window
        assert found[1] != pytest.approx(other, rel=1e-4), "BOS goes unseen"


def test_the_likelihoods_of_choices_are_ours(exported, measured):
    ours, (results, responses) = exported[1], measured[1]
    bos = ours.tokenizer.bos_id
    for question, choices in zip(QUESTIONS, responses["my_choices"], strict=True):
        found = [float(value) for ((value, _),) in choices]
        assert found == pytest.approx(ours.of_choices(question, [bos]), rel=1e-5), question
        for before in ([], [bos, bos]):
            other = ours.of_choices(question, before)
            assert found != pytest.approx(other, rel=1e-4), "BOS goes unseen"
    assert results["my_choices"]["acc,none"] == 1 - 1 / len(QUESTIONS)


def test_the_text_written_is_ours(exported, measured):
    ours, (_, responses) = exported[1], measured[1]
    for question, ((text,),) in zip(QUESTIONS, responses["my_prompts"], strict=True):
        written = ours.go_on(question, 8)
        assert text == ours.tokenizer.decode(written), question
