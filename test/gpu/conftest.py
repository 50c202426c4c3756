"""The smoke run, `./test/gpu.sh`: which checks run here, and the summary that they end with.

A check is a function of the device and of how many there are, so that a dry run on two CPU ranks
tries out everything but the device. Its figures go to `record_property`.
"""

import os
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

DEVICE = os.environ.get("TORCHTRAIN_TEST_DEVICE", "")
"""What test/gpu.sh was given: cuda, or cpu for the dry run."""
CPU_RANKS = 2
FOLDER = Path(__file__).parent


@cache
def count_devices():
    """Return how many there are to test; end the run where the one asked for is not there."""
    if DEVICE == "cpu":
        return CPU_RANKS
    import torch  # here, so that a collection without the device costs next to nothing

    from torchtrain.tools.launch import visible_gpus

    count = visible_gpus()
    if count == 0:
        pytest.exit(
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU that it can use; "
            "TORCHTRAIN_VENV names a virtual environment with another PyTorch, "
            "--device cpu tries the checks out without a GPU",
            returncode=2,
        )
    return count


def pytest_collection_modifyitems(items):
    """Mark every check."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("cuda")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip a check that cannot run here."""
    if not DEVICE:
        pytest.skip("part of the smoke run, ./test/gpu.sh")
    needed = max(mark.kwargs.get("devices", 1) for mark in item.iter_markers("cuda"))
    if count_devices() < needed:
        pytest.skip(f"needs {needed} devices; here: {count_devices()}")


@pytest.fixture(scope="session")
def device():
    """The kind of device under test; in this process it is the first one."""
    import torch

    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def devices():
    """How many are under test."""
    return count_devices()


@pytest.fixture(scope="session")
def ranks(devices):
    """How many ranks a run has: a power of two, so that a batch of 16 can be shared."""
    return max(count for count in (1, 2, 4, 8) if count <= devices)


@pytest.fixture(autouse=True)
def memory_for_others():
    """Give back what a check has held of the device: the next one's runs are other processes."""
    yield
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Summary:
    """The lines of the checks as they end, and all of them again at the end, to be pasted."""

    def __init__(self, terminal):
        self.terminal = terminal
        self.lines = []
        self.skipped = Counter()

    def pytest_collection_finish(self, session):
        """Say first what is tested: who ends the run early has that too."""
        if session.items and count_devices():
            self.write_machine()

    def write_machine(self):
        """Print what an issue must name: commit, devices and versions."""
        from helpers.machine import describe_machine

        for line in [*describe_machine(DEVICE), ""]:
            self.terminal.write_line(line)

    def pytest_report_teststatus(self, report):
        """Count each check once, and keep pytest from printing a dot."""
        counts = report.when == "call" or report.outcome != "passed"
        return (report.outcome if counts else ""), "", ""

    def pytest_runtest_logreport(self, report):
        """Print the line of a check that has ended."""
        if report.when != "call" and report.outcome == "passed":
            return
        name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        if report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.skipped[name.partition("[")[0], reason] += 1
            return
        facts = [f"{key} {value}" for key, value in report.user_properties]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash is not None else report.longreprtext.strip()
            facts.append(said.split("\n")[0][:200])
        verdict = "FAILED" if report.failed else "ok"
        self.lines.append(f"{verdict:<8}{name} ({report.duration:.0f} s){name_facts(facts)}")
        self.terminal.write_line(self.lines[-1])

    def pytest_terminal_summary(self):
        """Print what can be pasted into an issue."""
        if not self.lines:
            return
        self.terminal.section("smoke run, to be pasted into an issue")
        self.write_machine()
        skipped = [
            f"skipped {name}{name_facts([reason])}{f' ({count} of them)' if count > 1 else ''}"
            for (name, reason), count in self.skipped.items()
        ]
        for line in [*self.lines, *skipped]:
            self.terminal.write_line(line)


def name_facts(facts):
    """Return what follows the name of a check."""
    return f": {'; '.join(facts)}" if facts else ""


def pytest_sessionstart(session):
    """Report checks by their figures, in the smoke run alone."""
    plugins = session.config.pluginmanager
    terminal = plugins.get_plugin("terminalreporter")
    if DEVICE and terminal is not None:
        plugins.register(Summary(terminal), "smoke-run")
