"""Pipelines: how models are cut, which schedules run what, evaluation, and checkpoints across cuts.

That a pipeline trains as one process does, under every schedule and with every other technique, is
tested by test_parity.
"""

import json
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.forking import in_group, on_ranks, train
from helpers.launching import metrics, options
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import train as trainer_module
from torchtrain.catalog.models import FAMILIES, ModelShape
from torchtrain.catalog.schedules import (
    SCHEDULES,
    check_microbatches,
    check_split,
    check_stages,
    default_stages,
    split_evenly,
    stages_of,
)
from torchtrain.checkpoint import Progress
from torchtrain.config.layout import plan_stages
from torchtrain.config.plans import plan_run
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.models.llama import Transformer
from torchtrain.set_up import make_plan, set_up

SHAPE = ModelShape(32, 6, 4, 2, 64, 50)
LAYER_NAMES = SHAPE.layer_names


def counts(parts):
    """Layers of each stage."""
    return [sum(name.startswith("layers.") for name in part) for part in parts]


@pytest.mark.parametrize(
    ("layers", "stages", "first", "last", "expected"),
    [
        (6, 2, 1, 1, [3, 3]),
        (6, 4, 1, 1, [1, 2, 2, 1]),
        (6, 3, 0, 0, [2, 2, 2]),
        (7, 3, 0, 0, [3, 2, 2]),
        (126, 16, 1, 1, [7, *[8] * 14, 7]),
        (80, 8, 1, 1, [10, 11, *[10] * 5, 9]),
        (2, 4, 1, 1, [0, 1, 1, 0]),
        (4, 2, 0, 2, [3, 1]),
    ],
)
def test_layers_are_cut_evenly_but_for_the_ends(layers, stages, first, last, expected):
    layer_names = ModelShape(32, layers, 4, 2, 64, 50).layer_names
    parts = split_evenly(layer_names, stages, first, last)
    assert counts(parts) == expected
    assert [name for part in parts for name in part] == layer_names
    check_split(parts, layer_names)


@pytest.mark.parametrize(("stages", "first", "last"), [(9, 1, 1), (2, 9, 0), (4, 0, 3)])
def test_too_few_layers_are_refused(stages, first, last):
    with pytest.raises(UserError, match=rf"too few layers, 6, for {stages} pipeline stages"):
        split_evenly(LAYER_NAMES, stages, first, last)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([LAYER_NAMES[:3], LAYER_NAMES[4:]], r"missing: layers\.2"),
        ([LAYER_NAMES[:4], LAYER_NAMES[3:]], r"given twice: layers\.2"),
        ([LAYER_NAMES[:3], [*LAYER_NAMES[3:], "layers.6"]], r"unknown: layers\.6"),
        ([LAYER_NAMES[3:], LAYER_NAMES[:3]], r"out of order: layers\.2"),
    ],
)
def test_a_cut_that_is_not_the_model_is_refused(parts, text):
    with pytest.raises(UserError, match=text):
        check_split(parts, LAYER_NAMES)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_stage_has_one_rank(schedule, ranks):
    stages = default_stages(schedule, ranks)
    check_stages(schedule, stages, ranks)
    owned = [stages_of(rank, schedule, stages, ranks) for rank in range(ranks)]
    assert sorted(stage for mine in owned for stage in mine) == list(range(stages))
    assert all(mine == sorted(mine) for mine in owned)
    v_shaped = stages == 2 * ranks and stages - 1 in owned[0]
    assert v_shaped == (SCHEDULES[schedule].stages_per_rank == "two")


def what_torch_accepts(ranks, counts, results):
    """The schedules, with the stages and microbatches that rank 0 of these can build them with."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    x = torch.empty(1, 2, device="meta")
    accepted = []
    for name, cuts in counts.items():
        schedule = get_schedule_class(name)
        for (stages, mine), microbatches in product(cuts, MICROBATCHES):
            cpu = torch.device("cpu")
            built = [
                PipelineStage(nn.Linear(2, 2), s, stages, cpu, input_args=x, output_args=x)
                for s in mine
            ]
            stage = built[0] if issubclass(schedule, PipelineScheduleSingle) else built
            with suppress(ValueError):
                schedule(stage, microbatches, loss_fn=lambda a, b: a)
                accepted.append([name, stages, microbatches])
    results.write_text(json.dumps(accepted))


MICROBATCHES = range(1, 14)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_microbatches_that_are_refused_are_those_that_pytorch_refuses(tmp_path, ranks):
    counts = {}
    for name, schedule in SCHEDULES.items():
        numbers = (
            (2 * ranks, 3 * ranks)
            if schedule.stages_per_rank == "several"
            else (default_stages(name, ranks),)
        )
        counts[name] = [(stages, stages_of(0, name, stages, ranks)) for stages in numbers]
    on_ranks(1, what_torch_accepts, ranks, counts, tmp_path / "accepted.json")
    mine = []
    for name, cuts in counts.items():
        for (stages, _), microbatches in product(cuts, MICROBATCHES):
            with suppress(UserError):
                check_microbatches(name, microbatches, stages, ranks)
                mine.append([name, stages, microbatches])
    assert mine == json.loads((tmp_path / "accepted.json").read_text())


def test_the_schedules_of_the_config_are_those_known():
    allowed = JobConfig().parallelism.model_json_schema()["properties"][
        "pipeline_parallel_schedule"
    ]["enum"]
    assert set(allowed) == set(SCHEDULES)


def planned(*args, world_size=4):
    config = JobConfig().parse_args(
        ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=8", *args],
        world_size,
    )
    return plan_stages(config.parallelism, FAMILIES["llama3"].flavors["debugmodel"].layer_names)


def test_cutting_options_cut():
    assert counts(planned()) == [3, 3]
    assert counts(planned("--parallelism.pipeline_parallel_first_stage_less_layers=3")) == [2, 4]
    assert counts(planned("--parallelism.pipeline_parallel_last_stage_less_layers=3")) == [4, 2]
    interleaved = "--parallelism.pipeline_parallel_schedule=Interleaved1F1B"
    assert counts(planned(interleaved)) == [1, 2, 2, 1]
    assert (
        counts(planned(interleaved, "--parallelism.pipeline_parallel_layers_per_stage=1"))[1:-1]
        == [1] * 6
    )
    given = "tok_embeddings,layers.0;layers.1,layers.2,layers.3,layers.4,layers.5,norm,output"
    parts = planned(f"--parallelism.module_fqns_per_model_part={given}")
    assert parts == [part.split(",") for part in given.split(";")]


def test_parts_of_a_model_compute_what_the_whole_does():
    torch.manual_seed(0)
    whole = Transformer(SHAPE)
    tokens = torch.randint(SHAPE.vocab_size, (2, 8))
    h = tokens
    names = []
    for layer_names in split_evenly(LAYER_NAMES, 3, 1, 1):
        part = Transformer(SHAPE)
        part.load_state_dict(whole.state_dict())
        part.keep(layer_names)
        names += dict(part.named_parameters())
        h = part(h)
    assert torch.equal(h, whole(tokens))
    assert sorted(names) == sorted(dict(whole.named_parameters()))


# ---- on ranks ----

SCHEDULE = "parallelism.pipeline_parallel_schedule"
PP = {
    "model.n_layers": 4,
    "training.local_batch_size": 8,
    "training.global_batch_size": 16,
    "parallelism.pipeline_parallel_degree": 2,
}
BF16 = {"training.mixed_precision_param": "bfloat16"}


def test_pipeline_options_reach_the_schedule(data):
    made = []
    for extra in (
        {},
        {SCHEDULE: "DualPipeV"},
        {"parallelism.pipeline_parallel_microbatch_size": 2},
    ):
        for recompute in ("none", "full"):
            given = {**data, **PP, **extra, "activation_checkpoint.mode": recompute}
            config = JobConfig().parse_args(options(given), world_size=2)
            made.append(plan_run(config, 2).pipeline)
    plans = [
        (p.schedule, p.stages, p.microbatches, p.microbatch_size, p.last_rank, p.whole_backward)
        for p in made
    ]
    assert plans == [
        *[("1F1B", 2, 8, 1, 1, False)] * 2,
        ("DualPipeV", 4, 8, 1, 0, False),
        ("DualPipeV", 4, 8, 1, 0, True),
        *[("1F1B", 2, 4, 2, 1, False)] * 2,
    ]


@pytest.mark.parametrize(
    ("resumed", "text"),
    [
        (8, "pipeline_parallel_microbatch_size = 3 must divide the 8 sequences"),
        (3, "1 microbatch for 2 stages; 1F1B needs at least one per stage"),
    ],
)
def test_a_resumed_batch_that_does_not_pass_is_refused(data, monkeypatch, resumed, text):
    """With a global batch of -1 it is the checkpoint's, which the config check cannot see."""
    own = {"training.local_batch_size": 9, "training.global_batch_size": -1}
    given = {**data, **PP, **own, "parallelism.pipeline_parallel_microbatch_size": 3}
    config = JobConfig().parse_args(options(given), world_size=2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    saved = Progress(step=1, tokens_seen=0, data={"global_batch_size": resumed}, config={})
    with pytest.raises(UserError, match="the global batch is the checkpoint's") as fault:
        make_plan(config, 2048, saved)
    assert text in str(fault.value)


@pytest.fixture(scope="module")
def found(tmp_path_factory, data):
    """found(name): what two ranks found under that schedule, or case."""
    folder = tmp_path_factory.mktemp("pipelines")
    cases = {name: {SCHEDULE: name} for name in SCHEDULES}
    cases |= {
        f"{name} bf16": {SCHEDULE: name, **BF16}
        for name in ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
    }
    cases["tied"] = {SCHEDULE: "DualPipeV", "model.tied_embeddings": True}

    arguments = {name: options({**data, **PP, **case}) for name, case in cases.items()}
    in_group(2, run_cases, arguments, folder)

    @cache
    def result(name):
        return torch.load(folder / name)

    return result


def run_cases(cases, folder):
    """Be a rank that does all cases; rank 0 saves what was found."""
    for name, arguments in cases.items():
        found = evaluate_and_train(arguments)
        if dist.get_rank() == 0:
            torch.save(found, folder / name)


def evaluate_and_train(arguments):
    """Evaluate a batch and train on it, twice; return what was found."""
    trainer = set_up(JobConfig().parse_args(arguments), torch.device("cpu"))
    batch = trainer.loader.step_batches(1)[0]
    valid = torch.ones((), dtype=torch.int64)
    found = {"evaluated": [], "trained": []}
    for _ in range(2):
        before = {name: weight.to_local().clone() for name, weight in trainer.weights.items()}
        found["evaluated"].append(summed(trainer.pipeline.evaluate(batch.tokens, batch.labels)))
        for part in trainer.parts.values():
            assert all(isinstance(weight, DTensor) for weight in part.parameters()), (
                "an evaluation left whole weights"
            )
        assert all(weight.grad is None for weight in trainer.weights.values()), (
            "an evaluation left a gradient"
        )
        found["trained"].append(
            summed(trainer.pipeline.forward_backward(batch.tokens, batch.labels, valid))
        )
        assert all(
            torch.equal(before[name], weight.to_local()) for name, weight in trainer.weights.items()
        )
        gradients = {
            name: weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
            for name, weight in trainer.weights.items()
        }
        found.setdefault("gradients", gradients)
        trainer_module.optimizer_step(trainer)
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, found["gradients"])
    found["gradients"] = {
        name: gradient for theirs in everyones for name, gradient in theirs.items()
    }
    return found


def summed(losses):
    """The last stage's, on all ranks."""
    losses = losses.double()
    dist.all_reduce(losses)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SCHEDULES, "tied"])
def test_evaluation_gives_the_training_forwards_losses_and_changes_nothing(found, name):
    for evaluated, trained in zip(found(name)["evaluated"], found(name)["trained"], strict=True):
        assert evaluated.shape == (8,)
        assert torch.equal(evaluated, trained)
    assert found(name)["evaluated"][1].sum() < found(name)["evaluated"][0].sum(), (
        "nothing was learned"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_losses_come_in_the_order_of_the_batch_under_every_schedule(found, name):
    for mine, reference in zip(found(name)["trained"], found("GPipe")["trained"], strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["InterleavedZeroBubble bf16", "ZBVZeroBubble bf16"])
def test_gradients_of_a_split_backward_add_up_in_fp32_too(found, name):
    """Summed over microbatches in bf16 they would be off by 4e-3."""
    for parameter, gradient in found(name)["gradients"].items():
        reference = found("1F1B bf16")["gradients"][parameter]
        assert gradient.dtype == torch.float32
        assert ((gradient - reference).norm() / reference.norm()).item() < 1e-6, parameter


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_goes_on_from_a_pipeline_to_tensor_ranks_to_one_process(tmp_path, data):
    common = {
        **data,
        **PP,
        "model.n_heads": 8,
        "model.n_kv_heads": 4,
        "training.steps": 6,
        "lr_scheduler.total_steps": 6,
        "checkpoint.enable": True,
        "checkpoint.interval": 2,
        "parallelism.pipeline_parallel_degree": None,
    }
    whole, moved = (
        {**common, "job.dump_folder": tmp_path / "whole"},
        {**common, "job.dump_folder": tmp_path / "moved"},
    )
    train(1, whole)
    train(
        2,
        {
            **moved,
            "parallelism.pipeline_parallel_degree": 2,
            SCHEDULE: "ZBVZeroBubble",
            "training.steps": 2,
        },
    )
    output = train(2, {**moved, "parallelism.tensor_parallel_degree": 2, "training.steps": 4})
    assert "step-2 (step 2, model and optimizer)" in output
    train(
        2,
        {
            **moved,
            "parallelism.pipeline_parallel_degree": 2,
            SCHEDULE: "Interleaved1F1B",
            "training.steps": 5,
        },
    )
    train(1, moved)
    expected, got = metrics(tmp_path / "whole"), metrics(tmp_path / "moved")
    assert [line["step"] for line in got] == [1, 2, 3, 4, 5, 6]
    for mine, reference in zip(got, expected, strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        assert mine["max_loss"] == pytest.approx(reference["max_loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
        assert mine["tokens_seen"] == reference["tokens_seen"]


@pytest.mark.slow
def test_the_start_says_how_the_model_is_cut(tmp_path, data):
    overrides = {
        **data,
        **PP,
        "job.dump_folder": tmp_path,
        "training.steps": 1,
        SCHEDULE: "Interleaved1F1B",
    }
    output = train(2, overrides)
    assert "pipeline parallel: 2 ranks share the layers" in output
    assert "pipeline schedule Interleaved1F1B: 4 stages, 8 microbatches of 1" in output
    facts = json.loads(Path(tmp_path / "run.json").read_text())
    assert facts["degrees"]["pp"] == 2
    assert facts["parameters"] == sum(
        p.numel() for p in Transformer(ModelShape(**facts["shape"])).parameters()
    )
