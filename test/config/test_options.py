"""Every option changes something, most shown here by whole runs of one rank in this process."""

import gc
import gzip
import json
import math
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.fsdp import parameter_groups
from helpers.launching import ROOT, metrics, options
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.utils._python_dispatch import TorchDispatchMode

import train
from torchtrain import ranks, watchdog
from torchtrain.catalog.models import ModelShape
from torchtrain.checkpoint import Checkpointer
from torchtrain.config.options import options as all_options
from torchtrain.config.schema import Parallelism
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.logging_utils import init_logging
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms import apply
from torchtrain.set_up import set_up
from torchtrain.tools.layouts import DOCUMENTS

MODEL_KEYS = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "ffn_hidden_dim",
    "vocab_size",
    "rope_theta",
    "norm_eps",
    "tied_embeddings",
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_seq_len",
    "head_width",
    "qk_norm",
    "n_experts",
    "experts_per_token",
    "expert_hidden_dim",
    "n_shared_experts",
    "n_dense_layers",
    "sparse_every",
    "router_scores",
    "router_renormalize",
    "router_scale",
    "router_bias",
)
OPTIMIZER_KEYS = (
    "name",
    "lr",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "groups",
)
MUON_KEYS = (
    "muon_momentum",
    "muon_nesterov",
    "muon_ns_steps",
    "muon_ns_dtype",
    "muon_adamw_lr",
)
SHARING_KEYS = (
    "tensor_parallel_degree",
    "disable_sequence_parallel",
    "disable_loss_parallel",
    "context_parallel_degree",
    "context_parallel_method",
    "context_parallel_rotate_method",
    "context_parallel_load_balancer",
)
CUTTING_KEYS = (
    "pipeline_parallel_layers_per_stage",
    "pipeline_parallel_first_stage_less_layers",
    "pipeline_parallel_last_stage_less_layers",
    "module_fqns_per_model_part",
)
SCHEDULE_KEYS = (
    "warmup_steps",
    "warmup_ratio",
    "total_steps",
    "decay_ratio",
    "decay_type",
    "min_lr_factor",
)

# The test that shows each option. A new option without a line here fails, and so does a line that
# names no test.
SHOWN_BY = {
    "job.config_file": "test_committed_files_fit_the_usual_world_sizes",
    "job.dump_folder": "test_a_run_writes_its_folder",
    "job.description": "test_description_and_config_are_printed",
    "job.max_minutes": "test_the_deadline_is_the_earlier_of_both",
    "job.print_config": "test_description_and_config_are_printed",
    "profiling.enable_profiling": "test_profiler_traces",
    "profiling.save_traces_folder": "test_profiler_traces",
    "profiling.profile_freq": "test_profiler_traces",
    "profiling.profiler_active": "test_profiler_traces",
    "profiling.profiler_warmup": "test_profiler_traces",
    "profiling.enable_memory_snapshot": "test_memory_snapshots_need_cuda",
    "profiling.save_memory_snapshot_folder": "test_memory_snapshots_go_to_their_folder",
    "metrics.log_freq": "test_between_full_lines_nothing_is_printed",
    "metrics.enable_tensorboard": "test_tensorboard_is_one_curve_after_a_resume",
    "metrics.disable_color_printing": "test_colors_on_a_terminal_unless_turned_off",
    "metrics.save_tb_folder": "test_tensorboard_is_one_curve_after_a_resume",
    "metrics.peak_tflops": "test_a_given_peak_counts_before_the_devices",
    "metrics.enable_wandb": "test_wandb_gets_the_same_numbers_and_continues_the_same_run",
    "model.name": "test_model_options_change_the_parameters_or_the_loss",
    "model.flavor": "test_model_options_change_the_parameters_or_the_loss",
    "model.tokenizer_path": "test_tokenizer_paths_mean_the_same",
    "model.hf_assets_path": "test_tokenizer_paths_mean_the_same",
    **dict.fromkeys(
        (f"model.{key}" for key in MODEL_KEYS),
        "test_model_options_change_the_parameters_or_the_loss",
    ),
    **dict.fromkeys(
        (f"optimizer.{key}" for key in OPTIMIZER_KEYS),
        "test_optimizer_options_change_the_weights",
    ),
    **dict.fromkeys(
        (f"optimizer.{key}" for key in MUON_KEYS),
        "test_options_of_muon_change_the_weights",
    ),
    "optimizer.implementation": "test_optimizer_implementations_agree",
    "optimizer.state_dtype": "test_a_resumed_run_keeps_bf16_states_to_the_bit",
    **dict.fromkeys(
        (f"lr_scheduler.{key}" for key in SCHEDULE_KEYS),
        "test_schedule_options_change_the_rate",
    ),
    "lr_scheduler.log_schedule": "test_schedule_line_can_be_turned_off",
    "lr_scheduler.log_lr": "test_log_lr_prints_step_and_rate_between_full_lines",
    "model.converters": "test_a_checkpoint_goes_between_runs_with_and_without",
    **dict.fromkeys(
        (f"quantize.linear.float8.{key}" for key in ("recipe_name", "filter_fqns", "emulate")),
        "test_names_and_initial_weights_stay_and_every_option_changes_the_gradient",
    ),
    "quantize.linear.float8.enable_fsdp_float8_all_gather": (
        "test_numbers_stay_and_a_gather_moves_a_byte_a_number"
    ),
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": (
        "test_numbers_stay_and_a_gather_moves_a_byte_a_number"
    ),
    "router.bias_update_rate": "test_metrics_and_biases_are_those_by_hand",
    "router.balance_loss_weight": "test_metrics_and_biases_are_those_by_hand",
    "router.z_loss_weight": "test_metrics_and_biases_are_those_by_hand",
    "router.log_layers_freq": "test_metrics_and_biases_are_those_by_hand",
    "training.dataset": "test_data_options_change_the_samples",
    "training.dataset_path": "test_data_options_change_the_samples",
    "training.local_batch_size": "test_the_curve_is_the_same",
    "training.global_batch_size": "test_data_options_change_the_samples",
    "training.seq_len": "test_data_options_change_the_samples",
    "training.max_norm": "test_clipping_changes_the_weights",
    "training.on_nonfinite": "test_a_skipped_step_changes_nothing_and_counts",
    "training.max_skips": "test_as_many_steps_in_a_row_are_skipped_as_may_be",
    "training.spike_deviations": "test_spikes_are_skipped_alone_or_with_what_is_not_finite",
    "training.spike_window": "test_a_spike_is_seen_once_half_of_the_window_is_there",
    "training.steps": "test_a_run_writes_its_folder",
    "training.tokens": "test_tokens_and_the_automatic_rate_of_a_run_and_of_a_longer_one",
    "training.dtype": "test_precisions",
    "training.mixed_precision_param": "test_precisions",
    "training.mixed_precision_reduce": "test_precisions",
    "training.gc_freq": "test_garbage_is_collected_when_asked",
    "training.gc_debug": "test_garbage_is_collected_when_asked",
    "data.cache_folder": "test_data_options_change_the_samples",
    "data.text_key": "test_data_options_change_the_samples",
    "data.mixture": "test_built_mixture_reads_each_source_by_its_weight",
    "data.token_dtype": "test_the_type_of_plain_ids_is_an_option",
    "data.streaming": "test_files_of_a_hub_are_dealt_out_if_they_come_out_even",
    "data.streams": "test_files_of_a_hub_are_dealt_out_if_they_come_out_even",
    "data.stall_timeout_seconds": (
        "test_what_is_wrong_with_one_rank_s_source_ends_all_ranks_with_that_error"
    ),
    "data.on_bad_row": "test_skipped_rows_are_stated_and_in_the_manifest",
    "experimental.custom_import": "test_a_dataset_of_the_users_own",
    "parallelism.data_parallel_replicate_degree": "test_the_curve_is_the_same",
    "parallelism.data_parallel_shard_degree": "test_data_parallel_degree",
    "parallelism.fsdp_reshard_after_forward": "test_resharding_policy_reaches_every_group",
    "checkpoint.enable": "test_checkpoint_options",
    "checkpoint.folder": "test_checkpoint_options",
    "checkpoint.interval": "test_checkpoint_options",
    "checkpoint.keep_latest_k": "test_checkpoint_options",
    "checkpoint.enable_first_step_checkpoint": "test_checkpoint_options",
    "checkpoint.load_only": "test_load_only_saves_nothing",
    "checkpoint.accept_changed_data": "test_changed_data_can_be_accepted",
    "checkpoint.accept_changed_model": "test_another_model_is_accepted_and_becomes_the_runs_own",
    "checkpoint.initial_load_path": "test_initial_load_of_all_or_of_the_weights",
    "checkpoint.exclude_from_loading": "test_a_part_of_a_checkpoint_is_left_out_of_an_initial_load",
    "checkpoint.initial_load_model_only": "test_initial_load_of_all_or_of_the_weights",
    "checkpoint.initial_load_in_hf": (
        "test_what_transformers_saved_trains_on_with_the_loss_it_computes"
    ),
    "checkpoint.load_step": "test_missing_step_is_an_error_that_names_those_there",
    "activation_checkpoint.mode": "test_recomputation_modes_recompute_what_they_say",
    "activation_checkpoint.selective_ac_option": "test_recomputation_modes_recompute_what_they_say",
    "activation_checkpoint.memory_budget": "test_memory_budget_reaches_the_compiler",
    "training.document_masking": "test_document_options_change_the_loss",
    "data.packing": "test_document_options_change_the_loss",
    "training.enable_cpu_offload": "test_cpu_offload_reaches_every_group",
    **dict.fromkeys(
        (f"parallelism.{key}" for key in SHARING_KEYS),
        "test_sharing_options_reach_the_model",
    ),
    "parallelism.pipeline_parallel_degree": (
        "test_a_run_goes_on_from_a_pipeline_to_tensor_ranks_to_one_process"
    ),
    "parallelism.pipeline_parallel_schedule": "test_pipeline_options_reach_the_schedule",
    "parallelism.pipeline_parallel_microbatch_size": "test_pipeline_options_reach_the_schedule",
    **dict.fromkeys((f"parallelism.{key}" for key in CUTTING_KEYS), "test_cutting_options_cut"),
    "parallelism.expert_parallel_degree": (
        "test_the_ranks_that_share_experts_are_some_of_those_that_share_data"
    ),
    "parallelism.pipeline_parallel_expert_parallel_overlap": (
        "test_the_plan_overlaps_where_dualpipev_meets_shared_experts"
    ),
    "parallelism.enable_async_tensor_parallel": "test_async_tensor_parallel_needs_cuda",
    "compile.enable": "test_compile_options",
    "compile.components": "test_compile_options",
    "compile.backend": "test_compile_options",
    "comm.init_timeout_seconds": "test_timeouts_reach_the_process_group",
    "comm.train_timeout_seconds": "test_a_stopped_rank_ends_the_run_within_the_training_timeout",
    "validation.enable": "test_validates_after_every_freq_steps_and_the_last",
    "validation.dataset": "test_numbers_equal_those_by_hand",
    "validation.dataset_path": "test_numbers_equal_those_by_hand",
    "validation.held_out_share": (
        "test_held_out_documents_are_part_of_the_fingerprint_and_of_the_cache"
    ),
    "validation.local_batch_size": "test_numbers_equal_those_by_hand",
    "validation.seq_len": "test_numbers_equal_those_by_hand",
    "validation.freq": "test_validates_after_every_freq_steps_and_the_last",
    "validation.steps": "test_steps_are_batches_of_the_global_batch_size",
    "checkpoint.keep_every": "test_every_nth_is_kept_for_ever",
    "checkpoint.interval_minutes": "test_a_save_is_due_when_a_ranks_time_is_up",
    "checkpoint.async_mode": "test_what_changes_after_the_copy_is_not_saved",
    "checkpoint.on_save_error": "test_training_goes_on_after_a_failed_save_if_it_may",
    "checkpoint.last_save_model_only": "test_the_last_checkpoint_is_of_the_weights_alone",
    "checkpoint.last_save_in_hf": "test_the_last_checkpoint_is_in_hugging_faces_form_too",
    "checkpoint.export_dtype": "test_the_last_checkpoint_is_of_the_weights_alone",
    "text_samples.prompts": "test_greedy_texts_are_those_by_hand",
    "text_samples.freq": "test_writes_after_every_freq_steps_and_the_last",
    "text_samples.max_new_tokens": "test_greedy_texts_are_those_by_hand",
    "text_samples.temperature": "test_greedy_texts_are_those_by_hand",
    "debug.seed": "test_debug_options",
    "debug.deterministic": "test_debug_options",
    "debug.deterministic_warn_only": "test_debug_options",
    "debug.detect_anomaly": "test_debug_options",
    "debug.replica_check_freq": "test_a_flipped_bit_ends_the_run_and_is_named",
    "debug.moe_force_load_balance": "test_forced_balance_is_even",
}


def test_every_option_has_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "test").rglob("test_*.py"))
    assert set(SHOWN_BY) == set(all_options())
    assert not [name for name in SHOWN_BY.values() if f"def {name}(" not in tests]


@pytest.fixture(scope="module")
def device():
    device = ranks.join_process_group(60)
    yield device
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def process_state():
    """What a run changes in its process, put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    gc.enable()


def config_of(data, **overrides):
    return JobConfig().parse_args(options({**data, **overrides}), world_size=1)


@pytest.fixture
def run(tmp_path, data, device, capsys):
    """run(name, **overrides): a whole run; returns its metrics and what it printed."""

    def run_once(name="run", **overrides):
        init_logging()
        train.run(
            config_of(
                data, **{"job.dump_folder": tmp_path / name, "training.steps": 2, **overrides}
            ),
            device,
        )
        return metrics(tmp_path / name), capsys.readouterr().out

    return run_once


def setting_up(data, device, **overrides):
    return set_up(config_of(data, **overrides), device)


def weights_after(trainer, steps=3):
    for step in range(1, steps + 1):
        train.forward_backward(trainer, trainer.loader.step_batches(step))
        train.clip_grad_norm_(trainer.weights.values(), trainer.config.training.max_norm)
        train.optimizer_step(trainer)
    return torch.cat([p.detach().full_tensor().flatten() for p in trainer.weights.values()])


def first_loss(trainer):
    return train.forward_backward(trainer, trainer.loader.step_batches(1)).own.item()


def test_a_run_writes_its_folder(run, tmp_path):
    lines, printed = run()
    assert [line["step"] for line in lines] == [1, 2]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock",
        "config.toml",
        "metrics.jsonl",
        "run.json",
    }
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["degrees"] == {
        "pp": 1,
        "dp_replicate": 1,
        "dp_shard": 1,
        "cp": 1,
        "tp": 1,
        "ep": 1,
    }
    assert facts["batch"]["accumulation_steps"] == 1
    assert facts["parameters"] > 0
    for text in (
        "parameters",
        "one process",
        "microbatch 8, accumulation 1",
        "warm-up",
        "documents",
        str(tmp_path),
    ):
        assert text in printed


def test_description_and_config_are_printed(run):
    _, printed = run("quiet", **{"job.description": "my first model"})
    assert "my first model" in printed
    assert "[training]" not in printed
    _, printed = run("loud", **{"job.print_config": True})
    assert "[training]" in printed


def test_an_option_without_effect_is_a_line_at_the_start(run):
    _, printed = run("noted", **{"checkpoint.load_step": 3})
    assert "checkpoint.load_step = 3 has no effect while checkpoint.enable = false" in printed
    assert "has no effect" not in run("plain")[1]


@pytest.mark.slow
def test_profiler_traces(run, tmp_path):
    run(
        **{
            "training.steps": 8,
            "profiling.enable_profiling": True,
            "profiling.profile_freq": 4,
            "profiling.profiler_warmup": 1,
            "profiling.profiler_active": 2,
            "profiling.save_traces_folder": "traces",
        }
    )
    folders = sorted(path.name for path in (tmp_path / "run" / "traces").iterdir())
    assert folders == ["step-4", "step-8"]
    with gzip.open(tmp_path / "run" / "traces" / "step-4" / "rank0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep")}
    assert len(steps) == 2, "two active steps"


def test_memory_snapshots_need_cuda(run):
    with pytest.raises(UserError, match="CUDA"):
        run(**{"profiling.enable_memory_snapshot": True})


def test_memory_snapshots_go_to_their_folder(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **_: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", written.append)
    section = JobConfig().profiling.model_copy(
        update={
            "enable_memory_snapshot": True,
            "save_memory_snapshot_folder": "snapshots",
            "profile_freq": 2,
        }
    )
    profiler = train.Profiler(section, tmp_path, torch.device("cuda"), 3)
    for step in (1, 2, 3, 4):
        profiler.step(step)
    assert [Path(path).relative_to(tmp_path).as_posix() for path in written] == [
        "snapshots/step-2/rank3.pickle",
        "snapshots/step-4/rank3.pickle",
    ]


MODEL_OPTIONS = {
    "model.flavor": "271M",
    "model.dim": 48,
    "model.n_layers": 3,
    "model.n_heads": 2,
    "model.n_kv_heads": 4,
    "model.ffn_hidden_dim": 96,
    "model.vocab_size": 3000,
    "model.rope_theta": 100.0,
    "model.norm_eps": 1e-2,
    "model.tied_embeddings": True,
    "model.rope_scaling_factor": 8.0,
    "model.head_width": 16,
    "model.qk_norm": True,
    "model.n_experts": 4,
}
SPARSE = {"model.n_experts": 4, "model.router_scores": "sigmoid"}
EXPERT_OPTIONS = {
    "model.experts_per_token": 3,
    "model.expert_hidden_dim": 48,
    "model.n_shared_experts": 1,
    "model.n_dense_layers": 1,
    "model.sparse_every": 2,
    "model.router_scores": "softmax",
    "model.router_renormalize": False,
    "model.router_scale": 2.5,
    "model.router_bias": True,
}
SCALED = {"model.rope_scaling_factor": 8.0, "model.rope_original_seq_len": 64}
SCALING_OPTIONS = {
    "model.rope_low_freq_factor": 3.0,
    "model.rope_high_freq_factor": 30.0,
    "model.rope_original_seq_len": 16,
}


@pytest.mark.slow
def test_model_options_change_the_parameters_or_the_loss(data, device):
    def of(**overrides):
        trainer = setting_up(data, device, **overrides)
        loss = first_loss(trainer)  # and a gradient, since at first attention hardly moves the loss
        gradient = trainer.parts[0].layers["0"].attention.wq.weight.grad.full_tensor()
        size = sum(tensor.numel() for tensor in trainer.parts[0].state_dict().values())
        return size, loss, gradient.norm().item()

    plain = of()
    for key, value in MODEL_OPTIONS.items():
        # A flavor shows only where nothing is put over it.
        cleared = {"model.ffn_hidden_dim": None} if key == "model.flavor" else {}
        scale = {"model.rope_original_seq_len": 64} if key == "model.rope_scaling_factor" else {}
        assert of(**{key: value}, **cleared, **scale) != plain, key
    assert of(**{"model.name": "llama3"}) != plain
    scaled = of(**SCALED)
    for key, value in SCALING_OPTIONS.items():
        assert of(**{**SCALED, key: value}) != scaled, key
    sparse = of(**SPARSE)
    for key, value in EXPERT_OPTIONS.items():
        assert of(**{**SPARSE, key: value}) != sparse, key


def test_vocabulary_smaller_than_the_tokenizers_is_refused(data, device):
    with pytest.raises(UserError, match=r"model\.vocab_size = 100 is smaller"):
        setting_up(data, device, **{"model.vocab_size": 100})


def test_tokenizer_paths_mean_the_same(data, device, tmp_path):
    copy = tmp_path / "tokenizer.model"
    copy.write_bytes((ROOT / "torchtrain" / "datasets" / "debug_tokenizer.model").read_bytes())
    plain = first_loss(setting_up(data, device))
    assert first_loss(setting_up(data, device, **{"model.tokenizer_path": copy})) == plain
    assert first_loss(setting_up(data, device, **{"model.hf_assets_path": tmp_path})) == plain
    with pytest.raises(UserError, match="nowhere"):
        setting_up(data, device, **{"model.hf_assets_path": tmp_path / "nowhere"})


OPTIMIZER_OPTIONS = {
    "optimizer.name": "Adam",
    "optimizer.lr": 1e-3,
    "optimizer.beta1": 0.5,
    "optimizer.beta2": 0.5,
    "optimizer.eps": 1e-2,
    "optimizer.weight_decay": 0.5,
    "optimizer.groups": '{ pattern = "norm.weight", lr = 1e-2 }',
}


@pytest.mark.parametrize("key", OPTIMIZER_OPTIONS)
def test_optimizer_options_change_the_weights(data, device, key):
    plain = weights_after(setting_up(data, device))
    changed = weights_after(setting_up(data, device, **{key: OPTIMIZER_OPTIONS[key]}))
    assert not torch.equal(plain, changed)


MUON_OPTIONS = {
    "optimizer.muon_momentum": 0.5,
    "optimizer.muon_nesterov": False,
    "optimizer.muon_ns_steps": 4,
    "optimizer.muon_ns_dtype": "float32",
    "optimizer.muon_adamw_lr": 1e-3,
}


@pytest.fixture(scope="module")
def after_muon(data, device):
    return weights_after(setting_up(data, device, **{"optimizer.name": "Muon"}))


@pytest.mark.parametrize("key", MUON_OPTIONS)
def test_options_of_muon_change_the_weights(data, device, after_muon, key):
    overrides = {"optimizer.name": "Muon", key: MUON_OPTIONS[key]}
    assert not torch.equal(weights_after(setting_up(data, device, **overrides)), after_muon)


def test_optimizer_implementations_agree(data, device):
    weights = {}
    for name in ("fused", "foreach", "for-loop"):
        trainer = setting_up(data, device, **{"optimizer.implementation": name})
        group = trainer.optimizer.param_groups[0]
        assert (bool(group["fused"]), bool(group["foreach"])) == (
            name == "fused",
            name == "foreach",
        )
        weights[name] = weights_after(trainer)
    assert (weights["foreach"] - weights["fused"]).norm() <= 1e-5 * weights["fused"].norm()
    assert (weights["for-loop"] - weights["fused"]).norm() <= 1e-5 * weights["fused"].norm()


def test_a_resumed_run_keeps_bf16_states_to_the_bit(run, tmp_path):
    given = {"optimizer.name": "Muon", "checkpoint.enable": True, "training.steps": 3}
    given["lr_scheduler.total_steps"] = 3
    plain, _ = run("plain", **given)
    given["optimizer.state_dtype"] = "bfloat16"
    whole, printed = run("whole", **given)
    assert "reductions float32, optimizer states bfloat16" in printed
    run("resumed", **given | {"training.steps": 1})
    resumed, _ = run("resumed", **given)

    def curve(lines):
        return [(line["loss"], line["grad_norm"]) for line in lines]

    assert curve(resumed) == curve(whole) != curve(plain)
    for mine, theirs in zip(curve(whole), curve(plain), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3)

    def count_bytes(folder):
        path = tmp_path / folder / "checkpoint" / "step-3"
        return sum(file.stat().st_size for file in path.glob("*.distcp"))

    # Of 8 bytes for a number of a matrix 6 are left, of 12 for one that AdamW updates 8.
    assert 0.66 < count_bytes("whole") / count_bytes("plain") < 0.76
    for folder, other in (("plain", {}), ("whole", {"optimizer.state_dtype": None})):
        with pytest.raises(
            UserError, match=r"optimizer\.state_dtype was .*, is .* the weights alone"
        ):
            run(folder, **given | {"training.steps": 4} | other)


SCHEDULE_OPTIONS = {
    "lr_scheduler.warmup_steps": 1,
    "lr_scheduler.warmup_ratio": 0.75,
    "lr_scheduler.total_steps": 9,
    "lr_scheduler.decay_ratio": 0.2,
    "lr_scheduler.decay_type": "sqrt",
    "lr_scheduler.min_lr_factor": 0.5,
}


def test_schedule_options_change_the_rate(data, device):
    def rates(**overrides):
        trainer = setting_up(data, device, **{"training.steps": 4, **overrides})
        seen = []
        for _ in range(4):
            seen.append(trainer.optimizer.param_groups[0]["lr"])
            train.optimizer_step(trainer)
        return seen

    plain = rates()
    assert plain == pytest.approx([4e-4, 8e-4, 4.4e-4, 8e-5])
    for key, value in SCHEDULE_OPTIONS.items():
        assert rates(**{key: value}) != plain, key


@pytest.mark.slow
def test_tokens_and_the_automatic_rate_of_a_run_and_of_a_longer_one(run, tmp_path):
    """A step has 256 tokens. A longer schedule has another rate, and the resumed run says so."""
    given = {"optimizer.lr": "auto", "checkpoint.enable": True, "training.steps": None}
    lines, printed = run(**given, **{"training.tokens": 513})
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    inner = facts["parameters"] - 2 * facts["shape"]["vocab_size"] * facts["shape"]["dim"]
    rates = [float(f"{1.79 * inner**-0.713 * (256 * steps) ** 0.307:.3g}") for steps in (3, 5)]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[1]["lr"] == facts["max_lr"] == rates[0]
    assert "3 steps: training.tokens = 513: 513 tokens, 256 per step" in printed
    assert (
        f'"auto" is {rates[0]:g}: Step Law (arXiv:2503.04715) for {inner:,} parameters' in printed
    )
    assert "extrapolated: the law was fitted to 60,000,000 to" in printed
    assert (facts["steps"], facts["steps_source"] in printed) == (3, True)
    config = (tmp_path / "run" / "config.toml").read_text()
    assert 'lr = "auto"\n' in config
    assert "tokens = 513\n" in config
    assert "\nsteps = 10000\n" not in config

    assert "already holds all 3 steps" in run(**given, **{"training.tokens": 513})[1]
    lines, printed = run(**given, **{"training.tokens": "1.1e3"})
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    keeping = f'by "auto"; to keep it, set optimizer.lr = {rates[0]}'
    for change in (
        f"optimizer.lr was {rates[0]}, is {rates[1]} {keeping}",
        "total_steps was 3, is 5",
    ):
        assert f"the learning-rate schedule differs from the checkpoint's: {change}" in printed


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_the_automatic_rate_is_the_main_one_and_leaves_the_others(data, device, name):
    groups = {"optimizer.groups": '{ pattern = "norm.weight", lr = 1e-2 }'}
    trainer = setting_up(data, device, **groups, **{"optimizer.name": name, "optimizer.lr": "auto"})
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert rates[0] == trainer.plan.rate.lr
    assert set(rates) == {rates[0], 1e-2}
    assert trainer.config.optimizer.lr == "auto"


def test_schedule_line_can_be_turned_off(run):
    assert "warm-up" in run("on")[1]
    assert "warm-up" not in run("off", **{"lr_scheduler.log_schedule": False})[1]


def test_data_options_change_the_samples(data, device, tmp_path):
    lines = tmp_path / "corpus.jsonl"
    lines.write_text(
        "".join(
            json.dumps({"text": "one two " * 60, "body": "a b c d " * 60}) + "\n" for _ in range(30)
        )
    )
    cache = tmp_path / "another cache"
    base = {**data, "data.cache_folder": cache}
    jsonl = {"training.dataset": "jsonl", "training.dataset_path": lines}
    variants = [
        {},
        jsonl,
        jsonl | {"data.text_key": "body"},
        {"training.seq_len": 16},
        {"training.global_batch_size": 4},
    ]
    batches = [
        setting_up(base, device, **variant).loader.step_batches(1)[0].tokens for variant in variants
    ]
    assert list(cache.rglob("*")), "the cache is somewhere else"
    assert len({(tuple(batch.shape), tuple(batch.flatten().tolist())) for batch in batches}) == len(
        variants
    )


def test_clipping_changes_the_weights(data, device):
    plain = weights_after(setting_up(data, device))
    assert not torch.equal(
        plain, weights_after(setting_up(data, device, **{"training.max_norm": 1e-8}))
    )


@pytest.mark.slow
def test_precisions(data, device):
    trainer = setting_up(data, device)
    plain = weights_after(trainer)
    assert {p.dtype for p in trainer.weights.values()} == {torch.float32}
    states = [state["exp_avg"].dtype for state in trainer.optimizer.state.values()]
    assert set(states) == {torch.float32}
    for key in ("training.mixed_precision_param", "training.mixed_precision_reduce"):
        assert not torch.equal(
            plain, weights_after(setting_up(data, device, **{key: "bfloat16"}))
        ), key
    trainer = setting_up(data, device, **{"training.dtype": "bfloat16"})
    weights_after(trainer)
    assert {p.dtype for p in trainer.weights.values()} == {torch.bfloat16}
    assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {
        torch.bfloat16
    }


def test_emulated_bf16_is_what_a_bf16_unit_computes():
    """A product of bf16 values summed in fp32 and rounded once, as by matrix units."""
    from torch import nn

    from torchtrain.parallelisms import emulated_bf16

    torch.manual_seed(0)
    layer = nn.Linear(256, 64, bias=False).bfloat16()
    x = torch.randn(32, 256, dtype=torch.bfloat16, requires_grad=True)
    layer.__class__ = emulated_bf16.WidenedLinear
    out = layer(x)
    exact = x.detach().double() @ layer.weight.detach().double().T
    assert out.dtype == torch.bfloat16
    # Rounding once to bf16 is off by at most half a unit in the last place, 2^-8; the fp32 sum adds
    # about 2^-20.
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-7.99 + 1e-6).all()
    out.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.bfloat16


@pytest.mark.slow
def test_garbage_is_collected_when_asked(run, monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda generation=2: collected.append(generation) or 0)
    run("seldom", **{"training.steps": 6, "training.gc_freq": 3})
    assert collected == [2, 1, 1]
    collected.clear()
    _, printed = run("debug", **{"training.steps": 3, "training.gc_debug": True})
    assert collected == [2, 2, 2, 2]
    assert printed.count("garbage collection found") == 3


def test_resharding_policy_reaches_every_group(data, device):
    def policy(value):
        trainer = setting_up(data, device, **{"parallelism.fsdp_reshard_after_forward": value})
        trainer.parts[0](torch.zeros(1, 8, dtype=torch.int64))
        # After a forward without backward: what stays gathered is a plain tensor.
        return [
            type(module.weight).__name__
            for module in (trainer.parts[0].layers["0"].attention.wq, trainer.parts[0].output)
        ]

    assert policy("always") == ["DTensor", "DTensor"]
    assert policy("default") == ["DTensor", "Parameter"]
    assert policy("never") == ["Parameter", "Parameter"]


@pytest.mark.slow
def test_checkpoint_options(run, tmp_path):
    run(
        **{
            "training.steps": 8,
            "checkpoint.enable": True,
            "checkpoint.folder": "saved",
            "checkpoint.interval": 3,
            "checkpoint.keep_latest_k": 3,
            "checkpoint.enable_first_step_checkpoint": True,
        }
    )
    assert {path.name for path in (tmp_path / "run" / "saved").glob("step-*")} == {
        "step-3",
        "step-6",
        "step-8",
    }
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert not list((tmp_path / "run").glob("previous-*")), "a first run has nothing before it"


@pytest.mark.slow
def test_load_only_saves_nothing(run, tmp_path):
    saving = {"checkpoint.enable": True, "lr_scheduler.total_steps": 4}
    run(**saving)
    lines, _ = run(**saving, **{"training.steps": 4, "checkpoint.load_only": True})
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "run" / "checkpoint").glob("step-*")] == ["step-2"]


@pytest.mark.slow
def test_initial_load_of_all_or_of_the_weights(run, tmp_path):
    saving = {"checkpoint.enable": True, "lr_scheduler.total_steps": 4}
    whole, _ = run("whole", **saving, **{"training.steps": 4, "checkpoint.interval": 2})
    source = {
        "checkpoint.initial_load_path": tmp_path / "whole" / "checkpoint" / "step-2",
        "training.steps": 4,
    }
    everything, _ = run("all", **saving, **source, **{"checkpoint.initial_load_model_only": False})
    weights, _ = run("weights", **saving, **source)
    with pytest.raises(UserError, match="nothing to do"):
        run(
            "over",
            **saving,
            **source | {"training.steps": 2},
            **{"checkpoint.initial_load_model_only": False},
        )
    assert [line["loss"] for line in everything] == [line["loss"] for line in whole[2:]]
    assert [line["step"] for line in everything] == [3, 4]
    assert [line["step"] for line in weights] == [1, 2, 3, 4]
    assert weights[0]["loss"] != whole[0]["loss"]


@pytest.mark.slow
def test_a_part_of_a_checkpoint_is_left_out_of_an_initial_load(run, tmp_path, monkeypatch):
    """The run that is made longer has all of it; the others each lack what they leave out."""
    saving = {"checkpoint.enable": True, "lr_scheduler.total_steps": 4}
    whole, _ = run("whole", **saving, **{"training.steps": 4, "checkpoint.interval": 2})
    given = {
        **saving,
        "checkpoint.initial_load_path": tmp_path / "whole" / "checkpoint" / "step-2",
        "checkpoint.initial_load_model_only": False,
        "training.steps": 4,
    }
    read = []
    forward_backward = train.forward_backward

    def noting(trainer, batches):
        read.append(batches[0].sample_ids[0])
        return forward_backward(trainer, batches)

    monkeypatch.setattr(train, "forward_backward", noting)

    def run_without(names, name, **more):
        read.clear()
        lines, printed = run(name, **{**given, **more, "checkpoint.exclude_from_loading": names})
        assert f"not loaded from {given['checkpoint.initial_load_path']}: " in printed
        return [tuple(line[key] for key in ("step", "loss", "grad_norm", "lr")) for line in lines]

    weights = run_without("optimizer,dataloader,train_state", "weights")
    alone, _ = run("alone", **given | {"checkpoint.initial_load_model_only": True})
    assert weights == [
        tuple(line[key] for key in ("step", "loss", "grad_norm", "lr")) for line in alone
    ]

    def forgetting(self, source, weights, optimizer, *words):
        load(self, source, weights, optimizer, *words)
        optimizer.state.clear()

    fresh = run_without("optimizer", "optimizer")
    assert read == [16, 24]
    load = Checkpointer.load
    with monkeypatch.context() as patched:
        patched.setattr(Checkpointer, "load", forgetting)
        forgot, _ = run("forgot", **given)
    assert fresh == [
        tuple(line[key] for key in ("step", "loss", "grad_norm", "lr")) for line in forgot
    ]
    assert fresh[1][1] != whole[3]["loss"], "the optimizer's state was loaded"

    lines = run_without("dataloader", "data")
    assert read == [0, 8]
    assert [line[0] for line in lines] == [3, 4]
    half = {"training.steps": 3}
    run_without("dataloader", "in-two", **half)
    again, _ = run("in-two", **given, **{"checkpoint.exclude_from_loading": "dataloader"})
    assert read == [0, 8]
    assert [line["loss"] for line in again] == [line[1] for line in lines]

    lines = run_without("train_state,lr_scheduler", "step")
    assert read == [16, 24, 32, 40]
    assert [line[0] for line in lines] == [1, 2, 3, 4]
    assert [line[3] for line in lines] == [line["lr"] for line in whole]


class CountProducts(TorchDispatchMode):
    """Counts the matrix products that run, forward and backward."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_recomputation_modes_recompute_what_they_say(data, device):
    def attention_calls_and_products(**overrides):
        trainer = setting_up(data, device, **overrides)
        calls = [0] * len(trainer.parts[0].layers)
        for layer, block in enumerate(trainer.parts[0].layers.values()):
            block.attention.inner_attention.register_forward_hook(
                lambda *_, layer=layer: calls.__setitem__(layer, calls[layer] + 1)
            )
        with CountProducts() as counter:
            loss = first_loss(trainer)
        gradients = torch.cat([p.grad.full_tensor().flatten() for p in trainer.weights.values()])
        return calls, counter.products, loss, gradients

    mode, option = "activation_checkpoint.mode", "activation_checkpoint.selective_ac_option"
    kept = attention_calls_and_products()
    full = attention_calls_and_products(**{mode: "full"})
    second = attention_calls_and_products(**{mode: "selective", option: "2"})
    costly = attention_calls_and_products(**{mode: "selective", option: "op_all"})
    half = attention_calls_and_products(**{mode: "selective", option: "op"})
    assert (kept[0], full[0], second[0], costly[0]) == ([1, 1], [2, 2], [2, 1], [2, 2])
    in_a_block = 7
    assert full[1] > second[1] > kept[1]
    assert full[1] - kept[1] in (
        2 * in_a_block,
        2 * (in_a_block - 1),
    )  # the last product's value is not needed again
    assert costly[1] == kept[1], "a matrix product was computed again"
    assert half[1] == kept[1] + 2 * 3, "of seven products, not three were computed again"
    for other in (full, second, costly, half):
        assert other[2] == kept[2]
        assert torch.equal(other[3], kept[3])


@pytest.mark.slow
def test_memory_budget_reaches_the_compiler(data, device):
    compiled = {"compile.enable": True, "compile.backend": "aot_eager"}
    plain = first_loss(setting_up(data, device))
    budget = {
        "activation_checkpoint.mode": "memory_budget",
        "activation_checkpoint.memory_budget": 0.25,
    }
    torch._dynamo.reset()
    assert math.isclose(
        first_loss(setting_up(data, device, **compiled, **budget)), plain, rel_tol=1e-6
    )
    assert torch._functorch.config.activation_memory_budget == 0.25
    setting_up(data, device)
    assert torch._functorch.config.activation_memory_budget == 1.0


def test_cpu_offload_reaches_every_group(data, device):
    def policies(**overrides):
        model = setting_up(data, device, **overrides).parts[0]
        states = [
            module._get_fsdp_state()
            for module in model.modules()
            if hasattr(module, "_get_fsdp_state")
        ]
        return {type(group.offload_policy) for state in states for group in parameter_groups(state)}

    assert policies() == {OffloadPolicy}
    assert policies(**{"training.enable_cpu_offload": True}) == {CPUOffloadPolicy}
    kept = weights_after(setting_up(data, device))
    assert torch.equal(
        kept, weights_after(setting_up(data, device, **{"training.enable_cpu_offload": True}))
    )


def test_document_options_change_the_loss(data, device):
    def loss(**overrides):
        return first_loss(
            setting_up(
                data, device, **DOCUMENTS | {"training.document_masking": False}, **overrides
            )
        )

    packing = {"data.packing": "best_fit"}
    losses = [
        first_loss(setting_up(data, device, **DOCUMENTS, **packed)) for packed in ({}, packing)
    ]
    losses += [loss(), loss(**packing)]
    assert len(set(losses)) == 4
    assert loss() == losses[2]


@pytest.mark.slow
def test_compile_options(data, device, monkeypatch):
    plain = first_loss(setting_up(data, device))
    compiled = {"compile.enable": True, "compile.backend": "aot_eager"}
    counters = torch._dynamo.utils.counters
    graphs = {}
    for components in ("model", "loss", "model,loss"):
        torch._dynamo.reset()
        counters.clear()
        loss = first_loss(
            setting_up(data, device, **compiled, **{"compile.components": components})
        )
        assert math.isclose(loss, plain, rel_tol=1e-6)
        graphs[components] = counters["stats"]["unique_graphs"]
    assert graphs["model"] == graphs["loss"] == 1, "blocks share one program"
    assert graphs["model,loss"] == 2
    # More blocks than PyTorch's limit of recompilations, with emulated bf16 or without.
    torch._dynamo.reset()
    counters.clear()
    deep = {
        "model.n_layers": 12,
        "training.mixed_precision_param": "bfloat16",
        "compile.components": "model",
    }
    monkeypatch.setattr("torchtrain.parallelisms.apply.needs_emulation", lambda *_: True)
    first_loss(
        setting_up(data, device, **compiled, **deep, **{"activation_checkpoint.mode": "full"})
    )
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no such backend"):
        first_loss(setting_up(data, device, **compiled | {"compile.backend": "no such backend"}))


def test_timeouts_reach_the_process_group(run, monkeypatch):
    given = {}
    monkeypatch.setattr(watchdog, "set_timeout", lambda seconds: given.update(in_training=seconds))
    run(**{"comm.train_timeout_seconds": 23})
    assert given == {"in_training": 23}
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **arguments: given.update(arguments))
    ranks.join_process_group(17)
    assert given["timeout"].total_seconds() == 17


def test_debug_options(data, device):
    plain = first_loss(setting_up(data, device))
    assert not torch.are_deterministic_algorithms_enabled()
    assert first_loss(setting_up(data, device, **{"debug.seed": 1})) != plain
    setting_up(data, device, **{"debug.deterministic": True})
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    setting_up(data, device, **{"debug.deterministic": True, "debug.deterministic_warn_only": True})
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.is_anomaly_enabled()
    setting_up(data, device, **{"debug.detect_anomaly": True})
    assert torch.is_anomaly_enabled()


def test_a_batch_without_a_valid_label_names_its_samples(data, device):
    trainer = setting_up(data, device)
    batches = trainer.loader.step_batches(1)
    batches[0].labels[:] = -100
    loss = train.forward_backward(trainer, batches)
    summary, _ = train.combine_ranks(
        trainer, loss, train.clip_gradients(trainer), train.Stopwatch(), train.StopRequest()
    )
    with pytest.raises(UserError, match="global samples 0 to 7"):
        trainer.guard.judge(summary, loss.own)


def test_a_request_to_stop_is_not_lost_nor_doubled(device):
    stop = train.StopRequest()
    stop.listen()
    for number in (
        signal.SIGTERM,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # a scheduler's, and torchrun's own
        signal.raise_signal(number)
    assert stop.signal_number == signal.SIGHUP
    stop = train.StopRequest()
    stop.listen()
    signal.raise_signal(signal.SIGINT)
    assert stop.signal_number == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_async_tensor_parallel_needs_cuda(device):
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(UserError, match="needs CUDA"):
        apply.apply_tensor_parallel(
            Transformer(ModelShape(32, 2, 4, 4, 64, 50)),
            mesh,
            Parallelism(enable_async_tensor_parallel=True),
        )
