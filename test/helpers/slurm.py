"""A stand-in for Slurm's srun and scontrol, whose nodes are processes of this machine.

This file is both, by the name that it is run under. As the real ones do:

- srun starts a task per node, each with its SLURM_NODEID, writes their output to --output (%n: the
  node), passes SIGUSR2 on to every process of every task, kills the tasks at SIGTERM, and returns
  the highest exit status, or 128 + n where signal n ended a task. A task has one core, whatever
  the job's have, unless SRUN_CPUS_PER_TASK says otherwise.
- scontrol shows the hosts of a list, one without brackets, and notes which jobs it queues again.

Sources: https://slurm.schedmd.com/srun.html, and src/srun/libsrun/srun_job.c for SIGTERM.

NODE_PREFIX: a command for each node, with %n for its number, that the task is run by, such as
`ip netns exec node%n`.
"""

import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def descendants(pid):
    """Process ids below one, itself included."""
    children = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def send(number, tasks):
    for task in tasks:
        for pid in descendants(task.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def srun(arguments):
    options = {}
    while arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).partition("=")
        options[name] = value
    tasks = []
    signal.signal(signal.SIGUSR2, lambda number, _: send(number, tasks))
    signal.signal(signal.SIGTERM, lambda number, _: send(signal.SIGKILL, tasks))
    for node in map(str, range(int(os.environ["SLURM_JOB_NUM_NODES"]))):
        prefix = shlex.split(os.environ.get("NODE_PREFIX", "").replace("%n", node))
        own = {
            "SLURM_NODEID": node,
            "SLURM_PROCID": node,
            "SLURM_CPUS_PER_TASK": os.environ.get("SRUN_CPUS_PER_TASK", "1"),
        }
        with open(options["--output"].replace("%n", node), "ab") as log:
            tasks.append(
                subprocess.Popen(
                    [*prefix, *arguments],
                    env=os.environ | own,
                    stdout=log,
                    stderr=log,
                )
            )
    statuses = [task.wait() for task in tasks]
    return max(128 - status if status < 0 else status for status in statuses)


def scontrol(arguments):
    if arguments[:2] == ["show", "hostnames"]:
        print("\n".join(arguments[2].split(",")))
    elif arguments[0] == "requeue":
        with open(os.environ["REQUEUED"], "a") as file:
            print(arguments[1], file=file)
    return 0


def install(folder):
    """Put both into a folder that goes first on the PATH."""
    folder.mkdir()
    for name in ("srun", "scontrol"):
        script = folder / name
        script.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
        script.chmod(0o755)
    return folder


if __name__ == "__main__":
    command = srun if Path(sys.argv[0]).name == "srun" else scontrol
    sys.exit(command(sys.argv[1:]))
