"""Check the config once, then start the ranks with torchrun's own launcher: what run_llama_train.sh runs.

    python -m torchtrain.tools.launch [trainer options]

Environment: NGPU (processes a node; default every visible GPU, or 2 on a machine without), CONFIG_FILE (default
train_configs/debug_model.toml), LOG_RANK (ranks whose lines are shown, default 0). For several nodes set torchrun's
own variables PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT (or PET_RDZV_BACKEND, PET_RDZV_ENDPOINT,
PET_RDZV_ID), or the same names without PET_: https://docs.pytorch.org/docs/stable/elastic/run.html

Exit status: 0, or that of the rank that failed first (2: the user can mend it; 128 + n: ended by signal n).
"""

import logging
import os
import sys
from pathlib import Path

from torchtrain.config.options import print_help, wants_help
from torchtrain.config_manager import parse_or_exit
from torchtrain.utils import cores

ROOT = Path(__file__).resolve().parents[2]
RENDEZVOUS_VARIABLES = (
    "NNODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RDZV_BACKEND",
    "RDZV_ENDPOINT",
    "RDZV_ID",
)
PROCESSES_WITHOUT_GPU = 2  # enough to show a layout; one process is the faster way to use a CPU

# glibc hands large blocks back to the kernel at once, and every step then faults its pages in again. Keeping them makes
# a CPU step up to 1.2 times as fast, at the price of resident memory staying at its peak.
#
# OpenMP's threads spin while they wait for each other; on a core that another program wants as well, a step then takes
# up to 30 times as long. After a thousand turns they go to sleep instead, which on an idle machine costs nothing.
SPIN_COUNT = "1000"
GLIBC_TUNABLES = {
    "glibc.malloc.hugetlb": 1,
    "glibc.malloc.mmap_threshold": 4 * 2**30,
    "glibc.malloc.trim_threshold": 16 * 2**30,
    "glibc.malloc.top_pad": 256 * 2**20,
}


def main(trainer_args: list[str]) -> int:
    """Check, launch, wait; the exit status as above."""
    for name in RENDEZVOUS_VARIABLES:
        if name in os.environ:
            os.environ.setdefault(f"PET_{name}", os.environ[name])
    nodes = os.environ.get("PET_NNODES", "1").split(":")[-1]
    if not any(arg.split("=")[0] == "--job.config_file" for arg in trainer_args):
        trainer_args = ["--job.config_file", default_config_file(), *trainer_args]
    if wants_help(trainer_args):
        print_help()
        return 0
    gpus = visible_gpus()
    processes = os.environ.get("NGPU") or str(gpus or PROCESSES_WITHOUT_GPU)
    if not (processes.isdigit() and int(processes) > 0 and nodes.isdigit() and int(nodes) > 0):
        print(
            f"NGPU = {processes!r}, NNODES = {nodes!r}: each must be a positive whole number",
            file=sys.stderr,
        )
        return 2
    spoken = os.environ.get("LOG_RANK", "0")
    ranks = int(processes) * int(nodes)
    if not all(rank.strip().isdigit() and int(rank) < ranks for rank in spoken.split(",")):
        print(
            f"LOG_RANK = {spoken!r}: must be ranks from 0 to {ranks - 1}, with commas",
            file=sys.stderr,
        )
        return 2
    if gpus and int(processes) > gpus:
        print(
            f"NGPU = {processes}, but only {gpus} GPUs are visible to this process", file=sys.stderr
        )
        return 2
    parse_or_exit(trainer_args, ranks)
    return launch(int(processes), trainer_args, on_cpu=not gpus)


def default_config_file() -> str:
    """CONFIG_FILE as given, or found from the repository's root when it is not there from the working directory."""
    given = os.environ.get("CONFIG_FILE", "train_configs/debug_model.toml")
    return str(ROOT / given) if not Path(given).exists() and (ROOT / given).exists() else given


def visible_gpus() -> int:
    """Accelerators that PyTorch can use and has a communication backend for. Costs nothing where there is no driver."""
    if not any(
        Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/accel")
    ):
        return 0
    import torch

    from torchtrain.ranks import usable_accelerator

    return torch.accelerator.device_count() if usable_accelerator() is not None else 0


def launch(processes: int, trainer_args: list[str], on_cpu: bool) -> int:
    """Start `processes` ranks on this node and wait for them."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    if on_cpu:
        tunables = ":".join(f"{name}={value}" for name, value in GLIBC_TUNABLES.items())
        os.environ.setdefault("GLIBC_TUNABLES", tunables)
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )

    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # the ranks say what failed
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    options = [f"--nproc-per-node={processes}"]
    if not any(f"PET_{name}" in os.environ for name in RENDEZVOUS_VARIABLES):
        options.append("--standalone")
    try:
        run(get_args_parser().parse_args([*options, str(ROOT / "train.py"), *trainer_args]))
    except ChildFailedError as failed:
        # Times count whole seconds; a rank that was killed comes before those that then failed for want of it.
        rank, failure = min(
            failed.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp)
        )
        if failure.exitcode < 0:
            print(
                f"rank {rank} was ended by {failure.signal_name()}; the others were stopped",
                file=sys.stderr,
            )
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
