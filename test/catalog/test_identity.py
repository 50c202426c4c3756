"""What becomes of every key when a run resumes; which model a checkpoint holds."""

from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from torchtrain.catalog.identity import (
    RESULTS,
    ROUNDING,
    Difference,
    ModelIdentity,
    compare_models,
    describe_changes,
    find_saved_model,
    require_same_model,
)
from torchtrain.catalog.models import EXPERT_DETAILS, FAMILIES, ModelShape, register_model
from torchtrain.config.options import options
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.tools.sweep.kept import WHERE_IT_BEGINS, list_compared

SHAPE = ModelShape(dim=64, n_layers=2, n_heads=16, n_kv_heads=8, ffn_hidden_dim=96, vocab_size=128)


# What becomes of each key when a run resumes, beside `RESULTS` and `ROUNDING`, which are stated.
COMPARED = {
    "as the resolved shape": (
        "model.name",
        "model.flavor",
        *(f"model.{field.name}" for field in fields(ModelShape)),
    ),
    "by fingerprints in the data state": (
        "model.tokenizer_path",
        "model.hf_assets_path",
        "training.dataset",
        "training.dataset_path",
        "training.global_batch_size",
        "training.seq_len",
        "data.text_key",
        "data.mixture",
        "data.packing",
        "data.token_dtype",
        "data.streaming",
        "data.streams",
        "validation.enable",
        "validation.held_out_share",
        "debug.seed",
    ),
    "as tensors": ("training.dtype", "optimizer.state_dtype"),
    "as the learning-rate schedule, with lines of its own": (
        "optimizer.lr",
        "lr_scheduler.warmup_steps",
        "lr_scheduler.warmup_ratio",
        "lr_scheduler.total_steps",
        "lr_scheduler.decay_ratio",
        "lr_scheduler.decay_type",
        "lr_scheduler.min_lr_factor",
        "training.steps",
        "training.tokens",
    ),
}
# Where outputs go, how long things wait, what is kept in memory.
CHANGES_NO_RESULT = (
    "parallelism.pipeline_parallel_expert_parallel_overlap",
    "quantize.linear.float8.enable_fsdp_float8_all_gather",
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
    "job.config_file",
    "job.dump_folder",
    "job.description",
    "job.print_config",
    "profiling.enable_profiling",
    "profiling.save_traces_folder",
    "profiling.profile_freq",
    "profiling.profiler_active",
    "profiling.profiler_warmup",
    "profiling.enable_memory_snapshot",
    "profiling.save_memory_snapshot_folder",
    "metrics.log_freq",
    "metrics.enable_tensorboard",
    "metrics.disable_color_printing",
    "metrics.save_tb_folder",
    "metrics.enable_wandb",
    "metrics.peak_tflops",
    "job.max_minutes",
    "checkpoint.keep_every",
    "checkpoint.interval_minutes",
    "checkpoint.async_mode",
    "checkpoint.on_save_error",
    "checkpoint.last_save_model_only",
    "checkpoint.last_save_in_hf",
    "checkpoint.export_dtype",
    "text_samples.prompts",
    "text_samples.freq",
    "text_samples.max_new_tokens",
    "text_samples.temperature",
    "lr_scheduler.log_schedule",
    "lr_scheduler.log_lr",
    "router.log_layers_freq",
    "training.max_skips",
    "training.gc_freq",
    "training.gc_debug",
    "data.cache_folder",
    "data.stall_timeout_seconds",
    "parallelism.fsdp_reshard_after_forward",
    "parallelism.pipeline_parallel_layers_per_stage",
    "parallelism.pipeline_parallel_first_stage_less_layers",
    "parallelism.pipeline_parallel_last_stage_less_layers",
    "parallelism.module_fqns_per_model_part",
    "checkpoint.enable",
    "checkpoint.folder",
    "checkpoint.interval",
    "checkpoint.initial_load_path",
    "checkpoint.initial_load_model_only",
    "checkpoint.exclude_from_loading",
    "checkpoint.initial_load_in_hf",
    "checkpoint.keep_latest_k",
    "checkpoint.load_step",
    "checkpoint.enable_first_step_checkpoint",
    "checkpoint.load_only",
    "checkpoint.accept_changed_data",
    "checkpoint.accept_changed_model",
    "activation_checkpoint.mode",
    "activation_checkpoint.selective_ac_option",
    "activation_checkpoint.memory_budget",
    "comm.init_timeout_seconds",
    "comm.train_timeout_seconds",
    "validation.local_batch_size",
    "debug.deterministic_warn_only",
    "debug.detect_anomaly",
    "debug.replica_check_freq",
)


def test_every_key_is_compared_or_stated_or_changes_no_result():
    groups = (*COMPARED.values(), RESULTS, ROUNDING, CHANGES_NO_RESULT)
    listed = Counter(name for names in groups for name in names)
    assert [name for name, times in listed.items() if times > 1] == []
    assert set(listed) - set(options()) == set(), "a key that no longer exists"
    assert set(options()) - set(listed) == set(), "decide what becomes of the new key on resume"


def test_a_sweep_compares_every_key_but_those_that_change_no_result():
    assert set(WHERE_IT_BEGINS) <= set(CHANGES_NO_RESULT), "of a run that goes on, not of a new one"
    idle = set(CHANGES_NO_RESULT) - set(WHERE_IT_BEGINS)
    assert set(list_compared()) == set(options()) - idle


# Models


def identity(shape=SHAPE, family="llama2"):
    return ModelIdentity(family=family, shape=asdict(shape))


CHANGED = {
    "dim": 128,
    "n_layers": 3,
    "n_heads": 8,
    "n_kv_heads": 4,
    "ffn_hidden_dim": 97,
    "vocab_size": 129,
    "rope_theta": 5e5,
    "norm_eps": 1e-6,
    "tied_embeddings": True,
    "rope_scaling_factor": 8.0,
    "rope_low_freq_factor": 2.0,
    "rope_high_freq_factor": 8.0,
    "rope_original_seq_len": 4096,
    "head_width": 16,
    "qk_norm": True,
    "n_experts": 4,
    "experts_per_token": 1,
    "expert_hidden_dim": 48,
    "n_shared_experts": 1,
    "n_dense_layers": 1,
    "sparse_every": 2,
    "router_scores": "sigmoid",
    "router_renormalize": False,
    "router_scale": 2.5,
    "router_bias": True,
}


@pytest.mark.parametrize("key", CHANGED)
def test_each_field_of_the_shape_is_compared(key):
    assert CHANGED.keys() == asdict(SHAPE).keys()
    shape = replace(SHAPE, rope_scaling_factor=32.0, n_experts=8)
    saved = asdict(shape)[key]
    found = compare_models(identity(shape), identity(replace(shape, **{key: CHANGED[key]})))
    assert found == [Difference(f"model.{key}", saved, CHANGED[key])]
    assert compare_models(identity(shape), identity(shape)) == []


def test_a_refusal_names_both_values_and_what_to_set():
    current = identity(replace(SHAPE, n_heads=8, norm_eps=1e-6))
    require_same_model(Path("there"), identity(), identity(), accept_changes=False)
    with pytest.raises(UserError) as fault:
        require_same_model(Path("there"), identity(), current, accept_changes=False)
    assert str(fault.value) == (
        "there holds another model than this run's:\n"
        "  model.n_heads: 16 in the checkpoint, 8 now\n"
        "  model.norm_eps: 1e-05 in the checkpoint, 1e-06 now\n"
        "For the checkpoint's model set model.n_heads = 16, model.norm_eps = 1e-05. To load its "
        "weights into this one anyway, set checkpoint.accept_changed_model = true"
    )
    require_same_model(Path("there"), identity(), current, accept_changes=True)


def test_details_of_scaling_change_nothing_where_nothing_is_scaled():
    changed = replace(SHAPE, rope_low_freq_factor=2.0, rope_original_seq_len=4096)
    assert compare_models(identity(), identity(changed)) == []
    scaled = replace(changed, rope_scaling_factor=8.0)
    assert [each.key for each in compare_models(identity(), identity(scaled))] == [
        "model.rope_scaling_factor",
        "model.rope_low_freq_factor",
        "model.rope_original_seq_len",
    ]


def test_details_of_experts_change_nothing_where_there_are_none():
    deep = replace(SHAPE, n_layers=4)
    changed = replace(deep, **{key: CHANGED[key] for key in EXPERT_DETAILS})
    assert compare_models(identity(deep), identity(changed)) == []
    found = compare_models(identity(deep), identity(replace(changed, n_experts=4)))
    assert {each.key for each in found} == {
        "model.n_experts",
        *(f"model.{key}" for key in EXPERT_DETAILS),
    }


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"head_width": 4}),
        ({"n_experts": 8}, {"n_experts": 8, "expert_hidden_dim": 96}),
        (
            {"n_experts": 8, "expert_hidden_dim": 32},
            {"n_experts": 8, "expert_hidden_dim": 32, "ffn_hidden_dim": 33},
        ),
        ({"n_experts": 8, "n_dense_layers": 1}, {"n_experts": 8, "sparse_every": 2}),
    ],
)
def test_a_width_written_out_is_the_same_model(before, now):
    assert compare_models(identity(replace(SHAPE, **before)), identity(replace(SHAPE, **now))) == []
    assert compare_models(identity(replace(SHAPE, **now)), identity(replace(SHAPE, **before))) == []


def test_a_checkpoint_from_before_there_were_experts_is_what_it_was():
    saved = {key: asdict(SHAPE)[key] for key in list(asdict(SHAPE))[:13]}
    assert list(saved)[-1] == "rope_original_seq_len"
    assert compare_models(ModelIdentity(family="llama2", shape=saved), identity()) == []


def test_a_vocabulary_that_is_the_tokenizers_is_not_compared_here():
    assert compare_models(identity(replace(SHAPE, vocab_size=0)), identity()) == []
    assert compare_models(identity(), identity(replace(SHAPE, vocab_size=0))) == []


def test_a_field_that_the_checkpoint_does_not_know_had_its_default():
    saved = {key: value for key, value in asdict(SHAPE).items() if key != "tied_embeddings"}
    before = ModelIdentity(family="llama2", shape=saved)
    assert compare_models(before, identity()) == []
    (found,) = compare_models(before, identity(replace(SHAPE, tied_embeddings=True)))
    assert found == Difference("model.tied_embeddings", False, True)


def test_a_field_that_only_the_checkpoint_knows_is_refused():
    saved = ModelIdentity(family="llama2", shape={**asdict(SHAPE), "window": 512})
    assert compare_models(saved, identity()) == [Difference("model.window", 512, None)]


def test_a_family_is_the_same_where_one_class_computes_it():
    assert compare_models(identity(family="llama2"), identity(family="llama3")) == []
    register_model("of another class", {"tiny": SHAPE}, "somewhere:Model")
    try:
        (found,) = compare_models(identity(), identity(family="of another class"))
        assert found == Difference("model.name", "llama2", "of another class")
    finally:
        del FAMILIES["of another class"]
    (found,) = compare_models(identity(family="no longer registered"), identity())
    assert found.key == "model.name"


# torchtrain/models/flavors.py as it was before checkpoints held their shape: dim, n_layers,
# n_heads, n_kv_heads, ffn_hidden_dim, vocab_size, rope_theta, rope_scaling_factor.
ONCE = {
    ("llama2", "debugmodel"): (256, 6, 16, 16, 768, 0, 1e4, 1),
    ("llama2", "271M"): (1024, 16, 8, 8, 2816, 32_000, 1e4, 1),
    ("llama2", "1B"): (2048, 18, 16, 16, 5632, 32_000, 1e4, 1),
    ("llama2", "7B"): (4096, 32, 32, 32, 11_008, 32_000, 1e4, 1),
    ("llama2", "13B"): (5120, 40, 40, 40, 13_824, 32_000, 1e4, 1),
    ("llama2", "70B"): (8192, 80, 64, 8, 28_672, 32_000, 1e4, 1),
    ("llama3", "debugmodel"): (256, 6, 16, 16, 768, 0, 5e5, 1),
    ("llama3", "8B"): (4096, 32, 32, 8, 14_336, 128_256, 5e5, 1),
    ("llama3", "70B"): (8192, 80, 64, 8, 28_672, 128_256, 5e5, 1),
    ("llama3", "405B"): (16_384, 126, 128, 8, 53_248, 128_256, 5e5, 8),
}


@pytest.mark.parametrize(("name", "flavor"), ONCE)
def test_a_change_of_the_flavors_changes_no_old_checkpoint(name, flavor):
    saved = find_saved_model({"model": {"name": name, "flavor": flavor}}, None)
    *sizes, theta, factor = ONCE[name, flavor]
    assert list(saved.shape.values())[:6] == sizes
    assert saved.shape["rope_theta"] == theta
    assert saved.shape["rope_scaling_factor"] == factor
    assert list(saved.shape.values())[7:9] == [1e-5, False]
    details = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_seq_len")
    assert [saved.shape[key] for key in details] == [1.0, 4.0, 8192]


def test_an_old_checkpoints_own_values_stand_over_its_flavors():
    section = {"name": "llama3", "flavor": "8B", "n_layers": 4, "dim": None, "norm_eps": 1e-6}
    saved = find_saved_model({"model": {**section, "rope_scaling_factor": 8.0}}, None)
    assert (saved.shape["n_layers"], saved.shape["dim"]) == (4, 4096)
    assert (saved.shape["norm_eps"], saved.shape["rope_scaling_factor"]) == (1e-6, 8.0)


def test_the_shape_in_a_checkpoint_stands_over_its_flavor():
    section = {"name": "llama3", "flavor": "of a user's own, long gone"}
    assert find_saved_model({"model": section}, asdict(SHAPE)) == identity(family="llama3")


def test_a_config_without_a_model_is_refused():
    with pytest.raises(UserError, match="does not say which model"):
        find_saved_model({"training": {}}, asdict(SHAPE))


# Free keys


def changes(saved_overrides, overrides):
    def dump(given):
        sections = JobConfig().model_dump(mode="json")
        for name, value in given.items():
            section, _, key = name.rpartition(".")
            sections[section][key] = value
        return sections

    return describe_changes(dump(saved_overrides), dump(overrides), dump({}))


def test_what_was_changed_freely_is_one_line_with_old_and_new_values():
    line, more_than_rounding = changes(
        {"validation.dataset": "c4"},
        {
            "optimizer.weight_decay": 0.2,
            "training.max_norm": 0.5,
            "training.document_masking": True,
            "parallelism.tensor_parallel_degree": 2,
            "optimizer.lr": 1.0,
            "metrics.log_freq": 7,
            "model.dim": 8,
        },
    )
    assert line == (
        "optimizer.weight_decay was 0.1, is 0.2; training.max_norm was 1.0, is 0.5; "
        "training.document_masking was false, is true; "
        'validation.dataset was "c4", is unset; '
        "in rounding alone: parallelism.tensor_parallel_degree was 1, is 2"
    )
    assert more_than_rounding


def test_another_layout_changes_the_rounding_alone():
    line, more_than_rounding = changes({}, {"parallelism.context_parallel_degree": 2})
    assert line == "in rounding alone: parallelism.context_parallel_degree was 1, is 2"
    assert not more_than_rounding
    assert changes({}, {"job.description": "x"}) == ("", False)


def test_a_key_that_the_checkpoint_does_not_know_had_its_default():
    current = JobConfig().model_dump(mode="json")
    saved = {name: dict(section) for name, section in current.items() if name != "validation"}
    del saved["training"]["max_norm"]
    saved["training"]["removed_since"] = 3
    assert describe_changes(saved, current, current) == ("", False)
