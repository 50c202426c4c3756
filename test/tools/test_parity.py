"""The parity tool: it finds every technique equal to one process, and it sees what is not."""

import json
import math
import os
from unittest.mock import patch

import pytest
import torch
from helpers import sabotage
from helpers.forking import Ranks
from helpers.launching import ROOT

from torchtrain.config.plans import plan_shape
from torchtrain.config_manager import JobConfig
from torchtrain.tools import parity, parity_ranks
from torchtrain.tools.layouts import LAYOUTS, TASKS, Layout, pipeline
from torchtrain.tools.parity_compare import TOLERANCES, Tolerance, compare, relative
from torchtrain.tools.parity_plan import SHRUNK, Plan, make_plan
from torchtrain.tools.parity_processes import first_fault, run_cases
from torchtrain.tools.parity_ranks import DONE

# Every technique once and each pair that meets in a place of the code, most of them in company; the
# whole table is the tool's own business. What each can fail for and no other here does:
SUBSET = {
    "fsdp2-never": "weights that stay gathered, over several microbatches",
    "fsdp2-offload": "gradients that are added up in the CPU's memory",
    "fsdp2-bf16": "the precision of gathered weights and of reduced gradients",
    "fsdp2-compile": "compiled blocks with some results kept",
    "tp2-no-sequence-no-loss": "whole activations between blocks, and whole logits",
    "tp2-documents": "a mask beside activations that are cut",
    "tp2-compile": "compiled blocks whose weights are DTensors",
    "cp2-labels": "a ring, and shards with unequal numbers of labels",
    "pp2-1f1b-uneven": "a cut given by hand",
    "pp2-gpipe-full-ac": "recomputation in a whole backward",
    "pp2-interleaved-zb": "several stages per rank, with a split backward",
    "pp2-zbv-documents": "documents over stages, and an output on the embedding's rank",
    "pp2-1f1b-offload": "a pipeline's gradients in the CPU's memory",
    "pp2-zbv-bf16": "a split backward's gradients added up in fp32",
    "pp2-zbv-selective-op-ac": "recomputation in a split backward",
    "fsdp2-pp2-zbv": "gradients reduced after a split backward",
    "cp2-pp2-dualpipev-labels": "sequence shards in a pipeline",
    "experts-tp2-no-sequence": "experts cut by tensor ranks",
    "ep2-cp2": "experts over sequence shards",
    "ep2-hsdp": "experts with replicas",
    "ep2-pp2-dualpipev-full-ac": "overlapped exchanges, with recomputation",
    "hsdp2x2-accumulate-labels": "replicas, and microbatches with unequal numbers of labels",
    "fsdp2-tp2-tied-full-ac": "weights cut twice, and an output that is the embedding",
    "tp2-cp2-ulysses-tied": "heads over two kinds of ranks",
    "muon-fsdp2-tp2": "matrices that Muon makes whole out of two cuts",
    "muon-ep2-tp2-pp2-zbv": "experts over tensor ranks, and DTensors in a split backward",
}


@pytest.fixture(scope="module")
def small(data):
    """Options for both kinds of runs: the tests' corpus, and two steps less."""
    return {**data, "training.steps": 2}


def work(action, cases_file, on_gpus):
    """A forked rank of the tool."""
    if not on_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    action(cases_file)


def forked_cases(action):
    """`run_cases` on forked ranks; how the tool starts its own has tests of its own."""

    def run(plan, ranks, cases, folder):
        waiting = dict(cases)
        while waiting:
            file = folder / f"cases-{ranks}.json"
            orders = {"timeout_seconds": plan.timeout_seconds, "cases": list(waiting.values())}
            file.write_text(json.dumps(orders))
            forked = Ranks(ranks, work, action, file, plan.on_gpus)
            forked.finish(timeout_s=500)
            for line in forked.printed.splitlines():
                if line.startswith(DONE):
                    name = line.removeprefix(DONE).strip()
                    del waiting[name]
                    yield name, ""
            if waiting:
                name = next(iter(waiting))
                del waiting[name]
                yield name, first_fault(folder, name) or forked.printed

    return run


@pytest.fixture(scope="module")
def table(tmp_path_factory, small):
    """The tool's exit status and the rows it wrote, by layout."""
    file = tmp_path_factory.mktemp("parity") / "table.json"
    # What is compiled is traced and differentiated as with Inductor, without the time it takes.
    values = {**small, "compile.backend": "aot_eager"}
    given = [f"--{name}={value}" for name, value in values.items()]
    with patch.object(parity, "run_cases", forked_cases(parity_ranks.work)):
        status = parity.main(["--layouts", ",".join(SUBSET), "--json", str(file), *given])
    return status, {row["layout"]: row for row in json.loads(file.read_text())["layouts"]}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SUBSET)
def test_a_layout_trains_as_one_process_does(table, name):
    row = table[1][name]
    assert row["verdict"] == "same", row
    limits = TOLERANCES["bfloat16" if "bf16" in name else "float32"]
    assert row["loss"] <= limits.loss
    assert row["norm"] <= limits.norm
    assert row["gradient"] <= limits.gradient
    assert row["weights"] <= limits.weights
    assert row["ranks"] == LAYOUTS[name].ranks
    assert row["seconds"] > 0


@pytest.mark.slow
def test_the_table_has_all_and_the_status_says_so(table):
    assert set(table[1]) == set(SUBSET)
    assert table[0] == 0


OFF = {
    "scaled": Layout(2, {"training.local_batch_size": 1}),
    "positions": Layout(2, {"parallelism.context_parallel_degree": 2}),
    "replica-drifts": Layout(2, {"parallelism.data_parallel_replicate_degree": 2}),
    "bias-alone": Layout(2, {}, "experts"),
    "chosen-anew": Layout(2, {"activation_checkpoint.mode": "full"}, "experts"),
    "copy-forgotten": Layout(2, pipeline("ZBVZeroBubble"), "tied"),
}
FAILING = {
    "raises": Layout(2),
    "impossible": Layout(2, {"parallelism.tensor_parallel_degree": 3}),
    "good": Layout(2),  # on the ranks that took up the rest
}


@pytest.fixture(scope="module")
def off(small):
    """The rows of layouts that have a fault of their name built in, by their name."""
    plan = Plan(str(ROOT / "train_configs" / "debug_model.toml"), SHRUNK | small)
    with patch.object(parity, "run_cases", forked_cases(sabotage.work)):
        return {row.layout: row for row in parity.check_layouts({**OFF, **FAILING}, plan)}


@pytest.mark.slow
def test_gradients_scaled_by_the_microbatch_count_are_seen(off):
    row = off["scaled"]
    assert row.gradient == pytest.approx(3, rel=1e-5)  # four microbatches per rank
    assert row.norm == pytest.approx(3, rel=1e-5)
    assert "gradient norm" in row.verdict
    assert "gradient of" in row.verdict


@pytest.mark.slow
def test_a_tied_outputs_gradient_that_does_not_reach_the_embedding_is_seen(off):
    assert "gradient of tok_embeddings.weight" in off["copy-forgotten"].verdict


@pytest.mark.slow
def test_a_router_that_decides_otherwise_in_the_recomputation_is_seen(off):
    assert off["chosen-anew"].verdict.startswith(("OFF: ", "failed: CheckpointError: "))


@pytest.mark.slow
def test_biases_that_follow_the_loads_of_their_own_rank_alone_are_seen(off):
    row = off["bias-alone"]
    assert row.verdict.startswith("OFF: ")
    assert row.worst_weights.endswith(".moe.expert_bias")


@pytest.mark.slow
def test_wrong_positions_of_context_shards_are_seen(off):
    row = off["positions"]
    assert row.verdict.startswith("OFF: loss; ")
    assert "gradient of" in row.verdict


@pytest.mark.slow
def test_a_copy_that_drifts_on_one_rank_in_the_last_bits_is_seen(off):
    # Rank 0 has the right weights, so nothing else can see it.
    assert off["replica-drifts"].verdict == "OFF: copies differ between ranks of norm.weight"


@pytest.mark.slow
def test_a_layout_that_fails_says_why_and_the_others_run(off):
    assert off["raises"].verdict == "failed: RuntimeError: a fault of rank 1"
    assert off["impossible"].verdict.startswith("refused: ")
    assert "tensor_parallel_degree = 3" in off["impossible"].verdict
    assert off["good"].verdict == "same"
    assert set(off) == {*OFF, *FAILING}


WORKER = """
import json
import os
import signal
import sys
import time

for case in json.load(open(sys.argv[1]))["cases"]:
    name, rank = case["name"], int(os.environ["RANK"])
    if name == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "killed":
        time.sleep(600)  # as in a collective: torchrun ends it
    if name == "raises":
        open(f"{case['results']}.fault-{rank}", "w").write("ValueError: a fault")
        os._exit(1)
    if rank == 0:
        print(f"parity: done {name}", flush=True)
"""


@pytest.mark.slow
def test_ranks_that_end_are_started_again_for_the_other_cases(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    plan = Plan("unused", {}, worker=(str(tmp_path / "worker.py"),))
    names = ("first", "killed", "second", "raises")
    cases = {name: {"name": name, "results": str(tmp_path / name)} for name in names}
    found = dict(run_cases(plan, 2, cases, tmp_path))
    assert list(found) == list(names)
    assert (found["first"], found["second"]) == ("", "")
    assert found["killed"].startswith("the ranks ended: ")
    assert "SIGKILL" in found["killed"]
    assert found["raises"] == "ValueError: a fault"


@pytest.mark.slow
def test_the_tool_starts_its_own_ranks(small):
    plan = Plan(str(ROOT / "train_configs" / "debug_model.toml"), SHRUNK | small)
    (row,) = parity.check_layouts({"accumulate": LAYOUTS["accumulate"]}, plan)
    assert row.verdict == "same"


# ---- without ranks ----


def test_a_reference_that_fails_costs_its_own_layouts_alone(tmp_path, capsys):
    """Those of the other tasks are compared; the table and the exit status say what was not."""
    ran = []

    def run(plan, ranks, cases, folder):
        for name in cases:
            ran.append(name)
            fails = "documents" in name
            if not fails:
                torch.save(results(), folder / f"{name}.0")
            yield name, "UserError: heads too narrow\non this device" if fails else ""

    file = tmp_path / "table.json"
    names = "accumulate-documents,fsdp2,fsdp2-documents,accumulate"
    with patch.object(parity, "run_cases", run):
        assert parity.main(["--layouts", names, "--json", str(file)]) == 1
    verdicts = {row["layout"]: row["verdict"] for row in json.loads(file.read_text())["layouts"]}
    lost = "failed: its reference, one process in fp32: UserError: heads too narrow"
    assert verdicts == {
        "accumulate": "same",
        "fsdp2": "same",
        "accumulate-documents": lost,
        "fsdp2-documents": lost,
    }
    printed = capsys.readouterr().out
    assert "2 of 4 layouts agree; not accumulate-documents; not fsdp2-documents" in printed
    assert "fsdp2-documents" not in ran  # on ranks that would have been started for it


def width_per_head(plan, task):
    return plan_shape(JobConfig().parse_args(plan.command_line(task)).model).width_per_head


def test_where_the_shrunk_model_masks_documents_its_heads_are_wide_enough_for_a_gpu(tmp_path):
    shrunk = make_plan(None, 4, [], LAYOUTS)
    for task, content in TASKS.items():
        if content.overrides.get("training.document_masking"):
            assert width_per_head(shrunk, task) == 16
    assert width_per_head(shrunk, "plain") == 8
    (tmp_path / "c.toml").write_text("[model]\nhead_width = 8\n")  # what a user asks for stays
    own = make_plan(str(tmp_path / "c.toml"), 4, [], LAYOUTS)
    asked = make_plan(None, 4, ["--model.head_width=8"], LAYOUTS)
    assert width_per_head(own, "documents") == width_per_head(asked, "documents") == 8


def results(**changes):
    part = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(2, 2)}
    return {
        "losses": [2.0, 1.0],
        "norms": [0.5],
        "initial": part,
        "gradients": part,
        "weights": part,
        "drifted": [],
        "seconds": 1.0,
    } | changes


TOLERANCE = Tolerance(loss=1e-6, norm=1e-5, gradient=1e-5, weights=1e-4)


def verdict(**changes):
    return compare("x", 2, results(**changes), results(), TOLERANCE).verdict


def test_equal_results_are_the_same():
    row = compare("x", 2, results(), results(), TOLERANCE)
    assert row.verdict == "same"
    assert (row.loss, row.norm, row.gradient, row.weights) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "off"),
    [
        ({"losses": [2.0, 1.0 + 3e-6]}, "loss"),
        ({"losses": [math.nan, 1.0]}, "loss"),
        ({"norms": [0.5 * (1 - 3e-5)]}, "gradient norm"),
        (
            {"gradients": {"a": torch.tensor([3.0, 4.0 + 1e-3]), "b": torch.ones(2, 2)}},
            "gradient of a",
        ),
        ({"gradients": {"a": torch.tensor([3.0, 4.0])}}, "gradient of b"),
        ({"weights": {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(4)}}, "weights of b"),
        ({"weights": {"a": torch.tensor([math.inf, 4.0]), "b": torch.ones(2, 2)}}, "weights of a"),
        (
            {"initial": {"a": torch.tensor([3.0, 4.0]), "b": torch.full((2, 2), 1 + 2**-23)}},
            "initial weights of b",
        ),
        ({"drifted": ["b"]}, "copies differ between ranks of b"),
    ],
)
def test_what_is_off_is_named(changes, off):
    assert verdict(**changes) == f"OFF: {off}"


def test_a_difference_is_relative_to_the_references_norm():
    assert relative(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative(torch.zeros(2), torch.zeros(2)) == 0
    assert relative(torch.ones(2), torch.zeros(2)) == math.inf


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_the_table_is_accepted(name):
    layout = LAYOUTS[name]
    plan = make_plan(None, 4, [], LAYOUTS)
    JobConfig().parse_args(plan.command_line(layout.task, layout), world_size=layout.ranks)
    assert layout.task in TASKS


def test_the_reference_is_plain_whatever_the_options_say(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        "[parallelism]\ntensor_parallel_degree = 4\n"
        "[training]\nseq_len = 32\n"
        "[compile]\nenable = true\n"
    )
    options = ["--training.mixed_precision_param", "bfloat16", "--model.dim=128"]
    plan = make_plan(str(file), 7, options, {"fsdp4": LAYOUTS["fsdp4"]})
    reference = JobConfig().parse_args(plan.command_line("plain"), world_size=1)
    layout = JobConfig().parse_args(plan.command_line("plain", LAYOUTS["fsdp4"]), world_size=4)
    assert (reference.parallelism, reference.compile.enable) == (JobConfig().parallelism, False)
    assert (layout.parallelism, layout.compile.enable) == (JobConfig().parallelism, False)
    assert reference.training.mixed_precision_param == "float32"
    assert layout.training.mixed_precision_param == "bfloat16"
    for config in (reference, layout):
        assert (config.model.dim, config.training.seq_len, config.training.steps) == (128, 32, 7)
        assert config.training.global_batch_size == 4 * config.training.local_batch_size


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--layouts", "fsdp2,tpp2"], "'tpp2' is unknown; did you mean tp2?"),
        (["--layouts", ""], "'' is unknown"),
        (["--trainning.steps", "3"], "did you mean --training.steps or --validation.steps?"),
        (["--model.n_heads", "7"], "must divide model.dim"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--json", "nowhere/table.json"], "its folder does not exist"),
    ],
)
def test_a_users_fault_is_one_message_and_status_2(capsys, arguments, text):
    assert parity.main(arguments) == 2
    assert text in capsys.readouterr().err
