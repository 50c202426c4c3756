"""Runs that save, as options; folders of made-up runs, as the trainer leaves them."""

import json
import math

STEPS = 10
"""Of a run that is started again."""


def saving(data, folder, **overrides):
    """Return the options of a run that saves after every fifth step.

    It stands still meanwhile: what is killed in step 8 has a checkpoint of step 5.
    """
    return {
        **data,
        "job.dump_folder": folder,
        "training.steps": STEPS,
        "checkpoint.enable": True,
        "checkpoint.interval": 5,
        "checkpoint.async_mode": "disabled",
        **overrides,
    }


def record(step, loss=None, **more):
    """Return a line of metrics.jsonl."""
    return {
        "step": step,
        "loss": 3 + 5 * math.exp(-step / 10) if loss is None else loss,
        "max_loss": 9.0,
        "grad_norm": 1 / step,
        "lr": 1e-3 * step,
        "tokens_seen": 100 * step,
        "tokens_per_second": None if step == 1 else 5000.0 + step,
        "mfu": None,
        "memory_gib": 0.5,
        "data_time_pct": 2.0,
        "step_time_s": 0.1,
        **more,
    }


def write_lines(path, records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def write_run(folder, records, config="", facts=None, samples=()):
    """Write the folder of a run, and return it; `config` is TOML, None leaves a file out."""
    folder.mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", records)
    if config is not None:
        (folder / "config.toml").write_text(config, encoding="utf-8")
    if facts is not None:
        (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    if samples:
        write_lines(folder / "samples.jsonl", samples)
    return folder
