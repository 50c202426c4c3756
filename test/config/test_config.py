"""The config: what is refused and how it is said, what goes before what, and what follows from the values."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from torchtrain.catalog.models import FAMILIES
from torchtrain.config.checks import check
from torchtrain.config.layout import plan_batch, plan_degrees
from torchtrain.config.options import options
from torchtrain.config.plans import find_tokenizer, plan_shape
from torchtrain.config.schema import SECTIONS, Parallelism, Training
from torchtrain.config.toml import to_toml
from torchtrain.config_manager import JobConfig, parse_or_exit
from torchtrain.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[2]
TOMLS = sorted((ROOT / "train_configs").glob("*.toml"))


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)


def write(text: str | bytes) -> str:
    """A config file in the test's own folder."""
    Path("run.toml").write_bytes(text.encode() if isinstance(text, str) else text)
    return "run.toml"


def parse(text: str | bytes = "", *args: str, world_size: int = 1) -> JobConfig:
    return JobConfig().parse_args(["--job.config_file", write(text), *args], world_size)


def report(text: str | bytes = "", *args: str, world_size: int = 1) -> str:
    """The report on a config that must be refused."""
    with pytest.raises(ConfigError) as raised:
        parse(text, *args, world_size=world_size)
    return str(raised.value)


# Each with a single fault: the text of the file, and what the report must hold beside "1 fault" and the file's name.
BAD_TOML = {
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
    "string for int": (
        '[training]\nsteps = "5"',
        ['training.steps = "5"', "a whole number >= 1 and <= 1,000,000,000"],
    ),
    "float for int": ("[training]\nsteps = 5.0", ["training.steps = 5.0", "a whole number"]),
    "bool for int": ("[training]\nsteps = true", ["training.steps = true", "a whole number"]),
    "int for bool": ("[compile]\nenable = 1", ["compile.enable = 1", "true or false"]),
    "string for bool": ('[compile]\nenable = "true"', ['compile.enable = "true"', "true or false"]),
    "bool for float": ("[optimizer]\nlr = true", ["optimizer.lr = true", "a finite number > 0"]),
    "string for float": (
        '[optimizer]\nlr = "1e-3"',
        ['optimizer.lr = "1e-3"', "a finite number > 0"],
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
    "bad list item": (
        '[compile]\ncomponents = ["model", "los"]',
        ['["model", "los"]', "model, loss"],
    ),
    "empty list": (
        "[compile]\ncomponents = []",
        ["compile.components = []", "at least one of model, loss"],
    ),
    "negative steps": ("[training]\nsteps = -1", ["training.steps = -1", ">= 1"]),
    "zero batch": ("[training]\nlocal_batch_size = 0", ["training.local_batch_size = 0", ">= 1"]),
    "zero global batch": (
        "[training]\nglobal_batch_size = 0",
        ["= 0", "-1, or a whole number >= 1"],
    ),
    "global batch below -1": (
        "[training]\nglobal_batch_size = -2",
        ["= -2", "-1, or a whole number >= 1"],
    ),
    "absurd int": (f"[training]\nsteps = {10**30}", ["<= 1,000,000,000"]),
    "int of thousands of digits": (
        f"[training]\nsteps = 0x{'f' * 5000}",
        ["thousands of digits", ">= 1"],
    ),
    "nan": ("[optimizer]\nlr = nan", ["optimizer.lr = nan", "a finite number > 0"]),
    "infinity": ("[training]\nmax_norm = inf", ["training.max_norm = inf", "a finite number > 0"]),
    "zero lr": ("[optimizer]\nlr = 0.0", ["optimizer.lr = 0.0", "> 0"]),
    "beta of one": ("[optimizer]\nbeta2 = 1.0", ["optimizer.beta2 = 1.0", ">= 0 and < 1"]),
    "ratio above one": (
        "[lr_scheduler]\nwarmup_ratio = 1.5",
        ["lr_scheduler.warmup_ratio = 1.5", "<= 1"],
    ),
    "bound of an optional": (
        "[lr_scheduler]\ntotal_steps = 0",
        ["lr_scheduler.total_steps = 0", ">= 1"],
    ),
    "seed too large": (f"[debug]\nseed = {2**63}", ["debug.seed", "9,223,372,036,854,775,807"]),
    "unknown choice": (
        '[optimizer]\nname = "SGD"',
        ["optimizer.name = 'SGD' is unknown", "allowed: AdamW, Adam"],
    ),
    "empty folder": ('[job]\ndump_folder = ""', ["job.dump_folder", "not empty"]),
    "NUL in a path": ('[training]\ndataset_path = "a\\u0000b"', ["training.dataset_path", "text"]),
    "output folder that is the run's": (
        '[checkpoint]\nfolder = "."',
        ["checkpoint.folder", "inside job.dump_folder"],
    ),
    "output folder outside": (
        '[metrics]\nsave_tb_folder = "../tb"',
        ["metrics.save_tb_folder", "inside"],
    ),
    "config file in a file": (
        '[job]\nconfig_file = "a"',
        ["job.config_file", "command line only"],
    ),
    "unsupported section": (
        "[memory_estimation]\nenable = true",
        ["memory_estimation.enable = true", "v0.2.2", "not support yet"],
    ),
    "unsupported value": (
        '[parallelism]\ncontext_parallel_load_balancer = "ptrr"',
        ['context_parallel_load_balancer = "ptrr"', "not support yet", "headtail, none"],
    ),
    "seed checkpoint": (
        "[checkpoint]\ncreate_seed_checkpoint = true",
        ["not support yet", "not needed", "debug.seed"],
    ),
    "unknown family": (
        '[model]\nname = "lama3"',
        ["model.name = 'lama3' is unknown", "allowed: llama2, llama3"],
    ),
    "unknown flavor": (
        '[model]\nflavor = "405b"',
        ["model.flavor = '405b'", "8B, 70B, 405B", "Did you mean '405B'?"],
    ),
    "unknown dataset": (
        '[training]\ndataset = "jsnl"',
        ["'jsnl' is unknown, did you mean jsonl?", "text, jsonl"],
    ),
    "dataset without path": (
        '[training]\ndataset = "text"',
        ["needs training.dataset_path", "a text file"],
    ),
    "dataset with a path it ignores": (
        '[training]\ndataset_path = "run.toml"',
        ["= 'python_stdlib' takes no path", "'run.toml' is given"],
    ),
    "dataset path missing": (
        '[training]\ndataset = "text"\ndataset_path = "no"',
        ["= 'no' does not exist"],
    ),
    "mixture of one text": (
        '[data]\nmixture = "text . = 1"',
        ["data.mixture = ", "a list of texts, none empty"],
    ),
    "empty mixture": ("[data]\nmixture = []", ["data.mixture = []", "a list of texts"]),
    "source without weight": (
        '[data]\nmixture = ["text ."]',
        ['data.mixture: "text ."', '"dataset path = weight"'],
    ),
    "source that is not there": (
        '[data]\nmixture = ["text no = 1"]',
        ["data.mixture: 'text': the path 'no' does not exist"],
    ),
    "stream packed": (
        '[data]\nstreaming = true\npacking = "best_fit"',
        ["data.packing", "before the first step"],
    ),
    "stream held out": (
        "[data]\nstreaming = true\n[validation]\nenable = true",
        ["no documents can be held out", "validation.dataset"],
    ),
    "two tokenizers": (
        '[model]\ntokenizer_path = "a"\nhf_assets_path = "b"',
        ['"a"', '"b"', "give one of them"],
    ),
    "heads that do not divide": (
        "[model]\nn_heads = 12\nn_kv_heads = 12",
        ["n_heads = 12", "dim = 256"],
    ),
    "odd heads": ("[model]\ndim = 48", ["48 / 16 = 3", "must be even"]),
    "kv heads that do not divide": (
        "[model]\nn_kv_heads = 3",
        ["n_kv_heads = 3 must divide model.n_heads = 16"],
    ),
    "kv heads of the flavor": (
        "[model]\nn_heads = 8",
        ["n_kv_heads = 16", "n_heads = 8", "it does not follow n_heads; set it too"],
    ),
    "rope factors": (
        "[model]\nrope_scaling_factor = 8\nrope_high_freq_factor = 1",
        ["rope_high_freq_factor = 1.0", "above"],
    ),
    "load_step zero": (
        "[checkpoint]\nenable = true\nload_step = 0",
        ["load_step = 0", "-1, or a whole number >= 1"],
    ),
    "initial path missing": (
        '[checkpoint]\nenable = true\ninitial_load_path = "no"',
        ['"no" is not a folder'],
    ),
    "profiler window": (
        "[profiling]\nenable_profiling = true\nprofile_freq = 3",
        ["profile_freq = 3", "at least 4"],
    ),
    "not TOML": ("[training]\nsteps = \n", ["line 2, column 9", "2 | steps ="]),
    "not TOML, CRLF": ("[training]\r\n\r\nsteps = x\r\n", ["line 3, column 9", "3 | steps = x"]),
    "not TOML, at the end": (
        '[job]\ndescription = """a\n\n',
        ["not TOML", "line 2", "| description"],
    ),
    "key given twice": (
        "[training]\nsteps = 5\nsteps = 6\n[job]\n",
        ["line 3", "given before", "| steps = 6"],
    ),
    "section given twice": ("[job]\n[training]\n[job]\n", ["line 3", "twice", "| [job]"]),
    "too deep": ("a = " + "[" * 5000, ["not TOML"]),
    "int that Python refuses": ("[training]\nsteps = " + "9" * 5000, ["not TOML", "digits"]),
    "not UTF-8": (b'[job]\ndescription = "\xff"', ["not UTF-8", "0xff in line 2"]),
    "UTF-16": ("[job]".encode("utf-16"), ["not UTF-8", "line 1"]),
}


@pytest.mark.parametrize("name", BAD_TOML)
def test_bad_file_gets_one_clear_fault(name):
    text, fragments = BAD_TOML[name]
    said = report(text)
    assert said.startswith("The configuration has 1 fault:\n  run.toml: "), said
    for fragment in fragments:
        assert fragment in said


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
    "validation path alone": (
        '[validation]\nenable = true\ndataset_path = "."',
        ["dataset_path", "no effect without validation.dataset"],
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
        ["has no effect without checkpoint.initial_load_path"],
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


BAD_COMMAND_LINE = {
    "unknown option": (
        ["--training.stpes", "5"],
        ["--training.stpes", "did you mean --training.steps?"],
    ),
    "abbreviation": (["--training.step=5"], ["--training.step", "did you mean --training.steps?"]),
    "option of another section": (["--training.lr", "1"], ["did you mean --optimizer.lr?"]),
    "misspelt section": (
        ["--trainig.steps", "5"],
        ["did you mean --training.steps or --validation.steps?"],
    ),
    "option without section": (
        ["--steps", "5"],
        ["did you mean --training.steps or --validation.steps?"],
    ),
    "dashes for underscores": (
        ["--training.local-batch-size", "5"],
        ["did you mean --training.local_batch_size?"],
    ),
    "like no option": (["--qqqq"], ["--qqqq", "the sections are", "--help"]),
    "no value, at the end": (
        ["--training.steps"],
        ["--training.steps has no value", "a whole number"],
    ),
    "no value, before another": (
        ["--training.steps", "--compile.enable"],
        ["--training.steps has no value"],
    ),
    "given twice": (
        ["--training.steps", "5", "--training.steps=6"],
        ["--training.steps is given twice"],
    ),
    "flag given twice": (
        ["--compile.enable", "--compile.enable", "false"],
        ["--compile.enable is given twice"],
    ),
    "not an int": (["--training.steps", "many"], ['training.steps = "many"', "a whole number"]),
    "float for int": (["--training.steps", "1e3"], ['training.steps = "1e3"', "a whole number"]),
    "not a float": (["--optimizer.lr", ""], ['optimizer.lr = ""', "a finite number"]),
    "nan": (["--optimizer.lr=nan"], ["optimizer.lr = nan", "a finite number"]),
    "not a bool": (["--compile.enable", "yes"], ['compile.enable = "yes"', "true or false"]),
    "bad list": (["--compile.components", "model,x"], ['["model", "x"]', "model, loss"]),
    "none for what cannot be unset": (["--training.steps", "none"], ['training.steps = "none"']),
    "stray word": (["train"], ['"train"', "unexpected argument"]),
    "single dash": (["-steps"], ['"-steps"', "unexpected argument"]),
    "empty argument": ([""], ['""', "unexpected argument"]),
    "bare dashes": (["--"], ["unknown"]),
    "not UTF-8": (["--job.description", "\udcff"], ["job.description", "UTF-8 text"]),
    "unsupported option": (
        ["--parallelism.pipeline_parallel_schedule_csv", "x.csv"],
        ["not support yet"],
    ),
    "unsupported section": (
        ["--memory_estimation.enable"],
        ["memory_estimation.enable = true", "not support yet"],
    ),
    "missing file": (["--job.config_file", "no.toml"], ["no.toml", "No such file"]),
    "folder": (["--job.config_file", "."], ["cannot be read", "directory"]),
    "path of no file": (["--job.config_file", ""], ["cannot be read"]),
    "replicas": (
        ["--parallelism.data_parallel_replicate_degree", "5"],
        ["5", "world size 12", "1, 2, 3, 4, 6, 12"],
    ),
    "degrees": (
        [
            "--parallelism.data_parallel_replicate_degree=2",
            "--parallelism.data_parallel_shard_degree=4",
        ],
        ["2 x", "= 4 gives 8 ranks", "world size is 12"],
    ),
    "global batch": (
        ["--training.global_batch_size=32"],
        ["= 32", "over 12 data-parallel ranks", "8 and 16", "24 and 36"],
    ),
}


@pytest.mark.parametrize("name", BAD_COMMAND_LINE)
def test_bad_command_line_gets_one_clear_fault(name):
    args, fragments = BAD_COMMAND_LINE[name]
    with pytest.raises(ConfigError) as raised:
        JobConfig().parse_args(args, world_size=12)
    said = str(raised.value)
    assert said.startswith("The configuration has 1 fault:\n"), said
    for fragment in fragments:
        assert fragment in said


def test_all_faults_are_in_one_report():
    said = report(
        "[training]\nstpes = 5\nsteps = 0\n[modl]\n[optimizer]\nlr = nan\n[checkpoint]\nload_step = 0",
        *(
            "--trainin.x",
            "--compile.enable=2",
            "--training.global_batch_size",
            "25",
            "--debug.seed",
        ),
        world_size=4,
    )
    lines = said.splitlines()
    assert lines[0] == "The configuration has 9 faults:"
    for start in (
        "  run.toml: [modl]",
        "  run.toml: training.stpes",
        "  run.toml: training.steps = 0",
        "  run.toml: optimizer.lr = nan",
        "  command line: --trainin.x",
        "  command line: --debug.seed has no value",
        '  command line: compile.enable = "2"',
        "  command line: training.global_batch_size = 25",
        "  run.toml: checkpoint.load_step = 0",
    ):
        assert sum(line.startswith(start) for line in lines) == 1, said


def test_a_faulty_value_is_reported_though_the_command_line_overrides_it():
    assert "run.toml: training.steps = 0" in report(
        "[training]\nsteps = 0", "--training.steps", "5"
    )


def test_no_combination_is_judged_on_values_in_doubt():
    """Only what is known is said: a misspelt family, section or file would make each of these flavors look unknown."""
    for text in (
        '[model]\nnmae = "llama2"\nflavor = "7B"',
        '[modell]\nname = "llama2"',
        "[model\n",
        '[model]\nname = 2\nflavor = "7B"',
    ):
        said = report(text, *(() if "7B" in text else ("--model.flavor", "7B")))
        assert said.startswith("The configuration has 1 fault:"), said


def test_clash_names_all_places_its_values_came_from():
    said = report(
        "[training]\nglobal_batch_size = 9",
        "--parallelism.data_parallel_shard_degree=4",
        world_size=4,
    )
    assert "\n  run.toml, command line: training.global_batch_size = 9" in said


PP2 = "--parallelism.pipeline_parallel_degree=2"
TP2, CP2 = "--parallelism.tensor_parallel_degree=2", "--parallelism.context_parallel_degree=2"
BAD_SHARING = {
    "product": (
        ["--parallelism.data_parallel_shard_degree=2", TP2, CP2],
        ["tensor_parallel_degree = 2", "gives 8 ranks, but the world size is 4"],
    ),
    "left over": (
        ["--parallelism.tensor_parallel_degree=3"],
        ["tensor_parallel_degree = 3 does not divide", "1, 2, 4"],
    ),
    "heads": (
        [TP2, "--model.n_kv_heads=1"],
        ["tensor_parallel_degree = 2 must divide model.n_kv_heads = 1"],
    ),
    "ulysses heads": (
        [TP2, CP2, "--model.n_kv_heads=2", "--parallelism.context_parallel_method=ulysses"],
        [
            "context_parallel_degree = 4 (ulysses: times the tensor-parallel degree) must divide model.n_kv_heads = 2"
        ],
    ),
    "head and tail": (
        [CP2, "--training.seq_len=6"],
        ["training.seq_len = 6 must be divisible by 4", "(headtail)"],
    ),
    "sequence parallel": (
        [TP2, CP2, "--training.seq_len=12"],
        ["must be divisible by 8", "tensor_parallel_degree = 2"],
    ),
    "feed-forward": ([TP2, "--model.ffn_hidden_dim=7"], ["must divide model.ffn_hidden_dim = 7"]),
    "budget": (["--activation_checkpoint.mode=memory_budget"], ["it needs compile.enable = true"]),
    "async": (
        [TP2, "--parallelism.enable_async_tensor_parallel"],
        ["it needs compile.enable = true"],
    ),
    "pp product": (
        ["--parallelism.pipeline_parallel_degree=3"],
        ["pipeline_parallel_degree = 3 does not divide"],
    ),
    "pp schedule": (
        [PP2, "--parallelism.pipeline_parallel_schedule=1f1b"],
        ["must be one of GPipe, 1F1B, Interleaved"],
    ),
    "pp layers": (
        ["--parallelism.pipeline_parallel_degree=4", "--model.n_layers=1"],
        ["1 layers are too few for 4"],
    ),
    "pp stages": (
        [PP2, "--parallelism.pipeline_parallel_layers_per_stage=2"],
        [
            "pipeline_parallel_degree = 2: 4 stages on 2 pipeline ranks; 1F1B accepts 2, one per rank"
        ],
    ),
    "pp interleaved stages": (
        [
            PP2,
            "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
            "--parallelism.pipeline_parallel_layers_per_stage=4",
        ],
        ["2 stages on 2 pipeline ranks; Interleaved1F1B accepts 4, 6 or a higher multiple of 2"],
    ),
    "pp microbatches": (
        [PP2, "--training.local_batch_size=1"],
        [
            "1 microbatch for 2 stages; 1F1B needs at least one per stage",
            "training.local_batch_size allows more",
        ],
    ),
    "pp rounds": (
        [
            PP2,
            "--parallelism.pipeline_parallel_schedule=InterleavedZeroBubble",
            "--training.local_batch_size=5",
        ],
        [
            "5 microbatches on 2 pipeline ranks; InterleavedZeroBubble accepts up to 3, or multiples of 2"
        ],
    ),
    "pp microbatch size": (
        [PP2, "--parallelism.pipeline_parallel_microbatch_size=3"],
        [
            "pipeline_parallel_microbatch_size = 3 must divide the 8 sequences that pass the pipeline together"
        ],
    ),
    "pp pieces": (
        [PP2, "--parallelism.module_fqns_per_model_part=tok_embeddings,layers.0;layers.2,norm"],
        ["missing: layers.1", "output", "the model's layers are, in order: tok_embeddings to"],
    ),
    "pp empty stage": (
        [PP2, "--parallelism.module_fqns_per_model_part=tok_embeddings;"],
        ["a list of lists of names"],
    ),
    "pp reshard": (
        [
            PP2,
            "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
            "--parallelism.fsdp_reshard_after_forward=always",
        ],
        ['fsdp_reshard_after_forward = "always": ZBVZeroBubble splits the backward'],
    ),
    "n-th block": (
        ["--activation_checkpoint.selective_ac_option=0"],
        ['selective_ac_option = "0"'],
    ),
}


@pytest.mark.parametrize("name", BAD_SHARING)
def test_layouts_that_cannot_be_are_refused(name):
    args, fragments = BAD_SHARING[name]
    said = report("", *args, world_size=4)
    for fragment in fragments:
        assert fragment in said


# Each with one option that another one leaves without effect, on 4 ranks.
IDLE_LAYOUTS = {
    "rotation": (
        [
            CP2,
            "--parallelism.context_parallel_method=ulysses",
            "--parallelism.context_parallel_rotate_method=alltoall",
        ],
        ['alltoall" has no effect with parallelism.context_parallel_method = "ulysses"'],
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
            'pipeline_parallel_schedule = "GPipe" has no effect while parallelism.pipeline_parallel_degree = 1',
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
            "pipeline_parallel_layers_per_stage = 1 has no effect with parallelism.module_fqns_per_model_part"
        ],
    ),
}


@pytest.mark.parametrize("name", IDLE_LAYOUTS)
def test_a_layout_option_without_effect_is_noted_and_taken(name):
    args, fragments = IDLE_LAYOUTS[name]
    (note,) = parse("", *args, world_size=4).notes
    for fragment in fragments:
        assert fragment in note


def test_layouts_that_can_be_are_accepted():
    parse("", TP2, CP2, "--training.seq_len=8", world_size=8)
    parse("", TP2, "--training.seq_len=3", "--parallelism.disable_sequence_parallel", world_size=2)
    parse("", PP2, TP2, CP2, "--training.seq_len=8", world_size=16)
    parse("", PP2, "--parallelism.fsdp_reshard_after_forward=always", world_size=2)
    parse(
        "[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_layers_per_stage = 4",
        world_size=2,
    )
    parse(
        "",
        CP2,
        "--training.seq_len=6",
        "--parallelism.context_parallel_load_balancer=none",
        world_size=2,
    )


def test_defaults_need_nothing():
    assert JobConfig().parse_args([]) == JobConfig()
    assert check(JobConfig(), world_size=None) == []
    assert check(JobConfig(), world_size=8) == []


def test_command_line_goes_before_file_before_default():
    config = parse(
        "[training]\nsteps = 5\nseq_len = 64\n[lr_scheduler]\ntotal_steps = 9\n[optimizer]\nlr = 1\n[debug]\n",
        *(
            "--training.steps",
            "7",
            "--lr_scheduler.total_steps=none",
            "--compile.enable",
            "--debug.detect_anomaly",
        ),
        *(
            "false",
            "--compile.components=loss",
            "--optimizer.weight_decay",
            "0",
            "--training.global_batch_size",
            "-1",
        ),
    )
    assert (config.training.steps, config.training.seq_len, config.training.gc_freq) == (7, 64, 50)
    assert config.lr_scheduler.total_steps is None
    assert config.compile.enable is True
    assert config.debug.detect_anomaly is False
    assert config.compile.components == ["loss"]
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1.0, 0.0)
    assert isinstance(config.optimizer.lr, float)
    assert isinstance(config.optimizer.weight_decay, float)
    assert config.job.config_file == "run.toml"


def test_fills_in_place_and_leaves_no_trace_elsewhere():
    config = JobConfig()
    assert config.parse_args(["--training.steps=7", "--compile.components=loss"]) is config
    assert config.training.steps == 7
    assert JobConfig().training.steps == 10_000
    assert JobConfig().compile.components == ["model", "loss"]


def test_a_refused_config_changes_nothing():
    config = JobConfig()
    with pytest.raises(ConfigError):
        config.parse_args(["--training.steps=7", "--training.seq_len=0"])
    assert config == JobConfig()


def test_reads_sys_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--training.steps", "7"])
    assert JobConfig().parse_args().training.steps == 7


def test_world_size_is_torchruns_unless_given(monkeypatch):
    args = ["--parallelism.data_parallel_shard_degree", "4"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    JobConfig().parse_args(args)
    with pytest.raises(ConfigError, match="world size is 3"):
        JobConfig().parse_args(args, world_size=3)
    monkeypatch.setenv("WORLD_SIZE", "four")
    with pytest.raises(ConfigError, match='WORLD_SIZE = "four"'):
        JobConfig().parse_args(args)


def test_utf8_and_byte_order_mark_are_read():
    assert parse('\ufeff[job]\ndescription = "é 😀"'.encode()).job.description == "é 😀"


HOSTILE = [
    "",
    '"',
    "\\",
    "'''",
    '"""',
    "\n\r\t\b\f\x1b\x7f",
    "# no comment",
    "é 😀 \u2028\u0085",
    "[a]\nb = 1",
    "{}=",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_round_trip_of_hostile_text(text):
    config = JobConfig().parse_args([f"--job.description={text}"])
    assert parse(to_toml(config)).job.description == text


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(
    text=TEXT, lr=st.floats(min_value=5e-324, allow_infinity=False), seed=st.integers(0, 2**63 - 1)
)
def test_round_trip_of_any_value(text, lr, seed):
    config = JobConfig()
    config.job.description, config.optimizer.lr, config.debug.seed = text, lr, seed
    assert JobConfig.model_validate(tomli.loads(to_toml(config))) == config


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.stem)
def test_round_trip_of_committed_files(path):
    ranks = 64 if "405b" in path.stem else 8
    config = JobConfig().parse_args(["--job.config_file", str(path)], world_size=ranks)
    text = to_toml(config)
    again = parse(text, world_size=ranks)
    assert again.job.config_file == "run.toml"
    again.job.config_file = config.job.config_file
    assert again == config
    assert "config_file" not in text
    assert "None" not in text
    assert "data_parallel_shard_degree = -1\n" in text


def test_committed_files_are_the_promised_ones():
    assert [path.stem for path in TOMLS] == [
        *(
            "debug_model",
            "llama2_13b",
            "llama2_70b",
            "llama2_7b",
            "llama3_405b",
            "llama3_70b",
            "llama3_8b",
        ),
    ]


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.stem)
def test_committed_files_fit_the_usual_world_sizes(path):
    sizes = {"debug_model": (1, 2, 3, 4, 6, 8), "llama3_405b": (64, 128, 256, 512)}
    for world_size in sizes.get(path.stem, (8, 64, 256, 512)):
        config = JobConfig().parse_args(["--job.config_file", str(path)], world_size)
        assert config.training.global_batch_size > 0, "set in every committed file"
        if path.stem != "debug_model":
            family, size = path.stem.split("_")
            assert (config.model.name, config.model.flavor) == (family, size.upper())


def test_overrides_go_over_the_flavor():
    config = parse(
        '[model]\nname = "llama2"\nflavor = "7B"\nn_layers = 3\nrope_theta = 5\ntied_embeddings = true'
    )
    shape = plan_shape(config.model)
    base = FAMILIES["llama2"].flavors["7B"]
    assert (shape.n_layers, shape.rope_theta, shape.tied_embeddings) == (3, 5.0, True)
    assert (shape.dim, shape.n_heads, shape.vocab_size) == (base.dim, base.n_heads, base.vocab_size)


def test_every_dimension_of_a_shape_can_be_overridden():
    shape = FAMILIES["llama3"].flavors["8B"]
    assert set(type(shape).__dataclass_fields__) <= set(SECTIONS["model"].model_fields)


def test_tokenizer_path():
    assert find_tokenizer(JobConfig().model) == str(
        ROOT / "torchtrain" / "datasets" / "debug_tokenizer.model"
    )
    assert find_tokenizer(parse('[model]\ntokenizer_path = "a/b"').model) == "a/b"
    assert find_tokenizer(parse('[model]\nhf_assets_path = "c"').model) == "c"


def test_data_parallel_degree():
    def degree(replicate: int, shard: int, world_size: int) -> int:
        section = Parallelism(
            data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard
        )
        return plan_degrees(section, world_size).data_parallel

    assert degree(1, -1, 6) == degree(2, -1, 6) == degree(2, 3, 6) == degree(6, 1, 6) == 6
    for replicate, shard in ((4, -1), (1, 1), (2, 2), (12, -1)):
        with pytest.raises(UserError, match="world size"):
            degree(replicate, shard, 6)


def test_plan_batch_examples():
    plan = plan_batch(Training(global_batch_size=24, local_batch_size=5), 2)
    assert (plan.microbatch_size, plan.accumulation_steps, plan.global_batch_size) == (4, 3, 24)
    plan = plan_batch(Training(global_batch_size=-1, local_batch_size=5), 3)
    assert (plan.microbatch_size, plan.accumulation_steps, plan.global_batch_size) == (5, 1, 15)
    for total, ranks, degrees, batches in (
        (24, 5, "4 and 6", "20 and 25"),
        (24, 32, "24", "32"),
        (7, 3, "1 and 7", "6 and 9"),
    ):
        with pytest.raises(UserError, match=f"divide it: {degrees}; .* ranks: {batches}$"):
            plan_batch(Training(global_batch_size=total), ranks)


@given(st.integers(1, 64), st.integers(1, 300), st.integers(1, 64))
def test_plan_batch_is_the_largest_even_split(ranks, per_rank, local):
    plan = plan_batch(Training(global_batch_size=ranks * per_rank, local_batch_size=local), ranks)
    assert (
        plan.microbatch_size * plan.accumulation_steps * ranks
        == plan.global_batch_size
        == ranks * per_rank
    )
    assert plan.microbatch_size <= local
    assert not any(
        per_rank % size == 0 for size in range(plan.microbatch_size + 1, min(local, per_rank) + 1)
    )


@given(st.integers(1, 500), st.integers(2, 64))
def test_plan_batch_names_degrees_and_batches_that_work(total, ranks):
    if total % ranks == 0:
        return
    with pytest.raises(UserError) as raised:
        plan_batch(Training(global_batch_size=total), ranks)
    _, degrees, batches = (part.split(":")[-1] for part in str(raised.value).split(";"))
    for degree in degrees.split(" and "):
        assert plan_batch(
            Training(global_batch_size=total), int(degree)
        ).data_parallel_degree == int(degree)
    for batch in batches.split(" and "):
        assert plan_batch(Training(global_batch_size=int(batch)), ranks).global_batch_size == int(
            batch
        )


def test_plan_batch_of_the_largest_values_is_quick():
    plan = plan_batch(Training(global_batch_size=10**9, local_batch_size=10**9), 1)
    assert (plan.microbatch_size, plan.accumulation_steps) == (10**9, 1)


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as ended:
        JobConfig().parse_args(["--training.steps", "0", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for section, model in SECTIONS.items():
        assert f"\n[{section}] " in said
        assert model.__doc__ is not None
        for key, field in model.model_fields.items():
            assert f"\n  --{section}.{key}  (" in said
            assert field.description, f"{section}.{key} has no docstring"
            assert " ".join(field.description.split()) in " ".join(said.split())
    assert "--training.seq_len  (a whole number >= 1 and <= 1,000,000,000; default: 2048)" in said
    assert '--optimizer.implementation  (one of for-loop, foreach, fused; default: "fused")' in said
    assert (
        "--lr_scheduler.total_steps  (a whole number >= 1 and <= 1,000,000,000; default: unset)"
        in said
    )
    assert "jsonl: " in said
    assert "405B" in said


def test_launchers_check(capsys):
    parse_or_exit(["--job.config_file", str(ROOT / "train_configs" / "debug_model.toml")], 2)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit, match="2"):
        parse_or_exit(["--training.global_batch_size", "24"], 5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "over 5 data-parallel ranks" in captured.err
    with pytest.raises(SystemExit, match="0"):
        parse_or_exit(["-h"], 5)
    assert "--training.steps" in capsys.readouterr().out


CHECK = "import sys, torchtrain.config.options as o, torchtrain.config_manager as c; c.parse_or_exit(sys.argv[1:], 2); sys.exit('torch' in sys.modules)"


def check_command(*args: str) -> list[str]:
    """A process that does what the launcher does first, and ends with 1 if it has imported torch for that."""
    return [sys.executable, "-c", CHECK, *args]


def test_as_a_command_a_fault_is_a_report_and_status_2():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = check_command("--job.config_file", "no.toml", "--x")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("The configuration has 2 faults:\n  no.toml: ")
    assert "Traceback" not in ended.stderr


def test_neither_help_nor_check_imports_torch():
    check = check_command("--job.config_file", str(ROOT / "train_configs" / "debug_model.toml"))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in (
        check,
        [part.replace("c.parse_or_exit(sys.argv[1:], 2)", "o.print_help()") for part in check],
    ):
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
        assert ended.returncode == 0, ended.stderr
        assert ("--training.steps" in ended.stdout) == (command != check)


def test_help_into_a_closed_pipe_is_no_fault():
    process = subprocess.Popen(
        check_command("--help"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), error) == (0, b"")
