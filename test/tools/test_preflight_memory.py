"""What a rank's memory is predicted to be, against what FSDP and a step really take."""

import json

import pytest
import torch
from helpers.counted import Counting, lonely_rank
from helpers.fsdp import parameter_groups
from helpers.launching import ROOT
from helpers.measured import measure, predict

from torchtrain.catalog.schedules import stages_of
from torchtrain.config_manager import JobConfig
from torchtrain.models.decoder import load_decoder
from torchtrain.parallelisms.apply import Techniques, build_parts
from torchtrain.parallelisms.fsdp import find_fsdp_modules
from torchtrain.parallelisms.mesh import Mesh
from torchtrain.set_up import set_up_model
from torchtrain.tools.memory_check import count_least
from torchtrain.tools.preflight import __main__ as preflight
from torchtrain.tools.preflight.activations import trace_layers
from torchtrain.tools.preflight.memory import Run, estimate_memory, make_plan
from torchtrain.tools.preflight.specimen import Request, fake_ranks
from torchtrain.tools.preflight.states import NO_WEIGHTS

SMALL = [
    "--model.dim=128",
    "--training.seq_len=64",
    "--training.global_batch_size=8",
    "--training.local_batch_size=4",
]
TWO, FOUR = "--model.n_layers=2", "--model.n_layers=4"


def read(file, ranks, *options):
    toml = str(ROOT / "train_configs" / f"{file}.toml")
    return JobConfig().parse_args(["--job.config_file", toml, *options], ranks)


def shards_of_fsdp(config, ranks):
    """Bytes of the shards that rank 0's FSDP modules keep, filled up as FSDP does."""
    plan = make_plan(config, ranks)
    techniques = Techniques(
        training=config.training,
        parallelism=config.parallelism,
        activation_checkpoint=config.activation_checkpoint,
        compile=config.compile,
    )
    with fake_ranks(0, ranks):
        mesh = Mesh(plan.degrees, "cpu", has_experts=plan.shape.n_experts > 0)
        model = load_decoder(config.model.name)
        (part,) = build_parts(model, plan.shape, {0: plan.stages[0]}, mesh, techniques).values()
        # Norm and output are two modules of one state.
        states = {module._get_fsdp_state() for module in find_fsdp_modules(part)}
        groups = [group for state in states for group in parameter_groups(state)]
        weights = [weight for group in groups for weight in group.fsdp_params]
        width = weights[0].sharded_param.dtype.itemsize
        return width * sum(weight.padded_sharded_param_size.numel() for weight in weights)


@pytest.mark.parametrize(
    ("file", "ranks", "options"),
    [
        ("debug_model", 3, []),
        ("debug_model", 8, ["--parallelism.tensor_parallel_degree=2"]),
        ("debug_model", 4, ["--model.tied_embeddings", "--training.dtype=bfloat16"]),
        (
            "debug_moe",
            8,
            ["--parallelism.tensor_parallel_degree=2", "--parallelism.expert_parallel_degree=4"],
        ),
    ],
)
def test_shards_are_those_of_fsdp(file, ranks, options):
    config = read(file, ranks, *options)
    (rank,) = estimate_memory(config, ranks)
    assert rank.parameters == shards_of_fsdp(config, ranks)
    assert 0.7 < count_least(config, ranks) / (2 * rank.parameters + rank.optimizer_states) <= 1


@pytest.mark.parametrize("ranks", [1, 3])
def test_weights_in_float8_take_what_fsdp_gathers(ranks):
    """Uneven shards are filled up; the output is not in float8 where it is the embedding, too."""
    options = [
        "--model.converters=quantize.linear.float8",
        "--quantize.linear.float8.emulate",
        "--quantize.linear.float8.enable_fsdp_float8_all_gather",
        "--quantize.linear.float8.filter_fqns=layers.1.feed_forward.w2",
        "--training.mixed_precision_param=bfloat16",
        *([TWO, "--model.tied_embeddings"] if ranks == 1 else [TWO]),
    ]
    config = read("debug_model", ranks, *options)
    plan = make_plan(config, ranks)
    request = Request.of(config, plan, "cpu")
    run = Run(config, plan, request, trace_layers(request))
    expected = {f"layers.{layer}": run.weigh_block(layer)[0] for layer in (0, 1)}
    expected[""] = run.weigh_layer("tok_embeddings", "norm")
    if ranks == 3:
        expected[""] = NO_WEIGHTS
        expected["tok_embeddings"] = run.weigh_layer("tok_embeddings")
        expected["norm"] = run.weigh_layer("norm", "output")
    found = {}
    with lonely_rank(ranks):
        (part,) = set_up_model(config, plan, torch.device("cpu")).parts.values()
        for module in find_fsdp_modules(part):
            name = next(name for name, each in part.named_modules() if each is module)
            with Counting() as counting:
                module.unshard()
            weights = [
                w for group in parameter_groups(module._get_fsdp_state()) for w in group.fsdp_params
            ]
            gathered = sum(w.all_gather_outputs[0].untyped_storage().nbytes() for w in weights)
            found[name] = gathered, counting.bytes["FSDP's", "all_gather"]
    found.pop("output", None)  # whose state is the norm's
    assert found == {n: (w.gathered, w.gather_buffer) for n, w in expected.items()}
    first, second = expected["layers.0"], expected["layers.1"]
    assert first.gathered < second.gathered < second.gradients + 2000


def test_a_rank_of_fewer_layers_holds_less():
    whole = read("debug_model", 2)
    piped = read("debug_model", 2, "--parallelism.pipeline_parallel_degree=2")
    (alone,) = estimate_memory(whole, 2)
    first, last = estimate_memory(piped, 2)
    assert first.pipeline_rank == 0
    assert first.total > 0
    assert last.total > 0
    shards = first.parameters + last.parameters
    assert shards == pytest.approx(2 * alone.parameters, rel=0.01)


@pytest.mark.parametrize(
    ("schedule", "outputs", "gradients"),
    [
        ("1F1B", [False, False], [False, False]),
        ("GPipe", [True, False], [False, True]),
        ("Interleaved1F1B", [True, True, True, False], [False, True, True, True]),
        ("ZBVZeroBubble", [True, False, True, False], [False, True, False, True]),
    ],
)
def test_what_goes_to_another_rank_is_held_while_a_schedule_waits_for_all_at_once(
    schedule, outputs, gradients
):
    """In the V the second rank has stages 1 and 2."""
    options = ["pipeline_parallel_degree=2", f"pipeline_parallel_schedule={schedule}"]
    config = read("debug_model", 2, *(f"--parallelism.{option}" for option in options))
    plan = make_plan(config, 2)
    request = Request.of(config, plan, "cpu")
    run = Run(config, plan, request, trace_layers(request))
    stages = {}
    for rank in range(2):
        numbers = stages_of(rank, schedule, len(plan.stages), 2)
        stages |= {number: run.build_stage(number, numbers) for number in numbers}
    size = plan.pipeline.microbatch_size * 128 * 256 * 2
    assert [stages[n].output_sent for n in range(len(stages))] == [size * each for each in outputs]
    assert [stages[n].gradient_sent for n in range(len(stages))] == [size * g for g in gradients]


def test_the_optimizer_keeps_states_for_all_stages_of_a_rank():
    options = ["pipeline_parallel_degree=2", "pipeline_parallel_schedule=Interleaved1F1B"]
    config = read("debug_model", 2, *(f"--parallelism.{option}" for option in options))
    for rank in estimate_memory(config, 2):
        assert rank.optimizer_states == 2 * rank.parameters > 0


def test_what_is_in_the_hosts_memory_is_not_counted():
    held, offloaded = (
        estimate_memory(read("debug_model", 4, *options), 4)[0]
        for options in ([], ["--training.enable_cpu_offload"])
    )
    assert held.moment == offloaded.moment == "loss"
    in_the_host = {"parameters": 0, "gradients": 0, "optimizer_states": 0}
    assert offloaded.parts == held.parts | in_the_host
    assert held.parameters > 0
    assert held.optimizer_states == 2 * held.parameters


@pytest.mark.slow
def test_the_prediction_is_what_the_tensors_of_a_run_take(tmp_path):
    """Three layouts with different worst moments, trained by one pair of ranks."""
    cases = [
        ("debug_model", [*SMALL, FOUR, "--parallelism.pipeline_parallel_degree=2"]),
        ("debug_model", [*SMALL, TWO, "--parallelism.tensor_parallel_degree=2"]),
        ("debug_moe", [*SMALL, TWO]),
    ]
    predicted = [predict(file, 2, options) for file, options in cases]
    assert [rank.moment for rank in predicted] == [
        "backward of block 1, stage 0",
        "loss",
        "reduction of the gradients of block 1",
    ]
    measured = measure(2, cases, tmp_path)
    assert [rank.total for rank in predicted] == pytest.approx(measured, rel=0.05)


def test_the_command_prints_parts_and_verdict(capsys):
    toml = str(ROOT / "train_configs" / "llama3_8b.toml")
    options = ["--job.config_file", toml, "--training.dataset=c4", "--world-size", "8"]
    assert preflight.main([*options, "--device", "h100"]) == 0
    said = capsys.readouterr().out
    assert "optimizer states" in said
    assert said.splitlines()[-1].startswith("fits: ")
    batch = "--training.local_batch_size=64"
    assert preflight.main([*options, batch, "--device", "h100", "--json"]) == 3
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == "does not fit"
    (rank,) = printed["ranks"]
    assert rank["total"] > 79 * 2**30
