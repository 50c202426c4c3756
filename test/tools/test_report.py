"""The command: what it says, its exit status, and what it leaves alone."""

import sys

import pytest
from helpers.runs import record, write_run

from torchtrain.tools.report import main


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_page_goes_into_the_first_runs_folder(tmp_path, capsys):
    runs = [write_run(tmp_path / name, [record(1), record(2)]) for name in "ab"]
    before = tree(tmp_path)
    assert main([str(run) for run in runs]) == 0
    assert (runs[0] / "report.html").is_file()
    assert f"{runs[0] / 'report.html'}: 6 charts of 2 runs" in capsys.readouterr().out
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before
    assert all(path.is_relative_to(runs[0]) for path in after.keys() - before.keys())


@pytest.mark.slow
def test_a_fault_is_one_message_and_status_2(tmp_path, capsys):
    run = write_run(tmp_path / "run", [record(1)])
    before = tree(tmp_path)
    assert main([str(run), str(tmp_path / "nowhere")]) == 2
    assert main([str(run), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert main([str(run), "--html", str(tmp_path)]) == 2
    output = capsys.readouterr()
    first, second, third = output.err.splitlines()
    assert first == f"error: {tmp_path / 'nowhere'}: no such folder"
    page = tmp_path / "no" / "page.html"
    refused = "cannot be written; --html names another place"
    assert second == f"error: {page} {refused}: No such file or directory"
    assert third == f"error: {tmp_path} {refused}: Is a directory"
    assert output.out == ""
    assert tree(tmp_path) == before


@pytest.mark.parametrize("arguments", [["a", "--diff"], ["a", "b", "--diff", "--html", "c"], []])
def test_a_wrong_command_line_is_refused(arguments):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2


def test_a_missing_package_names_the_extra(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", [record(1)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(run)]) == 2
    assert "extra `report`" in capsys.readouterr().err
    assert not (run / "report.html").exists()
    other = write_run(tmp_path / "other", [record(1)])
    assert main([str(run), str(other), "--diff"]) == 0, "text needs no pictures"
