"""What the user sees: the lines, metrics.jsonl, TensorBoard; and the run's folder."""

import json
import logging
import re

import pytest

from torchtrain.config.schema import Metrics
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.logging_utils import init_logging, logger
from torchtrain.metrics import MetricsLogger, StepSummary, Stopwatch
from torchtrain.run_folder import RunFolder


class FixedStopwatch(Stopwatch):
    """A step that took this long."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def elapsed(self):
        return self.seconds


def summary(step, **changes):
    values = {
        "step": step,
        "loss": 7.0 - step / 10,
        "max_loss": 8.0,
        "grad_norm": 1.25,
        "lr": 8e-4,
        "tokens_seen": 100 * step,
        "memory_gib": 0.5,
        "data_time_s": 0.1,
    }
    return StepSummary(**{**values, **changes})


def metrics_logger(folder, metrics=None, *, resumed_step=0, peak_flops=None, log_lr=True):
    config = JobConfig(metrics=metrics or Metrics())
    config.training.steps, config.lr_scheduler.log_lr = 6, log_lr
    facts = {"first_step": resumed_step + 1, "tokens_per_step": 100}
    return MetricsLogger(config, folder, facts, flops_per_token=10.0, peak_flops=peak_flops)


@pytest.fixture
def lines(capsys):
    yield lambda: capsys.readouterr().out.splitlines()
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


def log(metrics, steps, **changes):
    init_logging()  # here, since pytest gives each phase of a test a stdout of its own
    for step in steps:
        # The first step of a process takes long: it warms up.
        metrics.log(
            summary(step, **changes),
            FixedStopwatch(50.0 if step == metrics.first_step else 2.0),
            {},
        )
    metrics.close()


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_step_with_everything_in_it(tmp_path, lines):
    log(metrics_logger(tmp_path), range(1, 4))
    first, second, third = lines()
    assert "tok/s" not in first, "the first step's warm-up is no throughput"
    for text in (
        "step 2/6",
        "loss 6.8000",
        "grad_norm 1.250",
        "lr 8.00e-04",
        "tok/s 50",
        "mem 0.50 GiB",
        "data 5.0%",
        "eta 0:00:08",
    ):
        assert text in second
    assert "mfu" not in second
    assert "\x1b" not in second, "colour in a file"
    assert "eta 0:00:06" in third


def test_metrics_file_has_the_contract_keys_and_leaves_the_first_step_out_of_the_throughput(
    tmp_path, lines
):
    log(metrics_logger(tmp_path, peak_flops=1e4), range(1, 4))
    first, second, _ = records(tmp_path)
    assert set(second) == {
        "step", "loss", "max_loss", "grad_norm", "lr", "tokens_seen", "tokens_per_second", "mfu", "memory_gib",
        "data_time_pct", "step_time_s",
    }  # fmt: skip
    assert first["tokens_per_second"] is None
    assert second["tokens_per_second"] == 50.0
    assert second["mfu"] == pytest.approx(50.0 * 10 / 1e4)
    assert second["step_time_s"] == 2.0
    assert "mfu 5.0%" in lines()[1]


def test_log_freq_prints_step_and_rate_alone_between(tmp_path, lines):
    log(metrics_logger(tmp_path, Metrics(log_freq=3)), range(1, 6))
    printed = lines()
    assert printed[0] == "step 1/6  lr 8.00e-04"
    assert "loss" in printed[2]
    assert "tok/s 50" in printed[2], "the window is the two steps after the first"
    assert [record["step"] for record in records(tmp_path)] == [3]


def test_log_lr_off_leaves_the_rate_out(tmp_path, lines):
    log(metrics_logger(tmp_path, Metrics(log_freq=2), log_lr=False), range(1, 4))
    printed = lines()
    assert len(printed) == 1
    assert "lr" not in printed[0]
    assert records(tmp_path)[0]["lr"] == 8e-4


def test_the_last_step_is_always_logged(tmp_path, lines):
    log(metrics_logger(tmp_path, Metrics(log_freq=4)), range(1, 7))
    assert [record["step"] for record in records(tmp_path)] == [4, 6]


def test_colour_on_a_terminal_unless_turned_off(tmp_path, lines, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    log(metrics_logger(tmp_path), [1])
    assert "\x1b[" in lines()[0]
    log(metrics_logger(tmp_path, Metrics(disable_color_printing=True)), [1])
    assert "\x1b[" not in lines()[0]


def tensorboard_curve(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars("loss")]


def test_tensorboard_is_one_curve_after_a_resume(tmp_path, lines):
    config = Metrics(enable_tensorboard=True, save_tb_folder="curves")
    log(metrics_logger(tmp_path, config), range(1, 6))
    log(metrics_logger(tmp_path, config, resumed_step=3), range(4, 7))
    assert tensorboard_curve(tmp_path / "curves") == [1, 2, 3, 4, 5, 6]


def test_wandb_without_the_package_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        metrics_logger(tmp_path, Metrics(enable_wandb=True))


def test_wandb_gets_the_same_numbers_and_continues_the_same_run(tmp_path, monkeypatch, lines):
    calls, logged = [], []

    class Run:
        def log(self, scalars, step):
            logged.append((step, scalars["loss"]))

        def finish(self):
            calls.append("finish")

    class Package:
        @staticmethod
        def init(**arguments):
            calls.append(arguments["id"])
            return Run()

    monkeypatch.setitem(__import__("sys").modules, "wandb", Package)
    for resumed in (0, 1):
        log(
            metrics_logger(tmp_path, Metrics(enable_wandb=True), resumed_step=resumed),
            [resumed + 1],
        )
    assert logged == [(1, 6.9), (2, 6.8)]
    assert calls[0] == calls[2]
    assert calls[1] == calls[3] == "finish"


def run_folder(path, *arguments):
    return RunFolder(
        JobConfig().parse_args(["--job.dump_folder", str(path), *arguments], world_size=1),
        owner=True,
    )


def test_lines_past_the_resumed_step_are_moved_aside_and_a_torn_one_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    folder = run_folder(tmp_path)
    folder.resume_at(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "metrics.superseded.jsonl").read_text() == '{"step": 3}\n{"st\n'
    folder.resume_at(1)
    assert (tmp_path / "metrics.superseded.jsonl").read_text() == '{"step": 3}\n{"st\n{"step": 2}\n'


def test_earlier_outputs_are_moved_and_a_users_own_files_are_not(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "board").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "previous-4").mkdir()
    run_folder(tmp_path, "--metrics.save_tb_folder", "board").begin_afresh()
    assert (tmp_path / "previous-5" / "metrics.jsonl").exists()
    assert (tmp_path / "previous-5" / "board").is_dir()
    assert (tmp_path / "notes.txt").exists()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape("job.dump_folder")):
        run_folder(tmp_path / "file" / "run")


def test_config_toml_can_be_given_back(tmp_path):
    folder = run_folder(tmp_path, "--training.steps", "7")
    folder.describe_run({"world_size": 1})
    again = JobConfig().parse_args(
        ["--job.config_file", str(tmp_path / "config.toml")], world_size=4
    )
    assert again.training.steps == 7
    assert again.training.global_batch_size == -1
    assert json.loads((tmp_path / "run.json").read_text()) == {"world_size": 1}
