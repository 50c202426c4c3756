"""Start real runs from tests, by the launcher as users do, on a tiny model and a made-up corpus."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from torchtrain.config.layout import BatchPlan
from torchtrain.datasets.loader import DataLoader

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240

TINY = {
    "job.config_file": str(ROOT / "train_configs" / "debug_model.toml"),
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.ffn_hidden_dim": 64,
    "training.seq_len": 32,
    "training.local_batch_size": 8,
    "training.global_batch_size": 8,
    "training.steps": 4,
    "training.mixed_precision_param": "float32",
    "metrics.enable_tensorboard": False,
    "checkpoint.enable": False,
    "compile.enable": False,
    "text_samples.prompts": "none",
}


def write_corpus(folder: Path, documents: int = 40, seed: int = 0) -> Path:
    """Write text files with enough structure for a loss to fall, always the same for one seed."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(60)]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        sentences = (" ".join(rng.choices(words, k=rng.randint(4, 12))) for _ in range(30))
        (folder / f"{number:03}.txt").write_text(".\n".join(sentences), encoding="utf-8")
    return folder


def data_loader(
    dataset, global_batch: int, rank: int, degree: int, microbatch: int, *more, **options
) -> DataLoader:
    """Build the loader of one of `degree` data-parallel ranks; sizes count sequences."""
    accumulation, rest = divmod(global_batch, degree * microbatch)
    assert rest == 0
    return DataLoader(
        dataset, BatchPlan(global_batch, microbatch, accumulation, degree), rank, *more, **options
    )


def options(overrides: dict) -> list[str]:
    """Return TINY with `overrides` over it as command-line options; None leaves one out."""
    merged = {**TINY, **overrides}
    pairs = [
        (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
        for key, value in merged.items()
        if value is not None
    ]
    return [text for pair in pairs for text in pair]


def environment(ranks: int, **extra: str) -> dict[str, str]:
    """Return the environment of a run: one thread per rank, nothing of a launcher around it.

    What Python compiles is kept, if only for the next start, which takes a fifth less then.
    """
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PET_", "TORCHELASTIC", "GLIBC_TUNABLES"))
    }
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NNODES",
        "CONFIG_FILE",
        "LOG_RANK",
        "CHECK_MEMORY",
        "PYTHONDONTWRITEBYTECODE",
    ):
        kept.pop(name, None)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]  # a bare image's packages may be there
    kept["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return {**kept, "NGPU": str(ranks), "OMP_NUM_THREADS": "1", **extra}


def start(ranks: int, overrides: dict, **extra: str) -> subprocess.Popen:
    """Start a run in the background, in its own process group so that it can be ended whole."""
    return subprocess.Popen(
        [sys.executable, "-m", "torchtrain.tools.launch", *options(overrides)],
        env=environment(ranks, **extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@contextmanager
def running(ranks: int, overrides: dict, **extra: str):
    """Start a run as a context: whatever is left of it is killed at the end."""
    process = start(ranks, overrides, **extra)
    try:
        yield process
    finally:
        kill_group(process)
        process.wait()
        process.stdout.close()


def find_free_port() -> int:
    """Return a port that no program has, and that none can get before it is used.

    It is below those that the kernel deals out to connections; xdist's workers look at different
    ones.
    """
    dealt_out = Path("/proc/sys/net/ipv4/ip_local_port_range")
    end = int(dealt_out.read_text().split()[0]) if dealt_out.exists() else 32768
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.SystemRandom().randrange(10000 + worker % 16, end, 16)
        with suppress(OSError), socket.create_server(("", port)):
            return port


def kill_group(process: subprocess.Popen) -> None:
    """Send SIGKILL to the launcher and all its ranks, and nobody else."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def ranks_of(process):
    """Process ids of the launcher's children, in rank order of their environment."""
    children = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                variables = (entry / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue
            rank = [v for v in variables if v.startswith(b"RANK=")]
            if parent == process.pid and rank:
                children[int(rank[0][5:])] = int(entry.name)
    return children


def launched(ranks: int, overrides: dict, expect: int = 0, **extra: str) -> str:
    """Run to the end and return what was printed."""
    with running(ranks, overrides, **extra) as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == expect, (
        f"exit status {process.returncode}, expected {expect}:\n{output}"
    )
    return output


def metrics(folder: Path) -> list[dict]:
    """Return the logged lines of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(alive, folder: Path, step: int, timeout: int = 120) -> None:
    """Wait until a run has logged a step; `alive()` says whether it still runs."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert alive(), f"ended before step {step}"
        path = folder / "metrics.jsonl"
        if path.exists() and any(
            json.loads(line)["step"] >= step
            for line in path.read_text().splitlines(True)
            if line.endswith("\n")
        ):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def run_with_a_stopped_rank(ranks: int, overrides: dict) -> tuple[int, str]:
    """Return exit status and output of a run whose last rank is stopped after its second step.

    From then on `comm.train_timeout_seconds` holds.
    """
    with running(ranks, {**overrides, "training.steps": 100000}) as process:
        wait_for_step(lambda: process.poll() is None, Path(overrides["job.dump_folder"]), 2)
        os.kill(ranks_of(process)[ranks - 1], signal.SIGSTOP)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output
