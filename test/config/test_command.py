"""The config as commands: the check, the help, the reference in docs/config.md."""

import os
import subprocess
import sys

import pytest
from helpers.launching import ROOT

from torchtrain.config.schema import SECTIONS
from torchtrain.config_manager import JobConfig, parse_or_exit
from torchtrain.tools.check_config import main

DEBUG = str(ROOT / "train_configs" / "debug_model.toml")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=60, env=ENVIRONMENT
    )


def test_the_check_prints_the_plan_of_a_good_config(capsys):
    args = ["--world-size", "8", "--", "--job.config_file", DEBUG, "--checkpoint.load_step", "4"]
    main([*args, "--validation.enable", "--data.mixture", "python_stdlib=3,c4=1"])
    assert capsys.readouterr().out.splitlines() == [
        "The configuration is good.",
        "model      llama2 debugmodel: 6 layers 256 wide, 16 heads, feed-forward 768, vocabulary "
        "as the tokenizer's",
        "layout     FSDP: parameters, gradients and optimizer states sharded over 8 ranks",
        "batch      24 sequences x 128 tokens = 3,072 tokens per step; microbatch 3, "
        "accumulation 1",
        "data       python_stdlib 0.75, c4 0.25",
        "validation held out of python_stdlib 0.75, c4 0.25",
        "lr         at most 0.0008; 30 steps: 3 of warm-up, 0 stable, 27 of linear decay",
        "note       checkpoint.load_step = 4 has no effect while checkpoint.enable = false",
    ]


def test_the_check_as_a_process_has_status_0_or_2(tmp_path):
    good = run(
        "-m", "torchtrain.config_manager", "--world-size", "8", "--", "--job.config_file", DEBUG
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert "sharded over 8 ranks" in good.stdout
    (tmp_path / "bad.toml").write_text("[nonsense]\nx = 1\n")
    bad = run(
        "-m", "torchtrain.config_manager", "--", "--job.config_file", str(tmp_path / "bad.toml")
    )
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "bad.toml: [nonsense]: unknown section" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_the_check_is_for_the_world_size_given(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--world-size", "5", "--", "--job.config_file", DEBUG])
    assert "over 5 data-parallel ranks" in capsys.readouterr().err
    main(["--job.config_file", DEBUG])
    assert "one process" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["--world-size", "0"])
    assert "must be at least 1" in capsys.readouterr().err


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


CHECK = (
    "import sys, torchtrain.config_manager as c; c.parse_or_exit(sys.argv[1:], 2); "
    "sys.exit('torch' in sys.modules)"
)
HELP = (
    "import sys, torchtrain.config.options as o; o.print_help(); sys.exit('torch' in sys.modules)"
)


def test_a_fault_is_a_report_and_status_2():
    ended = run("-c", CHECK, "--job.config_file", "no.toml", "--x")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("The configuration has 2 faults:\n  no.toml: ")
    assert "Traceback" not in ended.stderr


def test_neither_help_nor_check_imports_torch():
    check = run("-c", CHECK, "--job.config_file", DEBUG)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
    printed = run("-c", HELP)
    assert printed.returncode == 0, printed.stderr
    assert "--training.steps" in printed.stdout


def test_help_into_a_closed_pipe_is_not_a_fault():
    process = subprocess.Popen(
        [sys.executable, "-c", CHECK, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), error) == (0, b"")


def test_the_reference_is_what_the_command_writes():
    """After a change, run python -m torchtrain.tools.config_reference > docs/config.md."""
    written = run("-m", "torchtrain.tools.config_reference")
    assert written.returncode == 0, written.stderr
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == written.stdout
    for section, model in SECTIONS.items():
        assert f"\n## {section}\n" in written.stdout
        for key in model.model_fields:
            assert f"\n| `{key}` | " in written.stdout
