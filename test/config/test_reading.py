"""Reading the TOML file and the command line: syntax, precedence, and one report of all faults."""

import sys

import pytest
from helpers.configs import assert_one_fault, parse, report

from torchtrain.config.checks import check
from torchtrain.config.toml import to_toml
from torchtrain.config_manager import JobConfig
from torchtrain.errors import ConfigError

# Text that cannot be read: the file, and what the report must hold.
BAD_SYNTAX = {
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
    "bare word": (
        "[model]\nname = llama3  # which",
        ['line 2, column 8: text needs quotes: "llama3"', "2 | name = llama3"],
    ),
    "bare word that begins as a number": ("[model]\nflavor = 8B", ['needs quotes: "8B"', "line 2"]),
    "bare path": ("[job]\ndump_folder = ./out/a", ['text needs quotes: "./out/a"']),
    "Python's true": ("[compile]\nenable = True", ["line 2", "write true, without capitals"]),
}


@pytest.mark.parametrize("name", BAD_SYNTAX)
def test_text_that_is_not_toml_gets_its_first_fault(name):
    text, fragments = BAD_SYNTAX[name]
    assert_one_fault(report(text), "run.toml", fragments)


def test_a_bare_word_is_blamed_only_for_its_own_fault():
    """A number, or a word on a line with another fault, is not told to be quoted."""
    for text in ("[optimizer]\nlr = 1e-3\nlr = 1e-3", "[compile]\nenable = true\nenable = true"):
        said = report(text)
        assert "this key was given before" in said
        assert "quotes" not in said


# Arguments that cannot be read, or name nothing.
BAD_ARGUMENTS = {
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
    "another trainer's name": (
        ["--optimizer.learning_rate=1e-3"],
        ["--optimizer.learning_rate", "did you mean --optimizer.lr?"],
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_a_bad_command_line_gets_one_clear_fault(name):
    args, fragments = BAD_ARGUMENTS[name]
    with pytest.raises(ConfigError) as raised:
        JobConfig().parse_args(args, world_size=12)
    said = str(raised.value)
    assert said.startswith("The configuration has 1 fault:\n"), said
    for fragment in fragments:
        assert fragment in said


def test_a_missing_file_is_said_with_the_folder_it_was_looked_for_from(tmp_path):
    with pytest.raises(ConfigError) as raised:
        JobConfig().parse_args(["--job.config_file", "no.toml"])
    assert f"cannot be read: No such file or directory (looked from {tmp_path})" in str(
        raised.value
    )


def test_a_config_that_comes_with_torchtrain_is_found_by_its_name(tmp_path):
    corpus = "--training.dataset=c4"
    for name in ("llama2_70b.toml", "train_configs/llama2_70b.toml"):
        config = JobConfig().parse_args(["--job.config_file", name, corpus], 8)
        assert config.model.flavor == "70B"
    for name in (
        "other/llama2_70b.toml",
        "./../llama2_70b.toml",
        str(tmp_path / "llama2_70b.toml"),
    ):
        with pytest.raises(ConfigError, match="No such file"):
            JobConfig().parse_args(["--job.config_file", name], 8)
    (tmp_path / "llama2_70b.toml").write_text('[model]\nname = "llama2"\nflavor = "7B"\n')
    mine = JobConfig().parse_args(["--job.config_file", "llama2_70b.toml"], 8)
    assert mine.model.flavor == "7B", "the user's own file comes first"


def test_all_faults_are_in_one_report():
    said = report(
        "[training]\nstpes = 5\nsteps = 0\n[modl]\n"
        "[optimizer]\nlr = nan\n[checkpoint]\nload_step = 0",
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
    """Only what is known is said: by default each of these flavors would look unknown."""
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


def test_defaults_need_nothing():
    assert JobConfig().parse_args([]) == JobConfig()
    assert check(JobConfig(), world_size=None) == []
    assert check(JobConfig(), world_size=8) == []


def test_command_line_goes_before_file_before_default():
    config = parse(
        "[training]\nsteps = 5\nseq_len = 64\n"
        "[lr_scheduler]\ntotal_steps = 9\n[optimizer]\nlr = 1\n[debug]\n",
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


def test_tables_are_read_from_the_file_and_as_toml_from_the_command_line():
    file = '[[optimizer.groups]]\npattern = "norm.*"\nlr = 1'
    (group,) = parse(file).optimizer.groups
    assert (group.pattern, group.lr, group.weight_decay) == ("norm.*", 1.0, None)
    given = '{ pattern = "out*", weight_decay = 0 }, { pattern = "tok_*", lr = 1e-3 }'
    config = parse(file, f"--optimizer.groups={given}")
    assert [group.pattern for group in config.optimizer.groups] == ["out*", "tok_*"]
    assert parse(to_toml(config)).optimizer == config.optimizer


def test_the_command_line_can_empty_a_list(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[checkpoint]\nexclude_from_loading = ["optimizer"]\n')
    given = ["--job.config_file", str(file)]
    assert JobConfig().parse_args(given).checkpoint.exclude_from_loading == ["optimizer"]
    given.append("--checkpoint.exclude_from_loading=")
    assert JobConfig().parse_args(given).checkpoint.exclude_from_loading == []


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
