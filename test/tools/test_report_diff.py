"""Where two runs part, against differences worked out by hand."""

from helpers.runs import record, write_run

from torchtrain.config.schema import Config
from torchtrain.tools.report import main
from torchtrain.tools.report_data import read_runs
from torchtrain.tools.report_diff import Difference, compare


def test_differences_by_hand(tmp_path):
    a = [record(step, 4.0) for step in range(1, 6)]
    b = [record(step, loss) for step, loss in enumerate((4.0, 4.0, 4.0000000000000009, 5.0), 1)]
    b += [record(7, 1.0)]
    a[1]["val_loss"], b[1]["val_loss"] = 2.0, None
    a[3]["val_loss"] = b[3]["val_loss"] = 0.0
    runs = read_runs([write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)])
    found = {difference.key: difference for difference in compare(*runs)}
    assert found["loss"] == Difference("loss", steps=4, first=3, largest=0.2, at=4)
    assert found["val_loss"] == Difference("val_loss", steps=1, first=None, largest=0.0, at=4)
    assert found["tokens_per_second"].steps == 3
    assert "mfu" not in found
    assert list(found)[-4:] == ["memory_gib", "data_time_pct", "step_time_s", "tokens_per_second"]


def test_the_command_prints_them(tmp_path, capsys):
    a = write_run(tmp_path / "a", [record(step, 4.0) for step in (1, 2, 3)])
    b = write_run(tmp_path / "b", [record(step, 4.0 + step // 2) for step in (1, 2)])
    (b / "config.toml").write_text("[training]\nsteps = 7\n")
    assert main([str(a), str(b), "--diff"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"a: {a}", f"b: {b}"]
    assert f"training.steps: {Config().training.steps} | 7" in lines
    assert "2 steps in both: 1 to 2" in lines
    assert "1 step in a alone: 3 to 3" in lines
    assert "the losses part at step 2" in lines
    row = next(line.split() for line in lines if line.startswith("loss "))
    assert row == ["loss", "2", "step", "2", "2.00e-01", "2"]
    assert sorted(path.name for path in a.iterdir()) == ["config.toml", "metrics.jsonl"]


def test_equal_runs_and_runs_without_a_common_step(tmp_path, capsys):
    steps = {"a": 1, "b": 1, "c": 2}
    a, b, c = (write_run(tmp_path / name, [record(step)]) for name, step in steps.items())
    assert main([str(a), str(b), "--diff"]) == 0
    assert "the losses are the same to the bit" in capsys.readouterr().out
    assert main([str(a), str(c), "--diff"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "0 steps in both",
        "1 step in a alone: 1 to 1",
        "1 step in b alone: 2 to 2",
    ]
