"""Options that another one leaves without effect: noted, never refused."""

import pytest
from helpers.configs import parse

from torchtrain.catalog.optimizers import OPTIMIZERS

PP2 = "--parallelism.pipeline_parallel_degree=2"
CP2 = "--parallelism.context_parallel_degree=2"

# Each with one option that another one leaves without effect: the file, and what the note holds.
IDLE = {
    "mixture and dataset": (
        '[data]\nmixture = ["python_stdlib = 1"]\n[training]\ndataset = "c4"',
        ['training.dataset = "c4" has no effect', "data.mixture"],
    ),
    "streams of what is cached": (
        "[data]\nstreams = 4",
        ["data.streams = 4 has no effect while data.streaming = false"],
    ),
    "stream of a token file": (
        '[training]\ndataset = "tokens"\ndataset_path = "run.toml"\n[data]\nstreaming = true',
        ["data.streaming = true has no effect: token files are read in place"],
    ),
    "type of no export": (
        '[checkpoint]\nenable = true\nexport_dtype = "float16"',
        ['export_dtype = "float16" has no effect while neither last_save_model_only nor'],
    ),
    "validation path alone": (
        '[validation]\nenable = true\ndataset_path = "."',
        ["dataset_path", "no effect while validation.dataset is unset"],
    ),
    "share of a named set": (
        '[validation]\nenable = true\ndataset = "python_stdlib"\nheld_out_share = 0.5',
        ["held_out_share = 0.5 has no effect", '"python_stdlib"'],
    ),
    "type of no token file": (
        '[data]\ntoken_dtype = "uint16"',
        ["data.token_dtype", "has no effect"],
    ),
    "changes of no checkpoint": (
        "[checkpoint]\naccept_changed_data = true",
        ["accept_changed_data", "enable = false"],
    ),
    "recipe of no converter": (
        '[quantize.linear.float8]\nrecipe_name = "rowwise"',
        ['float8.recipe_name = "rowwise" has no effect while model.converters = []'],
    ),
    "scales of no weight gathered in float8": (
        '[model]\nconverters = ["quantize.linear.float8"]\n[quantize.linear.float8]\n'
        "emulate = true\nprecompute_float8_dynamic_scale_for_fsdp = true",
        [
            "precompute_float8_dynamic_scale_for_fsdp = true has no effect while "
            "quantize.linear.float8.enable_fsdp_float8_all_gather = false"
        ],
    ),
    "momentum of AdamW": (
        "[optimizer]\nmuon_momentum = 0.9",
        ['optimizer.muon_momentum = 0.9 has no effect while optimizer.name = "AdamW"'],
    ),
    "load_step unused": (
        "[checkpoint]\nload_step = 5",
        ["checkpoint.load_step = 5 has no effect", "enable = false"],
    ),
    "load_only unused": (
        "[checkpoint]\nload_only = true",
        ["checkpoint.load_only = true has no effect"],
    ),
    "first step of nothing": (
        "[checkpoint]\nenable = true\nload_only = true\nenable_first_step_checkpoint = true",
        ["enable_first_step_checkpoint = true has no effect"],
    ),
    "initial path unused": (
        '[checkpoint]\ninitial_load_path = "."',
        ["initial_load_path", "has no effect"],
    ),
    "initial state of nothing": (
        "[checkpoint]\nenable = true\ninitial_load_model_only = false",
        ["has no effect while checkpoint.initial_load_path is unset"],
    ),
    "part of the weights alone": (
        '[checkpoint]\nenable = true\ninitial_load_path = "."\n'
        'exclude_from_loading = ["optimizer"]',
        ["exclude_from_loading", "no effect while checkpoint.initial_load_model_only = true"],
    ),
    "rate of a checkpoint": (
        '[checkpoint]\nenable = true\ninitial_load_path = "."\ninitial_load_model_only = false\n'
        'exclude_from_loading = ["lr_scheduler"]',
        [
            "exclude_from_loading",
            "lr_scheduler has no effect: the rate always follows from the config",
        ],
    ),
    "balance of a dense model": (
        "[router]\nz_loss_weight = 0.1",
        ["router.z_loss_weight = 0.1 has no effect: the model has no sparse layer"],
    ),
    "forced balance of a dense model": (
        "[debug]\nmoe_force_load_balance = true",
        ["debug.moe_force_load_balance = true has no effect: the model has no sparse layer"],
    ),
    "rate of no bias": (
        "[model]\nn_experts = 4\n[router]\nbias_update_rate = 0.1",
        ["router.bias_update_rate = 0.1 has no effect while", "router_bias = false"],
    ),
    "expert of no experts": (
        "[model]\nexpert_hidden_dim = 64",
        ["model.expert_hidden_dim = 64 has no effect while model.n_experts = 0"],
    ),
    "width of no dense layer": (
        "[model]\nn_experts = 4\nexpert_hidden_dim = 64\nffn_hidden_dim = 128",
        ["model.ffn_hidden_dim = 128 has no effect: all layers are sparse"],
    ),
    "most of no skips": (
        "[training]\nmax_skips = 3",
        ["training.max_skips = 3 has no effect: no step is skipped"],
    ),
    "window of no spikes": (
        "[training]\nspike_window = 64",
        ["spike_window = 64 has no effect while training.spike_deviations is unset"],
    ),
    "skipping what raises": (
        '[training]\non_nonfinite = "skip"\n[debug]\ndetect_anomaly = true',
        ['training.on_nonfinite = "skip" skips no NaN', "debug.detect_anomaly ends the run"],
    ),
    "warning only": (
        "[debug]\ndeterministic_warn_only = true",
        ["has no effect", "debug.deterministic = false"],
    ),
}


@pytest.mark.parametrize("name", IDLE)
def test_an_option_without_effect_is_noted_and_taken(name):
    text, fragments = IDLE[name]
    (note,) = parse(text).notes
    for fragment in fragments:
        assert fragment in note


# Each with one option that another one leaves without effect, on 4 ranks.
IDLE_LAYOUTS = {
    "rotation": (
        [
            CP2,
            "--parallelism.context_parallel_method=ulysses",
            "--parallelism.context_parallel_rotate_method=alltoall",
        ],
        ['alltoall" has no effect while parallelism.context_parallel_method = "ulysses"'],
    ),
    "no tp": (
        ["--parallelism.disable_loss_parallel"],
        ["has no effect while parallelism.tensor_parallel_degree = 1"],
    ),
    "no cp": (
        ["--parallelism.context_parallel_method=ulysses"],
        ["no effect while parallelism.context_parallel_deg"],
    ),
    "no pp": (
        [
            "--parallelism.pipeline_parallel_schedule=GPipe",
        ],
        [
            'pipeline_parallel_schedule = "GPipe" has no effect',
            "while parallelism.pipeline_parallel_degree = 1",
        ],
    ),
    "pp both cuts": (
        [
            PP2,
            "--model.n_layers=1",
            "--parallelism.pipeline_parallel_layers_per_stage=1",
            "--parallelism.module_fqns_per_model_part=tok_embeddings;layers.0,norm,output",
        ],
        [
            "pipeline_parallel_layers_per_stage = 1 has no effect",
            "while parallelism.module_fqns_per_model_part = ",
        ],
    ),
}


@pytest.mark.parametrize("name", IDLE_LAYOUTS)
def test_a_layout_option_without_effect_is_noted_and_taken(name):
    args, fragments = IDLE_LAYOUTS[name]
    (note,) = parse("", *args, world_size=4).notes
    for fragment in fragments:
        assert fragment in note


def test_what_has_an_effect_is_not_noted():
    text = """
[model]
n_experts = 4
expert_hidden_dim = 64
ffn_hidden_dim = 128
sparse_every = 2
[checkpoint]
enable = true
load_step = 4
keep_latest_k = 3
initial_load_path = "."
initial_load_model_only = false
[data]
streaming = true
streams = 4
[debug]
deterministic = true
deterministic_warn_only = true
"""
    assert parse(text).notes == []
    assert (
        parse("", CP2, "--parallelism.context_parallel_rotate_method=alltoall", world_size=2).notes
        == []
    )


def test_what_only_your_own_code_can_heed_is_noted(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "Mine", "my_optimizers:build")
    given = '[optimizer]\nstate_dtype = "bfloat16"\nname = '
    for name in ("AdamW", "Adam", "Muon"):
        assert parse(f'{given}"{name}"').notes == []
    assert parse(f'{given}"Mine"').notes == [
        'optimizer.state_dtype = "bfloat16" has an effect only if my_optimizers:build reads it'
    ]


def test_each_option_is_noted_once():
    config = parse(
        "",
        "--checkpoint.enable_first_step_checkpoint",
        "--checkpoint.load_only",
    )
    assert config.notes == [
        "checkpoint.load_only = true has no effect while checkpoint.enable = false",
        "checkpoint.enable_first_step_checkpoint = true has no effect while checkpoint.enable = "
        "false",
    ]
