"""Check the config once, then start the ranks as torchrun does: what run_llama_train.sh runs.

    python -m torchtrain.tools.launch [trainer options]

Environment: NGPU (processes per node; default every visible GPU, or 2 on a machine without),
CONFIG_FILE (default train_configs/debug_model.toml), LOG_RANK (ranks whose lines are shown, default
0), MAX_RESTARTS (how often the ranks are started again after one has died, default 0), CHECK_MEMORY
(0: start also what surely does not fit into the memory of NVIDIA's GPUs, default 1). For several
nodes set torchrun's own variables PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT (or
PET_RDZV_BACKEND, PET_RDZV_ENDPOINT, PET_RDZV_ID), or the same names without PET_:
https://docs.pytorch.org/docs/stable/elastic/run.html
With NNODES=MIN:MAX the run goes on while nodes are lost and come back.

Exit status: 0, or that of the rank that failed first, in the last attempt (2: a user error;
75: the end of its time; 128 + n: ended by signal n).
"""

import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torchtrain.early_interrupt import end_on_interrupt, end_watch
from torchtrain.imports import begin_imports, end_imports

if __name__ == "__main__":
    end_on_interrupt(before="the ranks started")  # while the imports below are made
    begin_imports()

from torchtrain.errors import PeerFault, UserError
from torchtrain.installation import PROGRAM
from torchtrain.orphans import LAUNCHER_PID
from torchtrain.stopping import STARTED
from torchtrain.tools.interfaces import choose_interface
from torchtrain.tools.nodes import Nodes, read_nodes
from torchtrain.tools.standby import Standbys
from torchtrain.utils import count_cores, wants_help

if TYPE_CHECKING:
    from torchtrain.config_manager import JobConfig

RENDEZVOUS_VARIABLES = (
    "NNODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RDZV_BACKEND",
    "RDZV_ENDPOINT",
    "RDZV_ID",
)
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR2")
"""What the launcher passes on to the ranks: torchrun's own, and that of Slurm's --signal=USR2. Not
SIGHUP where whoever started it has it ignore that, as `nohup` does."""
NVIDIA = "/dev/nvidiactl"
DRIVERS = (NVIDIA, "/dev/kfd", "/dev/dxg", "/dev/accel")
CPP_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
PROCESSES_WITHOUT_GPU = 2  # enough to show a layout; one process is the faster way to use a CPU

# OpenMP's threads spin while they wait for each other; on a core that another program wants as
# well, a step then takes up to 30 times as long. After a thousand turns they go to sleep instead,
# which on an idle machine costs nothing.
SPIN_COUNT = "1000"
# glibc returns large blocks to the kernel at once, and every step then faults its pages in again.
# Keeping them makes a CPU step up to 1.2 times as fast, at the price of resident memory staying at
# its peak.
GLIBC_TUNABLES = {
    "glibc.malloc.hugetlb": 1,
    "glibc.malloc.mmap_threshold": 4 * 2**30,
    "glibc.malloc.trim_threshold": 16 * 2**30,
    "glibc.malloc.top_pad": 256 * 2**20,
}

ALLOCATOR_VARIABLES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
)
"""What sets PyTorch's memory allocator, and its older names; the first that is set counts."""


def main(trainer_args: list[str]) -> int:
    """Check, launch, wait. Returns the exit status described above."""
    if not any(arg.split("=")[0] == "--job.config_file" for arg in trainer_args):
        config_file = os.environ.get("CONFIG_FILE", "train_configs/debug_model.toml")
        trainer_args = ["--job.config_file", config_file, *trainer_args]
    if wants_help(trainer_args):
        from torchtrain.config.options import print_help

        print_help()
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_watch()
    for name in (*RENDEZVOUS_VARIABLES, "RDZV_CONF"):
        if name in os.environ:
            os.environ.setdefault(f"PET_{name}", os.environ[name])
    try:
        restarts = count_restarts()
        gpus = visible_gpus()
        nodes = read_nodes(os.environ)
        processes = count_processes(gpus)
        set_up_environment(processes, os.environ, on_cpu=gpus == 0)
        program = [str(PROGRAM / "train.py"), *trainer_args]
        first_rank = nodes.rank * processes
        with closing(Standbys([sys.executable, "-u", *program], processes)) as standbys:
            may_wait = "PYTHON_EXEC" not in os.environ  # torchrun's: ranks start by another command
            if may_wait:
                # Nothing takes as long as a rank's imports, so the first begins its own at once.
                # No other does: a config that is refused may be for thousands of ranks.
                standbys.start(first_rank, at_most=1)
            config, usable = read_and_check(trainer_args, nodes, processes, restarts, gpus)
            if may_wait:
                standbys.start(first_rank)
            return meet(config, nodes, usable, restarts, program, standbys)
    except UserError as fault:
        print(fault, file=sys.stderr)
        return 2
    except PeerFault as fault:
        print(fault, file=sys.stderr)
        return 2 if fault.is_user_error else 1
    except KeyboardInterrupt:
        print("stopped by SIGINT before the ranks started", file=sys.stderr)
        return 128 + signal.SIGINT


def read_and_check(
    trainer_args: list[str], nodes: Nodes, processes: int, restarts: int, gpus: int
) -> tuple["JobConfig", list[int]]:
    """Return the config, and the numbers of nodes that can share it. A refused one ends this."""
    # Beside the imports of the first rank: it takes a sixth of a second.
    from torchtrain.tools.launch_checks import check_config, check_log_rank, find_usable

    with silent_torch():  # a module of the user's own may import it
        usable = find_usable(trainer_args, nodes, processes)
        world_size = processes * usable[-1]
        check_log_rank(world_size)
        # Not under WSL, where a GPU's tensors may go on in the host's memory.
        on_nvidia = gpus > 0 and Path(NVIDIA).exists()
        config = check_config(trainer_args, world_size, nodes, restarts, on_nvidia=on_nvidia)
    return config, usable


def count_processes(gpus: int) -> int:
    """Return NGPU, by default every visible GPU.

    Raises:
        UserError: it is not a number of processes that this node can run.
    """
    given = os.environ.get("NGPU") or str(gpus or PROCESSES_WITHOUT_GPU)
    if not given.isdigit() or int(given) == 0:
        raise UserError(f"NGPU = {given!r}: must be a whole number, at least 1")
    if gpus and int(given) > gpus:
        raise UserError(f"NGPU = {given}, but only {gpus} GPUs are visible to this process")
    return int(given)


def count_restarts() -> int:
    """Return MAX_RESTARTS, how often the ranks may be started again after a failure.

    Raises:
        UserError: it is not a number of times.
    """
    given = os.environ.get("PET_MAX_RESTARTS") or os.environ.get("MAX_RESTARTS") or "0"
    if not given.isdigit():
        raise UserError(f"MAX_RESTARTS = {given!r}: must be a whole number, at least 0")
    return int(given)


def visible_gpus() -> int:
    """Count the accelerators that PyTorch can use and has a communication backend for.

    Say so where it cannot use the machine's. Costs nothing where there is no driver.
    """
    if not any(Path(driver).exists() for driver in DRIVERS):
        return 0
    import_torch()
    import torch

    from torchtrain.devices import describe_unused_gpus, usable_accelerator

    if usable_accelerator() is not None:
        return torch.accelerator.device_count()
    if unused := describe_unused_gpus():
        print(f"warning: {unused}", file=sys.stderr)
    return 0


def import_torch() -> None:
    """Import torch so that its C++ part does not warn in this process; the ranks' warns as ever."""
    with silent_torch():
        importlib.import_module("torch")


@contextmanager
def silent_torch() -> Iterator[None]:
    """Let torch, if it is imported meanwhile, not warn in this process.

    What it says at length, such as of a store whose node is lost, we say in a line.
    """
    is_set = CPP_LOG_LEVEL in os.environ
    os.environ.setdefault(CPP_LOG_LEVEL, "FATAL")  # which is read once, at the import
    try:
        yield
    finally:
        if not is_set:
            del os.environ[CPP_LOG_LEVEL]


def meet(
    config: "JobConfig",
    nodes: Nodes,
    usable: list[int],
    restarts: int,
    program: list[str],
    standbys: Standbys,
) -> int:
    """Meet the other nodes, give each its ranks, wait. Returns the exit status.

    Raises:
        UserError: node 0 cannot be where it should be.
        PeerFault: another node does not come.
    """
    os.environ[STARTED] = str(time.time())
    logging.disable(logging.ERROR)  # torchrun's own: the ranks say what failed
    import_torch()
    from torchtrain.tools import elastic
    from torchtrain.tools.meeting import all_nodes, require_free_port

    end_imports()
    heard = [name for name in SIGNALS if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN]
    options = [
        f"--nproc-per-node={standbys.count}",
        f"--max-restarts={restarts}",
        f"--signals-to-handle={','.join(heard)}",
    ]
    timeout_s = config.comm.init_timeout_seconds
    if nodes.is_elastic:
        options += [f"--rdzv-backend={elastic.BACKEND}", f"--rdzv-endpoint={nodes.endpoint}"]
        digest = elastic.digest_config(config, standbys.count)
        meeting = elastic.ElasticMeeting(nodes, usable, restarts, timeout_s, digest)
        with elastic.registered(meeting) as leave:
            status = start_ranks([*options, *program], standbys)
            leave(status)
            return status
    if not any(f"PET_{name}" in os.environ for name in RENDEZVOUS_VARIABLES):
        options.append("--standalone")
    elif nodes.static and nodes.count == 1:
        require_free_port(nodes)
    with all_nodes(nodes, timeout_s) as ways:
        choose_interface(nodes, ways, os.environ)
        return start_ranks([*options, *program], standbys)


def start_ranks(command: list[str], standbys: Standbys) -> int:
    """Start this node's ranks as torchrun does, wait for them, and return the exit status.

    Args:
        command: torchrun's options, the program and its own.
        standbys: who become the ranks.

    Raises:
        PeerFault: the nodes did not meet.
    """
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import get_args_parser, run

    from torchtrain.tools.elastic import RunOver
    from torchtrain.tools.restarts import Outcome, say, use_agent

    outcome = Outcome()
    use_agent(outcome, standbys)
    try:
        with standbys.errors.passed_on():
            run(get_args_parser().parse_args(command))
    except ChildFailedError:
        return outcome.report()
    except SignalException as stopped:
        return outcome.find_status(int(stopped.sigval))
    except RunOver as over:
        say(str(over))
        return over.status
    except (RendezvousError, DistNetworkError) as fault:
        raise PeerFault(f"the nodes did not meet: {fault}") from fault
    return 0


def set_up_environment(
    processes: int, environment: MutableMapping[str, str], *, on_cpu: bool
) -> None:
    """Set what the ranks inherit; what the user has set stays."""
    environment.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // processes)))
    if on_cpu:
        tunables = ":".join(f"{name}={value}" for name, value in GLIBC_TUNABLES.items())
        environment.setdefault("GLIBC_TUNABLES", tunables)
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    elif Path(NVIDIA).exists() and environment.keys().isdisjoint(ALLOCATOR_VARIABLES):
        # Segments that grow leave no gaps that no tensor fits into. Not under WSL, where the driver
        # fails at the first of them (https://github.com/pytorch/pytorch/issues/192330).
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    if "PYTHON_EXEC" not in environment:  # torchrun's; such a wrapper can be the ranks' parent
        environment[LAUNCHER_PID] = str(os.getpid())
    paths = [str(PROGRAM), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
