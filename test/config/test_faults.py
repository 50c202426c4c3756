"""What is refused of one section, key or value, and the bounds of every number."""

import pytest
from helpers.configs import assert_one_fault, parse, report

from torchtrain.config.faults import value_fault
from torchtrain.config.options import options

BAD_NAMES = {
    "misspelt section": (
        "[trainig]\nsteps = 5",
        ["[trainig]", "did you mean [training]?", "checkpoint, "],
    ),
    "unknown section": ("[zzz]\n", ["[zzz]", "unknown section", "the sections are job, profiling"]),
    "misspelt key": (
        "[training]\nstpes = 5",
        ["training.stpes = 5", "did you mean training.steps?"],
    ),
    "key of another section": (
        "[training]\nlr = 1e-3",
        ["training.lr = 0.001", "did you mean optimizer.lr?"],
    ),
    "misspelt key of another section": (
        "[training]\nmin_lr_facto = 1.0",
        ["did you mean lr_scheduler.min_lr_factor?"],
    ),
    "key of several sections": (
        "[data]\nenable = true",
        ["did you mean checkpoint.enable or compile.enable or"],
    ),
    "key like no other": (
        "[data]\nqqqqqq = 1",
        ["data.qqqqqq = 1", "the keys of [data] are cache_folder, text_key"],
    ),
    "key without section": (
        "steps = 5",
        ["steps = 5", "must be in a section", "mean training.steps or validation.steps?"],
    ),
    "value for a section": ("training = 5", ["training = 5", "write [training] and its keys"]),
    "array of sections": ("[[training]]\nsteps = 5", ["write [training] and its keys"]),
    "table for a key": ("[training.steps]\na = 1", ["training.steps = ", "a whole number >= 1"]),
    "config file in a file": (
        '[job]\nconfig_file = "a"',
        ["job.config_file", "command line only"],
    ),
    "misspelt key of a section in a section": (
        "[quantize.linear.float8]\nemulat = true",
        ["quantize.linear.float8.emulat = true", "did you mean quantize.linear.float8.emulate?"],
    ),
    "section in a section that nobody knows": (
        "[quantize.linear]\nfloat4 = {}",
        ["the sections are job"],
    ),
    "another trainer's name": (
        "[optimizer]\nlearning_rate = 1e-3",
        ["optimizer.learning_rate = 0.001: unknown; did you mean optimizer.lr?"],
    ),
    "another trainer's name in another section": (
        "[training]\nbatch_size = 4",
        ["did you mean training.local_batch_size?"],
    ),
}

BAD_VALUES = {
    "string for int": (
        '[training]\nsteps = "5"',
        ['training.steps = "5"', "a whole number >= 1 and <= 1,000,000,000"],
    ),
    "float for int": ("[training]\nsteps = 5.0", ["training.steps = 5.0", "a whole number"]),
    "bool for int": ("[training]\nsteps = true", ["training.steps = true", "a whole number"]),
    "int for bool": ("[compile]\nenable = 1", ["compile.enable = 1", "true or false"]),
    "string for bool": ('[compile]\nenable = "true"', ['compile.enable = "true"', "true or false"]),
    "group without pattern": (
        "[optimizer]\ngroups = [{ lr = 1 }]",
        ["optimizer.groups = [{ lr = 1 }]", "a list of tables with pattern (UTF-8 text"],
    ),
    "group with an unknown key": (
        '[[optimizer.groups]]\npattern = "norm.*"\nbeta1 = 0.5',
        ["optimizer.groups = [", "lr (a finite number > 0), weight_decay (a finite number >= 0)"],
    ),
    "bool for float": ("[optimizer]\nlr = true", ["optimizer.lr = true", "a finite number > 0"]),
    "string for float": (
        '[optimizer]\nlr = "1e-3"',
        ['optimizer.lr = "1e-3"', 'a finite number > 0, or "auto"'],
    ),
    "tokens per parameter": (
        '[training]\ntokens = "20 x"',
        ['training.tokens = "20 x": must be a finite number >= 1', 'or text such as "20x"'],
    ),
    "int for string": ("[training]\ndataset = 5", ["training.dataset = 5", "text"]),
    "date for string": (
        "[job]\ndescription = 1979-05-27",
        ["job.description = 1979-05-27", "text"],
    ),
    "string for list": (
        '[compile]\ncomponents = "model"',
        ['compile.components = "model"', "a list with", "loss"],
    ),
    "converter that is not there": (
        '[model]\nconverters = ["quantize.linear.mx"]',
        ["a list with any of quantize.linear.float8"],
    ),
    "bad list item": (
        '[compile]\ncomponents = ["model", "los"]',
        ['["model", "los"]', "model, loss"],
    ),
    "empty list": (
        "[compile]\ncomponents = []",
        ["compile.components = []", "at least one of model, loss"],
    ),
    "name that is not in the list": (
        '[checkpoint]\nexclude_from_loading = ["optimiser"]',
        [
            'checkpoint.exclude_from_loading = ["optimiser"]',
            "a list with any of optimizer, dataloader, train_state, lr_scheduler",
        ],
    ),
    "absurd int": (f"[training]\nsteps = {10**30}", ["<= 1,000,000,000"]),
    "int of thousands of digits": (
        f"[training]\nsteps = 0x{'f' * 5000}",
        ["thousands of digits", ">= 1"],
    ),
    "nan": ("[optimizer]\nlr = nan", ["optimizer.lr = nan", "a finite number > 0"]),
    "infinity": ("[training]\nmax_norm = inf", ["training.max_norm = inf", "a finite number > 0"]),
    "empty folder": ('[job]\ndump_folder = ""', ["job.dump_folder", "not empty"]),
    "NUL in a path": ('[training]\ndataset_path = "a\\u0000b"', ["training.dataset_path", "text"]),
    "mixture of one text": (
        '[data]\nmixture = "text . = 1"',
        ["data.mixture = ", "a list of texts, none empty"],
    ),
    "empty mixture": ("[data]\nmixture = []", ["data.mixture = []", "a list of texts"]),
}


@pytest.mark.parametrize("name", [*BAD_NAMES, *BAD_VALUES])
def test_a_bad_key_or_value_gets_one_clear_fault(name):
    text, fragments = {**BAD_NAMES, **BAD_VALUES}[name]
    assert_one_fault(report(text), "run.toml", fragments)


LARGEST_COUNT = 10**9
TINY = 5e-324  # the smallest float above 0
BELOW_1 = 1 - 2**-53  # the largest float below 1

# The bounds of every number: values that are taken, and values that are refused.
COUNT = ([1, LARGEST_COUNT], [0, -1, LARGEST_COUNT + 1])
AT_LEAST_TWO = ([2, LARGEST_COUNT], [1, 0, LARGEST_COUNT + 1])
COUNT_OR_ZERO = ([0, 1, LARGEST_COUNT], [-1, LARGEST_COUNT + 1])
COUNT_OR_AUTO = ([-1, 1, LARGEST_COUNT], [-2, 0, LARGEST_COUNT + 1])
POSITIVE = ([TINY, 1e300], [0.0, -0.0, -TINY, "inf", "nan"])
NOT_NEGATIVE = ([0.0, TINY, 1e300], [-TINY, "inf", "nan"])
AT_LEAST_ONE = ([1.0, 1e300], [BELOW_1, 0.0, "inf", "nan"])
FRACTION = ([0.0, 1.0], [-TINY, 1 + 2**-52, "nan"])
OPEN_FRACTION = ([TINY, BELOW_1], [0.0, 1.0, "nan"])
BETA = ([0.0, BELOW_1], [-TINY, 1.0, "nan"])
SEED = ([0, 2**63 - 1], [-1, 2**63])

BOUNDS = {
    "profiling.profile_freq": COUNT,
    "profiling.profiler_active": COUNT,
    "profiling.profiler_warmup": COUNT_OR_ZERO,
    "job.max_minutes": POSITIVE,
    "metrics.log_freq": COUNT,
    "metrics.peak_tflops": POSITIVE,
    "model.dim": COUNT,
    "model.n_layers": COUNT,
    "model.n_heads": COUNT,
    "model.n_kv_heads": COUNT,
    "model.ffn_hidden_dim": COUNT,
    "model.vocab_size": COUNT_OR_ZERO,
    "model.rope_theta": POSITIVE,
    "model.norm_eps": POSITIVE,
    "model.rope_scaling_factor": AT_LEAST_ONE,
    "model.rope_low_freq_factor": POSITIVE,
    "model.rope_high_freq_factor": POSITIVE,
    "model.rope_original_seq_len": COUNT,
    "model.head_width": COUNT_OR_ZERO,
    "model.n_experts": COUNT_OR_ZERO,
    "model.experts_per_token": COUNT,
    "model.expert_hidden_dim": COUNT_OR_ZERO,
    "model.n_shared_experts": COUNT_OR_ZERO,
    "model.n_dense_layers": COUNT_OR_ZERO,
    "model.sparse_every": COUNT,
    "model.router_scale": POSITIVE,
    "optimizer.lr": POSITIVE,
    "optimizer.beta1": BETA,
    "optimizer.beta2": BETA,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.muon_momentum": BETA,
    "optimizer.muon_ns_steps": ([1, 99], [0, 100, -1, 2.5]),
    "optimizer.muon_adamw_lr": POSITIVE,
    "lr_scheduler.warmup_steps": COUNT_OR_ZERO,
    "lr_scheduler.warmup_ratio": FRACTION,
    "lr_scheduler.total_steps": COUNT,
    "lr_scheduler.decay_ratio": FRACTION,
    "lr_scheduler.min_lr_factor": FRACTION,
    "router.bias_update_rate": NOT_NEGATIVE,
    "router.balance_loss_weight": NOT_NEGATIVE,
    "router.z_loss_weight": NOT_NEGATIVE,
    "router.log_layers_freq": COUNT_OR_ZERO,
    "training.local_batch_size": COUNT,
    "training.global_batch_size": COUNT_OR_AUTO,
    "training.seq_len": COUNT,
    "training.max_norm": POSITIVE,
    "training.max_skips": COUNT,
    "training.spike_deviations": POSITIVE,
    "training.spike_window": AT_LEAST_TWO,
    "training.steps": COUNT,
    "training.tokens": ([1, 1.5, 10**15], [0, -1, 0.99, 1.01e15, "inf", "nan"]),
    "training.gc_freq": COUNT,
    "data.streams": COUNT,
    "data.stall_timeout_seconds": COUNT,
    "parallelism.data_parallel_replicate_degree": COUNT,
    "parallelism.data_parallel_shard_degree": COUNT_OR_AUTO,
    "parallelism.tensor_parallel_degree": COUNT,
    "parallelism.pipeline_parallel_degree": COUNT,
    "parallelism.pipeline_parallel_microbatch_size": COUNT,
    "parallelism.pipeline_parallel_layers_per_stage": COUNT,
    "parallelism.pipeline_parallel_first_stage_less_layers": COUNT_OR_ZERO,
    "parallelism.pipeline_parallel_last_stage_less_layers": COUNT_OR_ZERO,
    "parallelism.expert_parallel_degree": COUNT,
    "parallelism.context_parallel_degree": COUNT,
    "checkpoint.interval": COUNT,
    "checkpoint.keep_latest_k": COUNT_OR_ZERO,
    "checkpoint.load_step": COUNT_OR_AUTO,
    "checkpoint.keep_every": COUNT_OR_ZERO,
    "checkpoint.interval_minutes": POSITIVE,
    "activation_checkpoint.memory_budget": FRACTION,
    "comm.init_timeout_seconds": COUNT,
    "comm.train_timeout_seconds": COUNT,
    "validation.held_out_share": OPEN_FRACTION,
    "validation.local_batch_size": COUNT,
    "validation.seq_len": COUNT,
    "validation.freq": COUNT,
    "validation.steps": COUNT_OR_AUTO,
    "text_samples.freq": COUNT,
    "text_samples.max_new_tokens": COUNT,
    "text_samples.temperature": NOT_NEGATIVE,
    "debug.seed": SEED,
    "debug.replica_check_freq": COUNT_OR_ZERO,
}


def test_every_number_has_its_bounds_here():
    numbers = [name for name, option in options().items() if option.kind in ("integer", "number")]
    assert sorted(BOUNDS) == sorted(numbers)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_is_taken_at_its_bounds_and_refused_beyond(name):
    taken, refused = BOUNDS[name]
    section, _, key = name.rpartition(".")
    for value in taken:
        assert value_fault(name, value) is None, value
    for value in refused:
        said = report(f"[{section}]\n{key} = {value!r}".replace("'", ""))
        assert f"run.toml: {name} = " in said
        assert ": must be " in said


def test_what_is_recomputed_is_a_number_of_blocks_or_operations():
    for value in ("op", "op_all", "1", "2", "10"):
        assert value_fault("activation_checkpoint.selective_ac_option", value) is None
    for value in ("0", "-1", "01", "all", "", "2 ", "op\n", "op_al"):
        fault = value_fault("activation_checkpoint.selective_ac_option", value)
        assert fault is not None, value


def test_a_suggestion_is_taken_for_what_was_meant():
    """What depends on the option that was probably meant is not judged by its default."""
    said = report("[training]\nglobal_batch_sise = 9", world_size=2)
    assert_one_fault(said, "run.toml", ["did you mean training.global_batch_size?"])
    assert parse("[training]\nglobal_batch_size = 10", world_size=2)
