"""The mutation script and its table: a table whose texts are not in the code shows nothing."""

import argparse
import subprocess

import mutate
import pytest
from mutants import NAMED
from mutate import Copy, Judge, Mutant, all_mutants, faults_of, stages_of

CODE = "def double(x):\n    return 2 * x if x > 0 else x + x\n"


def test_each_mutant_can_be_made():
    """Where you change a line that is in mutants.py, change it there too."""
    assert not [fault for mutant in all_mutants() for fault in faults_of(mutant)]


def test_those_that_once_survived_come_first():
    first = [mutant.description for mutant in all_mutants()[: len(NAMED)]]
    assert sorted(first) == sorted(NAMED)


def test_the_tests_of_a_room_run_first():
    stages = stages_of("torchtrain/datasets/mixture.py")
    assert [(stage.paths, stage.marker) for stage in stages] == [
        (("test/datasets/test_mixture.py",), "not slow"),
        (("test/datasets",), "not slow"),
        (("test/datasets/test_mixture.py",), "slow"),
        (("test/datasets",), "slow"),
        (("test",), "not slow"),
        (("test",), "slow"),
    ]


@pytest.fixture
def tiny_tree(tmp_path, monkeypatch):
    """A tree with one function and one test that looks at one of its values."""
    root = tmp_path / "repository"
    (root / "test").mkdir(parents=True)
    (root / "code_of_mine.py").write_text(CODE)
    test = "from code_of_mine import double\n\ndef test_double():\n    assert double(3) == 6\n"
    (root / "test" / "test_double.py").write_text(test)
    (root / "test" / "test_broken.py").write_text("def test_broken():\n    assert False\n")
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["slow: x"]\n')
    monkeypatch.setattr(mutate, "ROOT", root)
    return root


@pytest.mark.slow
def test_a_mutant_is_killed_or_survives(tiny_tree, tmp_path):
    given = argparse.Namespace(level=2, workers=0, timeout=60, trust=False)
    subprocess.run(["git", "init", "-q"], cwd=tiny_tree, check=True)
    subprocess.run(["git", "add", "."], cwd=tiny_tree, check=True)
    judge = Judge(Copy(tmp_path / "copy"), given)
    seen = Mutant("code_of_mine.py", "a factor", "2 * x", "3 * x")
    unseen = Mutant("code_of_mine.py", "the other branch", "x + x", "x")
    killed = judge.judge(seen)
    assert (killed["result"], killed["test"]) == ("killed", "test/test_double.py::test_double")
    assert judge.judge(unseen)["result"] == "survived"
    assert (tmp_path / "copy" / "tree" / "code_of_mine.py").read_text() == CODE
    assert (tiny_tree / "code_of_mine.py").read_text() == CODE


def test_a_text_that_is_not_there_once_is_a_fault(tiny_tree):
    for old in ("4 * x", "x"):
        assert faults_of(Mutant("code_of_mine.py", "", old, "y"), tiny_tree)
    assert not faults_of(Mutant("code_of_mine.py", "", "x + x", "x"), tiny_tree)
