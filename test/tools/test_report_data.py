"""What a report reads of a run's folder: torn, resumed, unfinished, or not a run at all."""

import json

import pytest
from helpers.runs import record, write_lines, write_run

from torchtrain.config.schema import Config
from torchtrain.config.toml import to_toml
from torchtrain.errors import UserError
from torchtrain.tools.report_data import differences, read_runs


def losses(folder):
    return read_runs([folder])[0].series("loss")


def test_a_torn_last_line_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", [record(1, 8.0), record(2, 7.0)])
    whole = json.dumps(record(3, 6.0, note="größer"), ensure_ascii=False).encode()
    for length in range(1, len(whole)):
        write_lines(run / "metrics.jsonl", [record(1, 8.0), record(2, 7.0)])
        with open(run / "metrics.jsonl", "ab") as file:
            file.write(whole[:length])
        assert losses(run) == ([1, 2], [8.0, 7.0])


def test_a_resumed_run_does_not_double_back(tmp_path):
    # Stopped after step 6, resumed from 2, going on at step 4; steps 5 and 6 come again.
    first = [record(step, 8.0 - step) for step in range(1, 7)]
    again = [record(step, 80.0 - step) for step in (3, 4)]
    run = write_run(tmp_path / "run", first + again)
    write_lines(run / "metrics.superseded.jsonl", [record(5, 50.0)])
    assert losses(run) == ([1, 2, 3, 4], [7.0, 6.0, 77.0, 76.0])
    # The same step twice: the last one counts.
    write_lines(run / "metrics.jsonl", [record(1, 8.0), record(2, 7.0), record(2, 6.5)])
    assert losses(run) == ([1, 2], [8.0, 6.5])


def test_samples_of_a_resumed_run(tmp_path):
    def sample(step, prompt, text):
        return {"step": step, "prompt": prompt, "text": text}

    written = [sample(5, "a", "x"), sample(5, "b", "y"), sample(10, "a", "old")]
    resumed = [sample(5, "a", "again")]
    run = write_run(tmp_path / "run", [record(1)], samples=written)
    assert read_runs([run])[0].samples == written
    write_lines(run / "samples.jsonl", written + resumed)
    assert read_runs([run])[0].samples == resumed


def test_null_is_no_number(tmp_path):
    lines = [record(1), record(2, mfu=0.25), record(3, mfu=float("nan")), record(4, mfu=True)]
    run = read_runs([write_run(tmp_path / "run", lines)])[0]
    assert run.series("mfu") == ([2], [0.25])
    assert run.series("tokens_per_second")[0] == [2, 3, 4]


def test_equal_names_are_told_apart(tmp_path):
    folders = [tmp_path / "a" / "x" / "out", tmp_path / "b" / "x" / "out", tmp_path / "c"]
    runs = read_runs([write_run(folder, [record(1)]) for folder in folders])
    *equal, other = [run.label for run in runs]
    assert equal == ["a/x/out", "b/x/out"]
    assert other.endswith("/c")
    assert read_runs(folders[:1])[0].label == "out"


def test_merged_configs_are_compared(tmp_path):
    """A file that leaves a key out means its default, which is no difference."""
    whole = to_toml(Config())
    merged = write_run(tmp_path / "merged", [record(1)], whole)
    short = write_run(tmp_path / "short", [record(1)], '[job]\ndump_folder = "short"\n')
    other = write_run(tmp_path / "other", [record(1)], "[optimizer]\nlr = 0.5\n")
    unknown = write_run(tmp_path / "unknown", [record(1)], config=None)
    assert differences(read_runs([merged, short])) == []
    default = json.dumps(Config().optimizer.lr)
    rows = differences(read_runs([merged, other, unknown]))
    assert rows == [("optimizer.lr", [default, "0.5", "?"])]


def test_facts_are_compared(tmp_path):
    digests = ["corpus=" + 64 * digit for digit in "12"]
    runs = [
        write_run(
            tmp_path / str(ranks),
            [record(1)],
            facts={
                "torch": "2.13.0",
                "first_step": ranks,
                "degrees": {"tp": ranks, "cp": 1},
                "data_fingerprint": digest,
            },
        )
        for ranks, digest in zip((1, 2), digests, strict=True)
    ]
    assert differences(read_runs(runs)) == [
        ("run.json: degrees.tp", ["1", "2"]),
        ("run.json: data_fingerprint", [f'"corpus={12 * digit}…"' for digit in "12"]),
    ]


def break_folder(tmp_path, fault):
    run = write_run(tmp_path / "run", [record(1)])
    if fault == "missing":
        return tmp_path / "nowhere"
    if fault == "a file":
        return run / "metrics.jsonl"
    if fault == "no metrics":
        (run / "metrics.jsonl").unlink()
    elif fault == "empty":
        (run / "metrics.jsonl").write_text("")
    elif fault == "torn":
        (run / "metrics.jsonl").write_text('{"step": 1, "lo')
    elif fault == "config":
        (run / "config.toml").write_text("[optimizer")
    elif fault == "facts":
        (run / "run.json").write_text("[1]")
    return run


FAULTS = {
    "missing": "nowhere: no such folder",
    "a file": "metrics.jsonl: no such folder",
    "no metrics": "run has no metrics.jsonl: it is not the folder of a run",
    "empty": "metrics.jsonl holds no step: the run has not logged its first one yet",
    "torn": "metrics.jsonl holds no step",
    "config": "config.toml is not TOML: ",
    "facts": "run.json is not a JSON object",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_run_is_one_message(tmp_path, fault):
    with pytest.raises(UserError) as raised:
        read_runs([break_folder(tmp_path, fault)])
    assert FAULTS[fault] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_run_given_twice_is_refused(tmp_path):
    run = write_run(tmp_path / "run", [record(1)])
    with pytest.raises(UserError, match="run is given twice"):
        read_runs([run, tmp_path / "." / "run"])
