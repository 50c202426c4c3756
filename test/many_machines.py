"""Two machines of two ranks each, in network namespaces of this one.

    sudo python test/many_machines.py

Needs root and `ip` (Debian's iproute2), and takes minutes. Each machine has a network stack, a host
name and an /etc/hosts of its own, as Debian has it, and reaches the other by a cable alone.
A run of 10 steps is trained on them twice:

- as a Slurm job, by the lines of slurm/train.sbatch, under the tests' stand-in for srun and
  scontrol. In step 4 machine 1 is lost, with all that runs on it; Slurm ends the job and queues it
  again. In step 7 the job's time is up: SIGUSR2 to the script, which queues it again.
- as pods, by the command of examples/kubernetes/trainjob.yaml. In step 4 machine 1 is lost, and its
  pod replaced. In step 7 that is drained, and all pods are replaced.

The run's lines must be, to the bit, those of four ranks on one machine that nothing has happened
to. It is no part of the suite, which may run without root. Exit status: 0 if all of this is so.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import yaml
from helpers import slurm
from helpers.forking import train
from helpers.launching import ROOT, environment, kill_group, options, wait_for_step, write_corpus
from helpers.runs import STEPS, saving
from helpers.sameness import curve

NAME = f"torchtrain-{os.getpid()}-"
ADDRESS = "192.168.77."
HOSTS = (
    f"127.0.0.1 localhost\n127.0.1.1 machine-0\n{ADDRESS}2 machine-1\n",
    f"127.0.0.1 localhost\n127.0.1.1 machine-1\n{ADDRESS}1 machine-0\n",
)
ON_MACHINE = (
    f"ip netns exec {NAME}%n unshare --uts sh -c 'hostname machine-%n; exec \"$@\"' machine-%n"
)
PAUSE = """
import time
from pathlib import Path

from torchtrain import attempts

real = attempts.begin_step


def begin_step(step):
    real(step)
    while step in (4, 7) and not (Path(FOLDER) / f"go-{step}").exists():
        time.sleep(0.05)


attempts.begin_step = begin_step  # before train.py imports it
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def connect_machines(stack):
    """Make two network namespaces with a cable between them; the stack removes them again."""
    for number in (0, 1):
        ip("netns", "add", f"{NAME}{number}")
        stack.callback(ip, "netns", "delete", f"{NAME}{number}")
        folder = Path(f"/etc/netns/{NAME}{number}")  # laid over /etc by `ip netns exec`
        folder.mkdir(parents=True)
        stack.callback(folder.rmdir)
        (folder / "hosts").write_text(HOSTS[number])
        stack.callback((folder / "hosts").unlink)
    ends = [f"cable-{number}" for number in (0, 1)]
    peer = ["peer", "name", ends[1], "netns", f"{NAME}1"]
    ip("link", "add", ends[0], "netns", f"{NAME}0", "type", "veth", *peer)
    for number, end in enumerate(ends):
        inside = ["-n", f"{NAME}{number}"]
        ip(*inside, "address", "add", f"{ADDRESS}{number + 1}/24", "dev", end)
        ip(*inside, "link", "set", end, "up")
        ip(*inside, "link", "set", "lo", "up")


def lose_machine(number):
    """Kill all that runs on a machine."""
    listed = subprocess.check_output(["ip", "netns", "pids", f"{NAME}{number}"], text=True)
    for pid in map(int, listed.split()):
        os.kill(pid, signal.SIGKILL)


class Job:
    """A Slurm job, which can be started again."""

    def __init__(self, folder, given):
        self.folder, self.given = folder, given
        self.programs = slurm.install(folder / "programs")

    def start(self):
        variables = {
            "PATH": os.pathsep.join(
                [str(self.programs), str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NAME": "job",
            "SLURM_JOB_NODELIST": "machine-0,machine-1",
            "SLURM_JOB_NUM_NODES": "2",
            "NODE_PREFIX": ON_MACHINE,
            "TORCHTRAIN": str(ROOT / "run_llama_train.sh"),
            "REQUEUED": str(self.folder / "requeued"),
        }
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "slurm" / "train.sbatch"), *options(self.given)],
            cwd=self.folder,
            env=environment(2) | variables,
            start_new_session=True,
        )

    def wait_for_step(self, step):
        wait_for_step(lambda: self.process.poll() is None, self.given["job.dump_folder"], step)

    def end(self):
        """End it as Slurm does where a node is lost."""
        kill_group(self.process)
        for number in (0, 1):
            lose_machine(number)
        self.process.wait()

    def logs(self):
        files = sorted((self.folder / "logs").rglob("node-*.log"))
        return "".join(f"--- {file.name}\n{file.read_text()}" for file in files)


class Pods:
    """The pods of a TrainJob on two nodes, one on each machine."""

    def __init__(self, folder, given):
        self.folder, self.given = folder, given
        manifest = (ROOT / "examples" / "kubernetes" / "trainjob.yaml").read_text()
        *_, job = yaml.safe_load_all(manifest)
        self.command = job["spec"]["trainer"]["command"]
        self.pods = {}
        (folder / "programs").mkdir()
        program = folder / "programs" / "torchtrain"
        program.write_text(f'#!/bin/sh\nexec {ROOT / "run_llama_train.sh"} "$@"\n')
        program.chmod(0o755)

    def start(self, number):
        paths = [self.folder / "programs", Path(sys.executable).parent, os.environ["PATH"]]
        variables = {
            "PATH": os.pathsep.join(map(str, paths)),
            "PET_NNODES": "2",
            "PET_NPROC_PER_NODE": "auto",
            "PET_NODE_RANK": str(number),
            "PET_MASTER_ADDR": "machine-0",
            "PET_MASTER_PORT": "29500",
            "MAX_RESTARTS": "10",
        }
        machine = shlex.split(ON_MACHINE.replace("%n", str(number)))
        with open(self.folder / f"pod-{number}.log", "ab") as log:
            self.pods[number] = subprocess.Popen(
                [*machine, *self.command, *options(self.given)],
                env=environment(2) | variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_for_step(self, step):
        is_alive = self.pods[0].poll
        wait_for_step(lambda: is_alive() is None, self.given["job.dump_folder"], step)

    def wait(self):
        return [self.pods[number].wait(timeout=180) for number in (0, 1)]

    def logs(self):
        files = sorted(self.folder.glob("pod-*.log"))
        return "".join(f"--- {file.name}\n{file.read_text()}" for file in files)


def run_job(folder, given):
    """Train as a Slurm job."""
    job = Job(folder, given)
    try:
        job.start()
        job.wait_for_step(3)
        lose_machine(1)
        print("machine 1 is lost in step 4; the job is ended, and starts again")
        job.end()
        (folder / "go-4").touch()
        job.start()
        job.wait_for_step(6)
        print("the job's time is up in step 7")
        job.process.send_signal(signal.SIGUSR2)
        time.sleep(0.5)
        (folder / "go-7").touch()
        status = job.process.wait(timeout=180)
        assert status == 128 + signal.SIGUSR2, status
        assert (folder / "requeued").read_text() == "12345\n"
        job.start()
        status = job.process.wait(timeout=180)
        assert status == 0, status
        for number in (0, 1):
            said = (folder / "logs" / "job-12345" / f"node-{number}.log").read_text()
            chosen = f"GLOO_SOCKET_IFNAME = cable-{number}, for this machine's name"
            assert said.count(chosen) == 3
    except BaseException:
        print(job.logs())
        raise
    finally:
        job.end()


def run_pods(folder, given):
    """Train as pods."""
    pods = Pods(folder, given)
    try:
        pods.start(0)
        pods.start(1)
        pods.wait_for_step(3)
        lose_machine(1)
        pods.pods[1].wait()
        print("machine 1 is lost in step 4; its pod is replaced")
        (folder / "go-4").touch()
        pods.start(1)
        pods.wait_for_step(6)
        print("the pod on machine 1 is drained in step 7; all pods end, and are replaced")
        pods.pods[1].send_signal(signal.SIGTERM)
        time.sleep(0.5)
        (folder / "go-7").touch()
        statuses = pods.wait()
        assert statuses == [128 + signal.SIGTERM] * 2, statuses
        pods.start(0)
        pods.start(1)
        statuses = pods.wait()
        assert statuses == [0, 0], statuses
    except BaseException:
        print(pods.logs())
        raise
    finally:
        lose_machine(0)
        lose_machine(1)


def check(folder, train_on_machines, data):
    """Train on the machines, and hold the run's lines against the untouched run's."""
    own = folder / train_on_machines.__name__
    own.mkdir()
    (own / "pause.py").write_text(PAUSE.replace("FOLDER", repr(str(own))))
    given = saving(data, own / "run", **{"experimental.custom_import": own / "pause.py"})
    train_on_machines(own, given | data)
    ours, theirs = curve(own / "run"), curve(folder / "untouched")
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert ours == theirs
    print(f"{STEPS} steps on two machines, one lost and one stop: the same to the bit")


def main():
    if os.geteuid() != 0:
        print("many_machines.py needs root, for network namespaces", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="machines-")))
        data = {
            "training.dataset": "text",
            "training.dataset_path": str(write_corpus(folder / "corpus")),
            "data.cache_folder": str(folder / "cache"),
            "checkpoint.interval": 2,
        }
        train(4, saving(data, folder / "untouched") | data)
        connect_machines(stack)
        check(folder, run_job, data)
        check(folder, run_pods, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
