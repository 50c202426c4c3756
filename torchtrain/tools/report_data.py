"""What `torchtrain.tools.report` knows of a run: files of its folder, nothing else."""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from torchtrain.config.schema import Config
from torchtrain.errors import UserError
from torchtrain.utils import METRICS_FILE, SAMPLES_FILE, user_errors

LONG_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b")
DUMP_FOLDER = "job.dump_folder"
OF_ONE_LAUNCH = ("description", "first_step", "steps_source", "max_lr_source")
"""Facts of run.json that say nothing of what was trained, or that the config says too."""
SAID_BY_CONFIG = {"steps": "training.steps", "max_lr": "optimizer.lr"}
"""Facts that say what an option says, where that is a number."""


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it, finished or not."""

    label: str
    """The end of the folder's path that tells it from the other runs."""
    folder: Path
    records: list[dict[str, Any]]
    """Of metrics.jsonl, by increasing step."""
    samples: list[dict[str, Any]]
    """Texts, by increasing step; empty where the run wrote none."""
    config: dict[str, Any]
    """Values by full name, `section.key`; empty where there is no config.toml."""
    facts: dict[str, Any]
    """Of run.json, by dotted name; empty where there is none."""

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps that have a number of this name, and the numbers."""
        having = [record for record in self.records if is_number(record.get(key))]
        return [record["step"] for record in having], [record[key] for record in having]


def is_number(value: Any) -> bool:
    """Return whether a value can be drawn: no null, no text, not NaN."""
    return type(value) in (int, float) and math.isfinite(value)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs of these folders, each given once.

    Raises:
        UserError: a folder is given twice, or is not that of a run that has logged a step.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is given twice")
    labels = shortest_ends(paths)
    return [_read_run(path, label) for path, label in zip(paths, labels, strict=True)]


def _read_run(folder: Path, label: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    metrics = folder / METRICS_FILE
    if not metrics.exists():
        raise UserError(
            f"{folder} has no {METRICS_FILE}: it is not the folder of a run (job.dump_folder), or "
            "the run has not logged its first step yet"
        )
    records = newest(_read_lines(metrics))
    if not records:
        raise UserError(f"{metrics} holds no step: the run has not logged its first one yet")
    samples = folder / SAMPLES_FILE
    config, facts = folder / "config.toml", folder / "run.json"
    return Run(
        label=label,
        folder=folder,
        records=records,
        samples=newest(_read_lines(samples)) if samples.exists() else [],
        config=_read_config(config) if config.exists() else {},
        facts=_read_facts(facts) if facts.exists() else {},
    )


def _read_text(path: Path) -> str:
    with user_errors(f"{path} cannot be read", OSError):
        return path.read_text(encoding="utf-8", errors="replace")


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines that name their step.

    Others are left out: the last line of a run that is going on, or was killed, may be torn.
    """
    for line in _read_text(path).split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            yield record


def newest(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records without those that a resumed run has superseded: no curve doubles back.

    A step that is not past the one before it begins the run anew from there. Samples of one step
    have different prompts.
    """
    kept: dict[tuple[int, str], dict[str, Any]] = {}
    last_step = 0
    for record in records:
        step = record["step"]
        if step < last_step:
            kept = {key: earlier for key, earlier in kept.items() if key[0] < step}
        kept[step, str(record.get("prompt"))] = record
        last_step = step
    return list(kept.values())


def _read_config(path: Path) -> dict[str, Any]:
    """Return the merged config; a key that is left out had its default."""
    text = _read_text(path)
    with user_errors(f"{path} is not TOML", ValueError):
        given = flat(tomli.loads(text))
    values = flat(Config().model_dump()) | given
    if values["training.tokens"] is not None:
        values["training.steps"] = None
    return values


def _read_facts(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    with user_errors(f"{path} is not JSON", ValueError):
        facts = json.loads(text)
    if not isinstance(facts, dict):
        raise UserError(f"{path} is not a JSON object")
    return {name: fact for name, fact in flat(facts).items() if name not in OF_ONE_LAUNCH}


def flat(table: dict[str, Any]) -> dict[str, Any]:
    """Return the values of nested tables by their dotted names."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            values |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        else:
            values[key] = value
    return values


def shortest_ends(paths: Sequence[Path]) -> list[str]:
    """Return the ends of different absolute paths, no longer than it takes to tell them apart."""
    length = 1
    ends = [path.name for path in paths]
    while len(set(ends)) < len(paths):
        length += 1
        ends = [str(Path(*path.parts[-length:])) for path in paths]
    return ends


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return what differs between the configs, then between the facts: names, and a value per run.

    `job.dump_folder` always does, and is left out.
    """
    config = [row for row in differing([run.config for run in runs]) if row[0] != DUMP_FOLDER]
    facts = differing([run.facts for run in runs])
    said = dict(config)
    facts = [row for row in facts if said.get(SAID_BY_CONFIG.get(row[0], "")) != row[1]]
    return config + [(f"run.json: {name}", values) for name, values in facts]


def differing(tables: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the keys whose values differ, each with the values as JSON, fingerprints shortened.

    An empty table is one that is not known: it differs from none.
    """
    known = [table for table in tables if table]
    rows = []
    for key in dict.fromkeys(key for table in known for key in table):
        if any(table.get(key) != known[0].get(key) for table in known):
            rows.append((key, [_shown(table.get(key)) if table else "?" for table in tables]))
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    return LONG_DIGEST.sub(r"\1…", json.dumps(value, ensure_ascii=False, default=str))
