"""torchtitan's config files: what asks for nothing is taken and named, all else refused."""

import pytest
from helpers.configs import assert_one_fault, parse, report

from torchtrain.config import torchtitan_keys
from torchtrain.config.options import options
from torchtrain.config.schema import SECTIONS

# A value of each key that asks for something torchtrain lacks, and one that asks for nothing. The
# defaults and meanings are those of torchtitan v0.2.2's job_config.py.
ASKING = {
    "job.save_config_file": ('"all.json"', '""'),
    "job.custom_config_module": ('"my.config"', '""'),
    "metrics.save_for_all_ranks": ("true", "false"),
    "model.print_after_conversion": ("true", "false"),
    "optimizer.early_step_in_backward": ("true", "false"),
    "training.dataloader": (None, "{ num_workers = 4, pin_memory = true }"),
    "validation.dataloader": (None, "{ num_workers = 4 }"),
    "parallelism.pipeline_parallel_schedule_csv": ('"order.csv"', '""'),
    "parallelism.expert_tensor_parallel_degree": ("2", "1"),
    "parallelism.expert_parallel_comm_backend": (None, '"standard"'),
    "checkpoint.enable_ft_dataloader_checkpoints": (None, "true"),
    "checkpoint.initial_load_in_hf_quantized": ("true", "false"),
    "checkpoint.create_seed_checkpoint": ("true", "false"),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": (
        '["attention.wq"]',
        '["moe.router.gate"]',
    ),
    "activation_checkpoint.early_stop": ("true", "false"),
    "activation_checkpoint.visualize_memory_budget_pareto": ("true", "false"),
    "activation_checkpoint.preserve_rng_state": (None, "true"),
    "activation_checkpoint.determinism_check": ('"none"', '"default"'),
    "activation_checkpoint.debug": ("true", "false"),
    "comm.trace_buf_size": ("20000", "0"),
    "comm.save_traces_folder": (None, '"comm_traces"'),
    "comm.save_traces_file_prefix": (None, '"rank_"'),
    "comm.mode": ('"fake_backend"', '"default"'),
    "experimental.custom_args_module": ('"my.config"', '""'),
    "quantize.linear.mx": (None, '{ recipe_name = "mxfp8_cublas" }'),
    "quantize.grouped_mm": (None, '{ float8 = { fqns = ["experts"] } }'),
    "memory_estimation": (None, "{ disable_fake_mode = true }"),
    "memory_estimation.enable": ("true", "false"),
    "fault_tolerance": (None, '{ process_group = "gloo", group_size = 2 }'),
    "fault_tolerance.enable": ("true", "false"),
}


def as_toml(name, value):
    section, _, key = name.rpartition(".") if "." in name else (name, "", "")
    return f"[{section}]\n{key} = {value}" if key else f"{section} = {value}"


def test_every_key_has_its_values_here():
    assert list(ASKING) == list(torchtitan_keys.IDLE_VALUES)
    assert not set(ASKING) & set(options())
    assert not set(torchtitan_keys.SECTIONS) & set(SECTIONS)


@pytest.mark.parametrize("name", [name for name, values in ASKING.items() if values[0] is not None])
def test_what_asks_for_something_missing_is_refused(name):
    asks, _ = ASKING[name]
    text = f"{name} = {asks}: is a torchtitan v0.2.2 option that torchtrain does not support yet"
    assert_one_fault(report(as_toml(name, asks)), "run.toml", [text])


@pytest.mark.parametrize("name", ASKING)
def test_what_asks_for_nothing_is_taken_and_named(name):
    _, idle = ASKING[name]
    config = parse(as_toml(name, idle))
    (note,) = config.notes
    assert note.startswith("torchtitan options that have no effect here: ")
    assert name in note


def test_an_idle_value_is_one_of_the_right_type():
    for text in (
        "expert_tensor_parallel_degree = true",
        "expert_tensor_parallel_degree = 1.0",
    ):
        assert "not support yet" in report(f"[parallelism]\n{text}")


def test_on_the_command_line_too():
    config = parse(
        "", "--parallelism.expert_tensor_parallel_degree", "1", "--quantize.linear.mx.a=[]"
    )
    assert "parallelism.expert_tensor_parallel_degree, quantize.linear.mx.a" in config.notes[0]
    said = report("", "--activation_checkpoint.determinism_check=none")
    assert 'determinism_check = "none": is a torchtitan v0.2.2 option' in said
    assert "activation_checkpoint.debug = true" in report("", "--activation_checkpoint.debug")
    assert "given twice" in report("", "--comm.mode=default", "--comm.mode=default")


def test_a_seed_checkpoint_is_not_needed():
    said = report("[checkpoint]\ncreate_seed_checkpoint = true")
    assert "it is not needed: initial weights are a function of debug.seed" in said


def test_a_value_of_torchtitans_for_a_key_of_ours():
    said = report('[parallelism]\ncontext_parallel_load_balancer = "ptrr"')
    fragments = ['= "ptrr": this value is a torchtitan', "it must be one of headtail, none"]
    assert_one_fault(said, "run.toml", fragments)


# The keys that torchtitan v0.2.2's llama3 files set, with values of their kind.
LLAMA3 = """
[job]
dump_folder = "./outputs"
description = "Llama 3 8B"
custom_config_module = ""

[profiling]
enable_profiling = true
save_traces_folder = "profile_trace"
profile_freq = 100
enable_memory_snapshot = false
save_memory_snapshot_folder = "memory_snapshot"

[metrics]
log_freq = 10
disable_color_printing = false
enable_tensorboard = true
save_tb_folder = "tb"
enable_wandb = false

[model]
name = "llama3"
flavor = "{flavor}"
hf_assets_path = "./assets/hf"
converters = []

[optimizer]
name = "AdamW"
lr = 3e-4
eps = 1e-8

[lr_scheduler]
warmup_steps = 200
decay_ratio = 0.8
decay_type = "linear"
min_lr_factor = 0.0

[training]
local_batch_size = 8
seq_len = 8192
max_norm = 1.0
steps = 1000
dataset = "{dataset}"
dataloader.num_workers = 0

[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
fsdp_reshard_after_forward = "default"
tensor_parallel_degree = {tensor_parallel}
enable_async_tensor_parallel = false
pipeline_parallel_degree = 1
pipeline_parallel_schedule = "Interleaved1F1B"
context_parallel_degree = 1
expert_parallel_degree = 1
expert_tensor_parallel_degree = 1

[checkpoint]
enable = false
folder = "checkpoint"
interval = 500
last_save_model_only = true
export_dtype = "float32"
async_mode = "disabled"

[compile]
enable = {compiled}
components = ["model", "loss"]

[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"

[quantize.linear.float8]
enable_fsdp_float8_all_gather = false
precompute_float8_dynamic_scale_for_fsdp = false
filter_fqns = ["output"]

[validation]
enable = false
dataset = "c4_validation"
freq = 500
steps = 1200
dataloader.num_workers = 0
"""

# flavor, tensor-parallel degree, compile, ranks
LLAMA3_FILES = {
    "debugmodel": (1, "false", 1),
    "8B": (1, "false", 8),
    "70B": (8, "true", 256),
    "405B": (8, "true", 512),
}


def llama3_file(flavor, dataset="c4"):
    tensor_parallel, compiled, ranks = LLAMA3_FILES[flavor]
    text = LLAMA3.format(
        flavor=flavor, dataset=dataset, tensor_parallel=tensor_parallel, compiled=compiled
    )
    return text, ranks


@pytest.mark.parametrize("flavor", LLAMA3_FILES)
def test_a_llama3_file_starts(flavor):
    text, ranks = llama3_file(flavor)
    config = parse(text, world_size=ranks)
    assert (config.model.flavor, config.training.steps) == (flavor, 1000)
    assert config.notes == [
        "torchtitan options that have no effect here: job.custom_config_module, "
        "training.dataloader, parallelism.expert_tensor_parallel_degree, validation.dataloader",
        'parallelism.pipeline_parallel_schedule = "Interleaved1F1B" has no effect while '
        "parallelism.pipeline_parallel_degree = 1",
        "checkpoint.last_save_model_only = true has no effect while checkpoint.enable = false",
        'checkpoint.async_mode = "disabled" has no effect while checkpoint.enable = false',
        'checkpoint.export_dtype = "float32" has no effect while checkpoint.enable = false',
        'quantize.linear.float8.filter_fqns = ["output"] has no effect while model.converters = []',
    ]


def test_the_test_dataset_is_said_to_be_torchtitans():
    text, _ = llama3_file("debugmodel", dataset="c4_test")
    fragments = ["training.dataset = 'c4_test' is not included", "torchtitan's own tests; set c4"]
    assert_one_fault(report(text), "run.toml", fragments)
    config = parse(text, "--training.dataset", "python_stdlib")
    assert config.training.dataset == "python_stdlib"


@pytest.mark.parametrize("family", ["llama4", "deepseek_v3", "flux", "gpt_oss"])
def test_a_family_that_is_not_here_is_one_fault_without_a_suggestion(family):
    text, _ = llama3_file("debugmodel")
    text = text.replace('name = "llama3"', f'name = "{family}"')
    said = report(
        text.replace('"debugmodel"', '"17bx16e"'), "--parallelism.tensor_parallel_degree=1"
    )
    allowed = "allowed: llama2, llama3, mixtral, qwen3, and what experimental.custom_import"
    assert_one_fault(said, "run.toml", [f"model.name = '{family}' is unknown; {allowed} registers"])
    assert "did you mean" not in said.lower()
