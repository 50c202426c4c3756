"""Sweeps: which runs a file asks for, what becomes of them, how a sweep goes on."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.launching import ROOT, TINY

from torchtrain.errors import UserError
from torchtrain.tools.sweep import running, table
from torchtrain.tools.sweep.__main__ import main
from torchtrain.tools.sweep.kept import find_others
from torchtrain.tools.sweep.naming import name_runs
from torchtrain.tools.sweep.plan import read_sweep

HEAD = 'config_file = "debug_model.toml"\nfolder = "out"\n'
GRID = "[grid]\noptimizer.lr = [1e-3, 2e-3]\ntraining.steps = [4, 5]\n"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NGPU", "1")
    for name in ("MAX_RESTARTS", "NNODES", "PET_NNODES"):
        monkeypatch.delenv(name, raising=False)


def planned(text, world_size=1):
    Path("sweep.toml").write_text(HEAD + text, encoding="utf-8")
    return read_sweep(Path("sweep.toml"), world_size)


def refused(text, head=HEAD):
    Path("sweep.toml").write_text(head + text, encoding="utf-8")
    with pytest.raises(UserError) as fault:
        read_sweep(Path("sweep.toml"), 1)
    return str(fault.value)


# ---- what a file asks for ----


def test_a_grid_is_every_combination_over_the_file():
    sweep = planned(f"[set]\ntraining.seq_len = 64\n{GRID}")
    found = [
        (run.name, run.config.optimizer.lr, run.config.training.steps, run.config.job.dump_folder)
        for run in sweep.runs
    ]
    assert found == [
        ("lr=0.001,steps=4", 1e-3, 4, "out/lr=0.001,steps=4"),
        ("lr=0.001,steps=5", 1e-3, 5, "out/lr=0.001,steps=5"),
        ("lr=0.002,steps=4", 2e-3, 4, "out/lr=0.002,steps=4"),
        ("lr=0.002,steps=5", 2e-3, 5, "out/lr=0.002,steps=5"),
    ]
    assert {run.config.training.seq_len for run in sweep.runs} == {64}
    assert {run.config.training.global_batch_size for run in sweep.runs} == {24}, "the file's"


def test_a_list_of_runs_alone_and_times_a_grid():
    listed = "[[runs]]\nmodel.dim = 128\n[[runs]]\nmodel.n_layers = 2\noptimizer.lr = 1\n"
    assert [run.name for run in planned(listed).runs] == ["dim=128", "n_layers=2,lr=1"]
    names = [run.name for run in planned(f"{listed}[grid]\ndebug.seed = [0, 1]").runs]
    assert names[::3] == ["dim=128,seed=0", "n_layers=2,lr=1,seed=1"]
    assert len(names) == 4


def test_names_are_those_of_folders_and_differ():
    text = (
        "[grid]\ntraining.dataset_path = ['a/b c', 'a/b-c']\n"
        "training.dataset = ['text']\nvalidation.seq_len = [64]\ntraining.seq_len = [32]\n"
    )
    for folder in ("a/b c", "a/b-c"):
        Path(folder).mkdir(parents=True)
    first, second = (run.name for run in planned(text).runs)
    name = "dataset_path=a-b-c,dataset=text,training.seq_len=32,validation.seq_len=64"
    assert re.fullmatch(f"{name},[0-9a-f]{{8}}", first)
    assert re.fullmatch(f"{name},[0-9a-f]{{8}}", second)
    assert first != second


def test_a_name_is_of_its_options_alone_whatever_other_runs_there_are():
    paths = ["a/b", "a-b", "a b", "A-B", "", "x" * 200, "x" * 200 + "y", "a", "b"]
    varied = [{"training.dataset_path": path} for path in paths]
    names = name_runs(varied)
    assert len({name.casefold() for name in names}) == len(paths)
    assert names[-2:] == ["dataset_path=a", "dataset_path=b"]
    assert max(map(len, names)) == 120
    assert name_runs(varied[::-1]) == names[::-1]
    assert name_runs(varied[:1] + varied[2:3]) == [names[0], names[2]]


def test_the_same_run_twice_is_refused():
    assert "two runs have the same options: lr=0.001" in refused(
        "[grid]\noptimizer.lr=[1e-3, 1e-3]"
    )
    assert "two runs have the same options: as-set" in refused(
        "[[runs]]\n[[runs]]\n[[runs]]\nmodel.dim = 64"
    )


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("enable = true", "checkpoint.folder"),
        ("enable_tensorboard = true", "metrics.save_tb_folder"),
        ("enable_profiling = true", "profiling.save_traces_folder"),
        ("enable_memory_snapshot = true", "profiling.save_memory_snapshot_folder"),
    ],
)
def test_runs_that_would_write_one_folder_are_refused(tmp_path, option, key):
    """With one folder of checkpoints, the second run would find itself done."""
    shared = str(tmp_path / "shared")
    section = key.partition(".")[0]
    given = f'{GRID}[set]\n{key} = "{shared}"\n'
    said = refused(f"{given}{section}.{option}\n")
    assert said.splitlines()[1].startswith(f'  {key} = "{shared}": more than one run would write')
    assert len(planned(f"{given}{section}.{option.replace('true', 'false')}\n").runs) == 4
    apart = f'[[runs]]\n{key} = "{shared}/a"\n[[runs]]\n{key} = "{shared}/b"\n'
    assert len(planned(f"{apart}[set]\n{section}.{option}\n").runs) == 2


def test_runs_that_only_load_may_share_their_checkpoints(tmp_path):
    text = f'[set]\ncheckpoint = {{ enable = true, load_only = true, folder = "{tmp_path}" }}\n'
    assert len(planned(text + GRID).runs) == 4


def test_the_sweeps_folder_is_refused_by_its_own_name():
    head = 'config_file = "debug_model.toml"\nfolder = "s3://bucket/out"\n'
    said = refused(GRID, head=head)
    assert said.startswith('sweep.toml has 1 fault:\n  folder = "s3://bucket/out" is an address')


def test_a_sweeps_file_may_lie_in_its_folder_but_under_no_runs_name(tmp_path):
    Path("out").mkdir()
    text = HEAD + "[grid]\noptimizer.lr = [1, 2]\n"
    for name in ("all.toml", "lr=1.toml"):
        Path("out", name).write_text(text, encoding="utf-8")
    assert find_others(read_sweep(Path("out/all.toml"), 1)) == []
    with pytest.raises(UserError, match=r"the run lr=1 would write its config over out/lr=1\.toml"):
        read_sweep(Path("out/lr=1.toml"), 1)


def test_a_sign_is_part_of_a_name():
    sweep = planned("[grid]\nparallelism.data_parallel_shard_degree = [-1, 1]\n")
    names = ["data_parallel_shard_degree=-1", "data_parallel_shard_degree=1"]
    assert [run.name for run in sweep.runs] == names


def test_none_unsets_and_tables_are_values():
    groups = '[[{ pattern = "norm.*", lr = 1e-3 }], []]'
    sweep = planned(
        '[set]\ntext_samples.prompts = "none"\njob.description = "none"\n'
        f"[grid]\noptimizer.groups = {groups}\n"
    )
    first, second = (run.config for run in sweep.runs)
    assert first.text_samples.prompts is None
    assert first.job.description == "none"
    assert [group.pattern for group in first.optimizer.groups] == ["norm.*"]
    assert second.optimizer.groups == []


def test_every_fault_of_every_run_is_found_before_one_starts():
    said = refused(
        "[set]\ntraining.stpes = 3\n"
        "[grid]\noptimizer.lr = [1e-3, -1, 'fast']\nmodel.n_heads = [16, 5]\n"
    )
    lines = said.split("\n  ")
    assert lines[0] == "sweep.toml has 5 faults:"
    assert "training.stpes = 3: unknown; did you mean training.steps?" in lines[1]
    assert lines[1].startswith("sweep.toml: "), "all runs have it"
    assert [line for line in lines if "model.n_heads = 5 must divide model.dim = 256" in line]
    assert [line for line in lines if "lr=-1,n_heads=16 and lr=-1,n_heads=5: sweep.toml: " in line]
    assert [line for line in lines if 'optimizer.lr = "fast": must be a finite number' in line]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "nothing varies: give [grid], [[runs]] or both"),
        ("[grid]\nquantize = {}", "nothing varies: give [grid], [[runs]] or both"),
        ("[gird]\n", "gird: unknown; a sweep's file holds config_file (the config file"),
        ("[grid]\noptimizer.lr = 1", "grid: optimizer.lr = 1: must be a list of values"),
        ("[grid]\noptimizer.lr = []", "grid: optimizer.lr = []: must be a list of values"),
        ("[grid]\nlr = [1]", "grid: lr = [1]: write section.key = value"),
        ("[runs]\nx.y = 1", "must be an array of tables"),
        ("[grid]\njob.dump_folder = ['a']", "job.dump_folder cannot be given here: each run has"),
        (f"[set]\noptimizer.lr = 1\n{GRID}", "optimizer.lr is given in both set and grid"),
        (f"[[runs]]\noptimizer.lr = 1\n{GRID}", "optimizer.lr is given in both grid and runs"),
        ("[grid\n", "sweep.toml: not TOML: line 3"),
        (f"[grid]\ndebug.seed = {list(range(1001))}", "1,001 runs; a sweep has at most 1,000"),
    ],
)
def test_what_is_wrong_with_the_file_itself(text, fragment):
    assert fragment in refused(text)


def test_the_two_keys_at_the_top_are_needed():
    said = refused("[grid]\ndebug.seed = [1]", head="")
    assert "config_file = unset: must be text: the config file that the runs share" in said
    assert "folder = unset: must be text" in said
    said = refused(GRID, head='config_file = "nowhere.toml"\nfolder = "out"\n')
    assert said.startswith(
        "sweep.toml has 1 fault:\n  nowhere.toml: the config file cannot be read"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "train_configs" / "sweeps").glob("*.toml")))
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_committed_sweeps_are_good_wherever_one_is(path, ranks):
    assert len(read_sweep(path.relative_to(ROOT), ranks).runs) > 1


def test_a_missing_file_is_one_message():
    with pytest.raises(UserError, match=r"^nowhere.toml: no such file \(looked from "):
        read_sweep(Path("nowhere.toml"), 1)


# ---- what becomes of the runs, with a launcher that trains nothing ----

LAUNCHER = """#!{python} -ES
import json, os, pathlib, re, signal, sys, time
text = pathlib.Path(sys.argv[4]).read_text()
run = pathlib.Path(json.loads(re.search('^dump_folder = (.*)$', text, re.M)[1]))
lr = float(re.search('^lr = (.*)$', text, re.M)[1])
with open('began', 'a') as file:
    print(run.name, file=file)
run.mkdir(exist_ok=True)
print('said of', run.name, flush=True)
if lr == 7:
    def stop(number, frame):
        print('stopped by', number, flush=True)
        sys.exit(128 + number)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    pathlib.Path('waits').touch()
    time.sleep(600)
if lr == 3:
    print('error: step 2: loss nan, gradient norm nan, on global samples 8 to 15; and so on')
    sys.exit(1)
if lr == 4:
    print('no room')
    sys.exit(1)
if lr == 5:
    sys.exit(75)
if lr == 8:
    sys.exit(0)
records = [dict(step=step, loss=lr + 1 / step, tokens_per_second=100.0 * step) for step in (1, 2)]
records[-1]['val_loss'] = 10 - lr
(run / 'metrics.jsonl').write_text('\\n'.join(map(json.dumps, records)))
(run / 'run.json').write_text(json.dumps(dict(steps=2)))
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """sweep(rates, *arguments): a sweep in this process; its status and what it printed."""
    launcher = tmp_path / "launcher"
    launcher.write_text(LAUNCHER.format(python=sys.executable))
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    monkeypatch.setattr(table.report, "draw", lambda folders, html: print("page of", len(folders)))

    def run(rates, *arguments, more=""):
        Path("sweep.toml").write_text(f"{HEAD}{more}[grid]\noptimizer.lr = {rates}\n")
        status = main(["sweep.toml", *arguments])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def began():
    return Path("began").read_text().split()


def test_runs_go_one_by_one_and_the_best_is_marked(sweep):
    status, printed = sweep([1, 2])
    assert status == 0
    assert began() == ["lr=1", "lr=2"]
    lines = printed.splitlines()
    assert lines[0] == "[1/2] lr=1: its output goes to out/lr=1.log"
    assert Path("out/lr=1.log").read_text() == "said of lr=1\n"
    row = next(line for line in lines if line.startswith("* "))
    assert " ".join(row.split()) == "* lr=2 done 2 of 2 2.5000 8.0000 150 out/lr=2"
    assert "  lr=1  done" in printed
    assert "* lowest validation loss of the runs that are done" in printed
    assert "page of 2" in printed


def test_failures_end_no_sweep_and_are_told_apart(sweep):
    Path("out").mkdir()
    earlier = "error: step 2: loss nan, gradient norm nan, on global samples 8 to 15\n"
    Path("out/lr=4.log").write_text(earlier)  # of another start
    status, printed = sweep([1, 3, 4, 5, 2])
    assert status == 1
    assert began() == ["lr=1", "lr=3", "lr=4", "lr=5", "lr=2"]
    assert "not finite after" in printed
    assert "step 2: loss nan, gradient norm nan, on global samples" in printed
    assert "no room" in printed
    assert "has come to the end of its time (status 75), and can go on" in printed
    states = {line.split()[-1]: line for line in printed.splitlines() if "  out/" in line}
    for name, state in (("lr=3", "not finite"), ("lr=4", "failed"), ("lr=5", "not begun")):
        assert state in states[f"out/{name}"]
    # What is done, and what would only end the same again, stays.
    Path("began").unlink()
    status, printed = sweep([1, 3, 4, 5, 2])
    assert (status, began()) == (1, ["lr=4", "lr=5"])
    assert "[1/5] lr=1: is done already" in printed
    assert "[2/5] lr=3: is not finite already" in printed


def test_a_run_that_diverged_has_a_result(sweep):
    assert sweep([1, 3])[0] == 0
    assert sweep([1, 3], "--table")[0] == 0
    assert sweep([1, 3], "--only", "1")[0] == 0


def test_a_run_without_a_step_of_its_own_is_not_done(sweep):
    status, printed = sweep([8, 1])
    assert status == 1
    assert "its status is 0, but it has not logged a single step" in printed
    assert re.search("^  lr=8  failed ", printed, re.M)
    assert sweep([8, 1])[0] == 1
    assert began() == ["lr=8", "lr=1", "lr=8"]


@pytest.mark.parametrize(
    ("lines", "is_found"),
    [
        (["error: step 2: loss nan, gradient norm 1, on global samples 8 to 15; x"], True),
        (["error: [rank 0] step 2: loss 3.4, gradient norm inf, on global samples 8; x"], True),
        (["error: step 2: loss 9.1, gradient norm 2, on global samples 8; the loss lies"], False),
        (["warning: step 2 is skipped: loss nan, gradient norm nan, on global samples"], False),
        (["error: step 2: loss nan, gradient norm nan, on x", "error: no room"], False),
        (["error: step 2: loss nan, gradient norm nan, on x", "the end"], True),
        (["my own: step 2: loss nan, gradient norm nan, on x"], False),
        ([], False),
    ],
)
def test_not_finite_is_what_the_last_error_says_and_no_spike(lines, is_found):
    assert (running.find_bad_numbers(lines) is not None) == is_found


def test_what_is_to_go_on_is_status_75(sweep, monkeypatch):
    assert sweep([1, 5])[0] == 75
    assert sweep([1, 5], "--table")[0] == 75
    monkeypatch.setenv("NGPU", "7")  # which does not divide the batch
    assert sweep([1, 5], "--table")[0] == 75
    assert began() == ["lr=1", "lr=5"], "a table runs nothing"


def test_a_changed_file_is_noticed_before_anything_runs(sweep):
    assert sweep([1, 2])[0] == 0
    Path("began").unlink()
    status, printed = sweep([1, 6], more="[set]\ntraining.max_norm = 2.0\n")
    assert status == 2
    assert "has changed since runs in out began" in printed
    assert "  lr=1: training.max_norm was 1.0, is 2.0\n" in printed
    assert not Path("began").exists()
    status, printed = sweep([1, 6], "--table", more="[set]\ntraining.max_norm = 2.0\n")
    assert status == 75
    assert re.search("^! lr=1  done ", printed, re.M)
    assert "! not as the file asks for now: lr=1: training.max_norm was 1.0, is 2.0\n" in printed
    assert "* lowest" not in printed
    status, printed = sweep([1, 6])
    assert (status, began()) == (0, ["lr=6"])
    assert "not in sweep.toml any more, and left as they are: lr=2" in printed
    assert "lr=2 " not in printed.splitlines()[-1]


def test_what_changes_no_result_may_change_and_an_older_file_lacks_keys(sweep):
    assert sweep([1, 2])[0] == 0
    file = Path("out/lr=1.toml")
    text = file.read_text()
    shorter = re.sub("^(max_norm|spike_window|beta1) = .*\n", "", text, flags=re.M)
    file.write_text(shorter)
    options = (
        "comm.train_timeout_seconds = 7",
        "job.max_minutes = 9",
        "metrics.log_freq = 3",
        "checkpoint.keep_latest_k = 4",
        "profiling.profile_freq = 1000",
    )
    more = "\n".join(["[set]", *options, ""])
    status, printed = sweep([1, 2], more=more)
    assert (status, began()) == (0, ["lr=1", "lr=2"]), printed
    status, printed = sweep([1, 2], more="[set]\ntraining.steps = 99999\n")
    assert status == 2
    assert "A run of another length is another run" in printed
    file.write_text(text.replace("max_norm = 1.0", "max_norm = 3.0"))
    assert "lr=1: training.max_norm was 3.0, is 1.0" in sweep([1, 2])[1]


def test_one_run_by_name_or_number(sweep):
    assert sweep([1, 2], "--only", "1")[0] == 0
    assert sweep([1, 2], "--only", "lr=2")[0] == 0
    assert began() == ["lr=2"]
    status, printed = sweep([1, 2], "--only", "lr=22")
    assert status == 2
    assert "has no such run; did you mean lr=2? Its 2 runs are numbered from 0" in printed


def test_a_run_that_is_under_way_elsewhere_is_left_alone(sweep, monkeypatch):
    """Nor is it tried again, which status 75 would ask of Slurm."""
    monkeypatch.setattr(running, "TRIES", 1)
    held = planned("[grid]\noptimizer.lr = [1, 2]\n")
    with running.holding(held, held.runs[0]) as is_free:
        assert is_free
        status, printed = sweep([1, 2])
        assert (status, began()) == (3, ["lr=2"])
        assert "[1/2] lr=1: is under way elsewhere" in printed
        assert sweep([1, 2], "--only", "0")[0] == 3
        assert sweep([1, 2, 5])[0] == 75, "its own is to go on"
        status, printed = sweep([1, 2], "--table")
        assert status == 3
        assert re.search("^  lr=1  under way ", printed, re.M)


def test_a_table_makes_nothing_and_is_in_nobodys_way(sweep, monkeypatch):
    assert sweep([1, 2], "--table")[0] == 75
    assert not Path("out").exists()
    made = planned("[grid]\noptimizer.lr = [1, 2]\n")
    with running.holding(made, made.runs[0]):
        pass
    before = sorted(Path("out").iterdir())
    assert sweep([1, 2], "--table")[0] == 75
    assert sorted(Path("out").iterdir()) == before
    # One who looks at the very moment only delays a start.
    look = os.open("out/.lr=1.lock", os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)
    assert not running.is_held(made, made.runs[0])
    monkeypatch.setattr(running.time, "sleep", lambda seconds: os.close(look))
    with running.holding(made, made.runs[0]) as is_free:
        assert is_free


def test_ctrl_c_stops_the_run_under_way_and_says_how_to_go_on(sweep):
    def interrupt():
        while not Path("waits").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    status, printed = sweep([1, 7, 2])
    thread.join()
    assert status == 128 + signal.SIGINT
    assert began() == ["lr=1", "lr=7"]
    assert "stopped by 2" in Path("out/lr=7.log").read_text()
    assert "stopped in lr=7. To go on: python -m torchtrain.tools.sweep sweep.toml" in printed
    assert not Path("out/lr=7.ended.json").exists()
    assert signal.getsignal(signal.SIGINT) is before


PARENT = """
import subprocess, sys, time
from torchtrain.tools.sweep.running import _end_with_parent
child = subprocess.Popen(["sleep", "600"], preexec_fn=_end_with_parent())
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends what a dead parent leaves")
def test_a_killed_sweep_leaves_no_run_behind():
    command = [sys.executable, "-c", PARENT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        child = Path("/proc") / parent.stdout.readline().decode().strip() / "stat"
        assert child.exists()
        parent.kill()
    end = time.monotonic() + 60
    while child.exists() and ") Z" not in child.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert not child.exists() or ") Z" in child.read_text()


def test_restarts_and_nodes_are_refused_where_they_cannot_be(sweep, monkeypatch):
    monkeypatch.setenv("MAX_RESTARTS", "1")
    assert "MAX_RESTARTS needs checkpoint.enable, which lr=1 lacks" in sweep([1])[1]
    monkeypatch.setenv("MAX_RESTARTS", "0")
    monkeypatch.setenv("NNODES", "2")
    assert "a sweep's runs have one node each" in sweep([1])[1]
    assert not Path("out").exists()


def test_without_validation_the_last_loss_decides():
    rows = [
        table.Row(name, state, "2", loss, val_loss, None, "")
        for name, state, loss, val_loss in (
            ("a", "done", 2.0, 1.0),
            ("b", "done", 1.5, None),
            ("c", "begun", 1.0, None),
        )
    ]
    assert table.find_best(rows) == (rows[1], "lowest last loss")
    assert table.find_best(rows[:1]) == (rows[0], "lowest validation loss")
    assert table.find_best(rows[2:])[0] is None


STUB = """#!/bin/bash
echo "$NGPU $@"
[ "$END" = wait ] || exit "$END"
trap 'exit 140' USR2
trap 'exit 143' TERM
touch waits
while true; do sleep 0.05; done
"""


def test_a_slurm_array_runs_each_by_its_name(sweep, monkeypatch):
    monkeypatch.delenv("NGPU")
    assert "--slurm needs NGPU" in sweep([1, 2], "--slurm")[1]
    monkeypatch.setenv("NGPU", "3")
    status, printed = sweep([1, 2], "--slurm")
    assert status == 0
    assert "out/sweep.sbatch: 2 runs. Submit it: sbatch out/sweep.sbatch" in printed
    script = Path("out/sweep.sbatch")
    text = script.read_text()
    assert "#SBATCH --array=0-1\n" in text
    assert "#SBATCH --gpus-per-node=3\n" in text
    assert "#SBATCH --cpus-per-task=24\n" in text
    assert "#SBATCH --signal=B:USR2@300\n" in text
    # Its command, printed: for the first run it is done, for the second its time is up; then one
    # that another job has, and two that are told to stop, by Slurm or by whoever cancels them.
    stub = Path("launcher")
    stub.write_text(STUB)
    Path("scontrol").write_text('#!/bin/bash\necho "scontrol $@"\n')
    Path("scontrol").chmod(0o755)
    requeued = "scontrol requeue 9_1\n"
    cases = [
        ("0", None, 0, ""),
        ("75", None, 75, requeued),
        ("3", None, 3, ""),
        ("140", None, 140, ""),
        ("wait", signal.SIGUSR2, 140, requeued),
        ("wait", signal.SIGTERM, 143, ""),
    ]
    for end, number, status, more in cases:
        Path("waits").unlink(missing_ok=True)
        job = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "9", "END": end}
        path = f"{Path.cwd()}{os.pathsep}{os.environ['PATH']}"
        with subprocess.Popen(
            ["bash", str(script)],
            env={**os.environ, **job, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            while number and not Path("waits").exists():
                time.sleep(0.01)
            if number:
                process.send_signal(number)
            printed, _ = process.communicate(timeout=60)
        command = "3 -m torchtrain.tools.sweep sweep.toml --only lr=2\n"
        assert (printed, process.returncode) == (command + more, status)


# ---- for real ----


@pytest.mark.slow
def test_a_real_run_whose_rate_is_too_high(data, capsys, monkeypatch):
    monkeypatch.setattr(table.report, "draw", lambda folders, html: None)
    given = {**TINY, **data}
    lines = [
        f"{key} = {json.dumps(str(value) if isinstance(value, Path) else value)}"
        for key, value in given.items()
        if key != "job.config_file"
    ]
    grid = "[grid]\noptimizer.lr = [1e30]\n"
    Path("sweep.toml").write_text("\n".join([HEAD, "[set]", *lines, grid]))
    assert main(["sweep.toml"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"step \d: loss .*, gradient norm .* a lower optimizer.lr", printed)
    assert re.search(r"^  lr=1e\+30  not finite  \d of 4  ", printed, re.M)
    assert main(["sweep.toml", "--only", "0"]) == 0
    assert "[1/1] lr=1e+30: is not finite already" in capsys.readouterr().out
