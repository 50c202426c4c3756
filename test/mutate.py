"""Break the code in one place at a time and see whether a test notices: `python test/mutate.py`.

Not part of CI: it takes hours. The breaks are the table in mutants.py. Each is made in a copy of
the tree, and the tests run in stages, those of the mutated file's room first, until one fails (the
mutant is "killed") or all stages have passed (it "survived": a test is missing, or the mutant does
no harm). Tests that fail without a mutant are named and left out. Results are appended to a file,
so that an interrupted run can be started again.

    python test/mutate.py --check                 does each text still occur exactly once?
    python test/mutate.py --list                  what is in the table, and the results so far
    python test/mutate.py --only train.py         mutants whose file or description contains this
    python test/mutate.py --level 2               the tests of each file's room alone
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mutants import MUTANTS, NAMED

ROOT = Path(__file__).resolve().parents[1]

# Test files or folders of a source file, by the longest prefix of its path: they run first.
ROOMS = {
    "train.py": (
        "test/test_training_by_hand.py",
        "test/test_bad_numbers.py",
        "test/test_metrics.py",
        "test/test_step_metrics.py",
        "test/test_training.py",
        "test/test_validation.py",
        "test/checkpoint/test_resume.py",
        "test/config/test_options.py",
        "test/test_stopping.py",
    ),
    "torchtrain/set_up.py": (
        "test/test_set_up.py",
        "test/test_training_by_hand.py",
        "test/config",
        "test/test_training.py",
    ),
    "torchtrain/bad_numbers.py": ("test/test_bad_numbers.py", "test/test_training_by_hand.py"),
    "torchtrain/exporting.py": ("test/checkpoint/test_last_save.py",),
    "torchtrain/resuming.py": (
        "test/test_resuming.py",
        "test/test_stopping.py",
        "test/test_training.py",
        "test/checkpoint/test_resume.py",
        "test/checkpoint",
    ),
    "torchtrain/config": ("test/config", "test/parallelisms", "test/datasets"),
    "torchtrain/config/plans.py": (
        "test/test_lr_scheduling.py",
        "test/test_validation.py",
        "test/config",
        "test/parallelisms",
    ),
    "torchtrain/catalog": (
        "test/catalog",
        "test/config",
        "test/models",
        "test/datasets",
        "test/parallelisms",
    ),
    "torchtrain/catalog/identity.py": ("test/catalog", "test/checkpoint/test_changed_model.py"),
    "torchtrain/checkpoint": ("test/checkpoint",),
    "torchtrain/datasets": ("test/datasets",),
    "torchtrain/datasets/read_ahead.py": ("test/datasets/test_streams.py", "test/test_stopping.py"),
    "torchtrain/datasets/packing.py": ("test/models/test_document_masking.py", "test/datasets"),
    "torchtrain/kernel_checks.py": ("test/test_kernel_checks.py",),
    "torchtrain/models": ("test/models", "test/test_training_by_hand.py"),
    "torchtrain/text_samples.py": ("test/test_text_samples.py",),
    "torchtrain/validation.py": (
        "test/test_validation.py",
        "test/test_training_by_hand.py",
        "test/test_stopping.py",
    ),
    "torchtrain/early_interrupt.py": ("test/test_early_interrupt.py", "test/test_stopping.py"),
    "torchtrain/stopping.py": ("test/test_stopping.py", "test/config/test_options.py"),
    "torchtrain/watchdog.py": ("test/test_watchdog.py", "test/config/test_options.py"),
    "torchtrain/hangs.py": ("test/test_hangs.py", "test/test_watchdog.py"),
    "torchtrain/attempts.py": (
        "test/test_launch_variables.py",
        "test/tools/test_restarts.py",
        "test/test_ranks.py",
    ),
    "torchtrain/launch_variables.py": ("test/test_launch_variables.py",),
    "torchtrain/orphans.py": ("test/test_orphans.py", "test/tools/test_launch.py"),
    "torchtrain/ranks.py": ("test/test_ranks.py", "test/test_training.py", "test/tools"),
    "torchtrain/devices.py": ("test/test_devices.py",),
    "torchtrain/optimizers": (
        "test/optimizers",
        "test/test_training_by_hand.py",
        "test/tools/test_parity.py",
    ),
    "torchtrain/parallelisms": (
        "test/parallelisms",
        "test/test_training_by_hand.py",
        "test/tools/test_parity.py",
    ),
    "torchtrain/parallelisms/replica_check.py": ("test/parallelisms/test_replica_check.py",),
    "torchtrain/parallelisms/fsdp.py": ("test/config/test_options.py", "test/parallelisms"),
    "torchtrain/tools": ("test/tools",),
    "torchtrain/tools/launch.py": ("test/test_devices.py", "test/tools"),
    "torchtrain/tools/preflight": (
        "test/tools/test_preflight_walk.py",
        "test/tools/test_preflight_memory.py",
    ),
    "torchtrain/tools/faults": ("test/tools/test_fault_campaign.py",),
    "torchtrain/utils.py": ("test/test_run_folder.py", "test"),
}
WHOLE_RUNS = ("test/test_training_by_hand.py", "test/test_training.py")
ANY_ROOM = ("test",)


@dataclass(frozen=True)
class Mutant:
    """One realistic mistake: `old`, which occurs once in `file`, becomes `new`."""

    file: str
    description: str
    old: str
    new: str

    @property
    def name(self) -> str:
        return f"{self.file}: {self.description}"


@dataclass(frozen=True)
class Stage:
    """Tests that run together: paths, and which of their parts."""

    level: int
    """1 to 4: tests of higher levels run later."""
    name: str
    paths: tuple[str, ...]
    marker: str


def all_mutants() -> list[Mutant]:
    """Return the table's mutants, those that once survived all tests first."""
    mutants = [Mutant(file, *rest) for file, rows in MUTANTS.items() for rest in rows]
    names = [mutant.description for mutant in mutants]
    assert len(set(names)) == len(names), "a description is given twice"
    return sorted(mutants, key=lambda mutant: mutant.description not in NAMED)


def faults_of(mutant: Mutant, root: Path = ROOT) -> list[str]:
    """Return why this mutant cannot be made in the tree at `root`; nothing if it can."""
    path = root / mutant.file
    if not path.exists():
        return [f"{mutant.name}: there is no such file"]
    count = path.read_text(encoding="utf-8").count(mutant.old)
    if count != 1:
        return [f"{mutant.name}: its text occurs {count} times"]
    return [] if mutant.old != mutant.new else [f"{mutant.name}: it changes nothing"]


def stages_of(file: str) -> list[Stage]:
    """Return the stages of tests for a mutant of `file`, those most likely to notice first."""
    prefixes = [prefix for prefix in ROOMS if file.startswith(prefix)]
    room = ROOMS[max(prefixes, key=len)] if prefixes else WHOLE_RUNS
    paths = tuple(path for path in room if (ROOT / path).exists()) or ANY_ROOM
    stages = [
        Stage(1, "quick tests of the room", paths, "not slow"),
        Stage(2, "slow tests of the room", paths, "slow"),
        Stage(3, "quick tests", ANY_ROOM, "not slow"),
        Stage(4, "slow tests", ANY_ROOM, "slow"),
    ]
    if (ROOT / own_tests(file)).exists():
        stages.insert(0, Stage(1, "quick tests of the file", (own_tests(file),), "not slow"))
        stages.insert(2, Stage(2, "slow tests of the file", (own_tests(file),), "slow"))
    return stages


def own_tests(file: str) -> str:
    """Return the test file that mirrors this one."""
    path = Path(file)
    return str(Path("test", *path.parts[1:-1], f"test_{path.name}"))


class Copy:
    """A copy of the working tree in which mutants are made and tests run."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        self.caches = folder / "caches"
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        )
        for name in listed.stdout.split("\0"):
            if name and (ROOT / name).is_file():
                target = self.root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((ROOT / name).read_bytes())
                target.chmod((ROOT / name).stat().st_mode)

    def run(self, stage: Stage, given: argparse.Namespace, left_out: list[str]) -> list[str]:
        """Run a stage's tests and return the first that fails: none if all pass.

        Raises:
            subprocess.TimeoutExpired: they have not ended in time.
        """
        cache = self.caches / "mutant"
        try:
            return self._pytest(stage, given, cache, ["-x", *left_out])
        finally:
            shutil.rmtree(cache, ignore_errors=True)  # a mutant may write wrong caches

    def failing(self, stage: Stage, given: argparse.Namespace) -> list[str]:
        """Run a stage's tests without a mutant and return all that fail."""
        return self._pytest(stage, given, self.caches / "clean", [])

    def _pytest(
        self, stage: Stage, given: argparse.Namespace, cache: Path, options: list[str]
    ) -> list[str]:
        # Without bytecode: it is taken for current where size and second of a change are the same.
        environment = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(cache),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no"]
        command += ["-n", str(given.workers), "--dist", "loadfile", "-m", stage.marker]
        # The test of the table itself fails for each mutant.
        command += ["--ignore", "test/test_mutants.py", *options, *stage.paths]
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=given.timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode in (0, 5):  # 5: no test has this marker
            return []
        lines = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        failed = [line.partition(" ")[2].partition(" - ")[0] for line in lines]
        return failed or [f"pytest ended with {process.returncode}: {output[-300:]}"]


class Results:
    """What became of each mutant, as lines of a file; the last one about a mutant counts."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found = {}
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.found[row["name"]] = row

    def of(self, mutant: Mutant) -> dict | None:
        """Return the result for this mutant, unless its text has changed since."""
        row = self.found.get(mutant.name)
        return row if row and (row["old"], row["new"]) == (mutant.old, mutant.new) else None

    def add(self, mutant: Mutant, **values: object) -> None:
        row = {"name": mutant.name, "old": mutant.old, "new": mutant.new, **values}
        self.found[mutant.name] = row
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def print_table(self, mutants: list[Mutant]) -> None:
        rows = [(mutant, self.of(mutant)) for mutant in mutants]
        for mutant, row in rows:
            result = row["result"] if row else "not run"
            by = row["test"] if row else ""
            print(f"{result:9} {mutant.name}  {by}")
        done = [row for _, row in rows if row]
        killed = sum(row["result"] != "survived" for row in done)
        print(f"{len(mutants)} mutants, {len(done)} run, {killed} killed", end="")
        print(f", {100 * killed / len(done):.1f} %" if done else "")


class Judge:
    """Makes mutants and runs tests until one fails."""

    def __init__(self, copy: Copy, given: argparse.Namespace) -> None:
        self.copy = copy
        self.given = given
        self.left_out: dict[Stage, list[str]] = {}

    def judge(self, mutant: Mutant) -> dict:
        """Make the mutant, run its stages until one fails, and undo it."""
        path = self.copy.root / mutant.file
        text = path.read_text(encoding="utf-8")
        started = time.monotonic()
        result, failed = "survived", []
        stages = [stage for stage in stages_of(mutant.file) if stage.level <= self.given.level]
        for stage in stages:
            left_out = self.failing_anyway(stage)
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            try:
                failed = self.copy.run(stage, self.given, left_out)
            except subprocess.TimeoutExpired:
                failed = ["a timeout"]
            finally:
                path.write_text(text, encoding="utf-8")
            if failed:
                result = "killed"
                break
        seconds = round(time.monotonic() - started)
        return {
            "result": result,
            "stage": stage.name,
            "test": "".join(failed[:1]),
            "seconds": seconds,
        }

    def failing_anyway(self, stage: Stage) -> list[str]:
        """Return pytest's options that leave out the tests which fail without a mutant."""
        if stage not in self.left_out:
            failed = [] if self.given.trust else self.copy.failing(stage, self.given)
            for name in failed:
                print(f"left out, since it fails without a mutant: {name}", flush=True)
            self.left_out[stage] = [text for name in failed for text in ("--deselect", name)]
        return self.left_out[stage]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only check that each can be made")
    parser.add_argument("--list", action="store_true", help="only print the table of results")
    parser.add_argument("--only", default="", help="mutants whose file or description has this")
    parser.add_argument("--again", action="store_true", help="run those that have a result too")
    parser.add_argument(
        "--survivors", action="store_true", help="run again those that survived, and only those"
    )
    parser.add_argument(
        "--level",
        type=int,
        default=4,
        help="1: the room's quick tests, 2: and slow ones, 3: all quick ones, 4: all",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest-xdist")
    parser.add_argument("--timeout", type=float, default=900, help="of a stage, in seconds")
    parser.add_argument(
        "--trust", action="store_true", help="do not run each stage without a mutant first"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "outputs" / "mutants.jsonl",
        help="the file of results (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> int:
    """Return 0 if all that were run have been killed, 1 if one survived, 2 for a faulty table."""
    given = parse_arguments()
    mutants = [mutant for mutant in all_mutants() if given.only in mutant.name]
    faults = [fault for mutant in mutants for fault in faults_of(mutant)]
    if given.check:
        descriptions = [mutant.description for mutant in all_mutants()]
        faults += [f"not in the table: {name}" for name in NAMED if name not in descriptions]
        print("\n".join([*faults, f"{len(mutants)} mutants, {len(faults)} faults"]))
        return 2 if faults else 0
    given.results.parent.mkdir(parents=True, exist_ok=True)
    results = Results(given.results)
    if not given.list:
        with tempfile.TemporaryDirectory() as folder:
            run(mutants, results, Copy(Path(folder)), given)
    results.print_table(mutants)
    print("\n".join(faults))
    survived = [m for m in mutants if (row := results.of(m)) and row["result"] == "survived"]
    return 1 if survived else 0


def run(mutants: list[Mutant], results: Results, copy: Copy, given: argparse.Namespace) -> None:
    """Run the mutants that have no result yet, or all those asked for."""
    judge = Judge(copy, given)
    for mutant in mutants:
        row = results.of(mutant)
        survived = row is not None and row["result"] == "survived"
        wanted = survived if given.survivors else row is None or given.again
        if not wanted or faults_of(mutant, copy.root):
            continue
        found = judge.judge(mutant)
        results.add(mutant, **found)
        print(f"{found['result']:9} {found['seconds']:4} s  {mutant.name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
