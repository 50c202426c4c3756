"""slurm/train.sbatch under a stand-in for Slurm: what each node gets, and what is queued again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import slurm
from helpers.launching import ROOT, environment, kill_group

SCRIPT = ROOT / "slurm" / "train.sbatch"
NODE = """\
#!/usr/bin/env bash
# In place of the launcher: tells what it was given, and ends as it was told to.
printf '%s ' "$NODE_RANK/$NNODES" "$MASTER_ADDR:$MASTER_PORT" "$NGPU" "$LOG_RANK" "$MAX_RESTARTS" \\
    "$SLURM_CPUS_PER_TASK cores"
printf '<%s>' "$@"
echo
if [ "$END" = wait ]; then
    trap 'echo saved; exit 140' USR2
    trap 'echo stopped; exit 143' TERM
    echo waiting
    while true; do sleep 0.05; done
fi
[ "$NODE_RANK" = 0 ] || exit "$END"
"""


@dataclass
class Job:
    """A job of two nodes."""

    folder: Path
    process: subprocess.Popen

    def log(self, node):
        file = self.folder / "logs" / f"my-job-{self.folder.name}" / f"node-{node}.log"
        return file.read_text() if file.exists() else ""

    def finish(self):
        """Its exit status, what its script has printed, and which jobs were queued again."""
        printed, _ = self.process.communicate(timeout=60)
        requeued = self.folder / "requeued"
        return (
            self.process.returncode,
            printed.splitlines(),
            requeued.read_text().split() if requeued.exists() else [],
        )


@pytest.fixture
def submit(tmp_path):
    """Submits a job, whose launchers end with a status, or wait for a signal."""
    programs = slurm.install(tmp_path / "programs")
    node = tmp_path / "my launcher"
    node.write_text(NODE)
    node.chmod(0o755)
    started = []

    def submit(end, **extra):
        folder = tmp_path / "12345"
        folder.mkdir()
        variables = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NAME": "my-job",
            "SLURM_JOB_NODELIST": "host-7,host-9",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_PER_TASK": "64",
            "TORCHTRAIN": str(node),
            "REQUEUED": str(folder / "requeued"),
            "END": end,
        }
        bare = {name: value for name, value in environment(1).items() if name != "NGPU"}
        process = subprocess.Popen(
            ["bash", str(SCRIPT), "--job.description", "two words", "--training.steps=3"],
            cwd=folder,
            env=bare | variables | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return Job(folder, process)

    yield submit
    for process in started:
        kill_group(process)
        process.wait()


def test_each_node_gets_its_place_and_the_runs_options_and_has_a_log(submit):
    job = submit("0")
    assert job.finish() == (0, [], [])
    given = "<--job.description><two words><--training.steps=3>"
    for node in (0, 1):
        assert job.log(node) == f"{node}/2 host-7:22345 4 0,4 3 64 cores {given}\n"


def test_the_launcher_may_be_a_command_of_several_words(submit, tmp_path):
    (tmp_path / "plain").write_text(NODE)
    job = submit("0", TORCHTRAIN=f"bash -eu {tmp_path}/plain")
    assert job.finish() == (0, [], [])
    assert job.log(1).endswith(" <--job.description><two words><--training.steps=3>\n")


def test_what_the_site_has_set_stays(submit):
    job = submit("0", MASTER_PORT="7000", NGPU="2", LOG_RANK="3", MAX_RESTARTS="0")
    assert job.finish() == (0, [], [])
    assert job.log(1).startswith("1/2 host-7:7000 2 3 0 ")


@pytest.mark.parametrize(
    ("status", "requeued"), [("75", ["12345"]), ("1", []), ("2", []), ("137", []), ("140", [])]
)
def test_a_job_whose_time_is_up_is_queued_again_and_one_that_failed_is_not(
    submit, status, requeued
):
    said = [f"stopped in time with status {status}: queued again"] if requeued else []
    assert submit(status).finish() == (int(status), said, requeued)


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR2, ["12345"]), (signal.SIGTERM, [])]
)
def test_a_signal_to_the_shell_lets_the_run_save_and_the_shell_outlives_it(
    submit, number, requeued
):
    """SIGTERM too, which srun would take for an order to kill the run.

    That `kill` fails, as where the step has just ended, does not end the shell.
    """
    failing = '() { builtin kill "$@" && [ "$1" != -USR2 ]; }'
    job = submit("wait", **{"BASH_FUNC_kill%%": failing})
    deadline = time.monotonic() + 60
    while not all(job.log(node).endswith("waiting\n") for node in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.process.send_signal(number)
    said = ["stopped in time with status 140: queued again"] if requeued else []
    assert job.finish() == (140, said, requeued)
    assert [job.log(node).splitlines()[-1] for node in (0, 1)] == ["saved", "saved"]


def test_slurm_reads_all_of_its_options():
    """It stops at the first command."""
    lines = SCRIPT.read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    found = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(found) < first
    options = {lines[n].removeprefix("#SBATCH ") for n in found}
    assert {"--requeue", "--signal=B:USR2@300", "--ntasks-per-node=1"} <= options


def test_shell_scripts_have_no_known_mistakes():
    scripts = [SCRIPT, ROOT / ".ci" / "run", *ROOT.glob("*.sh"), *ROOT.glob("test/*.sh")]
    scripts.append(ROOT / "torchtrain" / "tools" / "environment.sh")
    beside = str(Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    checked = subprocess.run(
        [shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
