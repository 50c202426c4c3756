"""What a sweep's file asks for: its runs, each with a name, a folder and a checked config."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from torchtrain.config.options import options
from torchtrain.config.reading import Source, flatten_section, load_tables
from torchtrain.config.toml import quoted, to_toml
from torchtrain.config_manager import JobConfig
from torchtrain.errors import ConfigError, UserError
from torchtrain.installation import PROGRAM
from torchtrain.utils import expand_user, plural

Values = dict[str, Any]
"""Values by full name, `section.key`."""

KEYS = {
    "config_file": 'the config file that the runs share, such as "debug_model.toml"',
    "folder": "the folder of the sweep, in which each run has one",
    "set": "a table: options that all runs share, over the config file",
    "grid": "a table: lists of values, of which each combination is a run",
    "runs": "an array of tables: the options of one run each",
}
"""What a sweep's file may hold, with what it means."""
OF_THE_SWEEP = {
    "job.config_file": "config_file at the top names it",
    "job.dump_folder": "each run has a folder of its own in the sweep's",
}
MOST_RUNS = 1000
LONGEST_NAME = 120
ODD = re.compile(r"[^A-Za-z0-9.+-]+")
# Between the faults in a report of the config check; code that they quote is further to the right.
BETWEEN_FAULTS = re.compile(r"\n  (?! )")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    """What sets it apart, as "lr=0.001,seed=1"; the names of its folder and its files."""
    config: JobConfig


@dataclass(frozen=True)
class Sweep:
    """A sweep, every run of it checked."""

    file: Path
    folder: Path
    runs: list[SweepRun]

    def path(self, run: SweepRun, ending: str = "") -> Path:
        """Return the folder of a run, or with an ending the file of that kind beside it."""
        return self.folder / f"{run.name}{ending}"


def read_sweep(file: Path, world_size: int) -> Sweep:
    """Read a sweep's file, and check the config of each of its runs.

    Args:
        file: of the sweep; where there is none, that of this path which comes with torchtrain.
        world_size: ranks of each run; 0: not known, so no layout is checked.

    Raises:
        UserError: every fault of the file, or of the runs that it asks for, in one report.
    """
    if not file.exists() and (PROGRAM / file).exists():
        file = PROGRAM / file
    if not file.exists():
        raise UserError(f"{file}: no such file (looked from {Path.cwd()})")
    try:
        tables = load_tables(str(file))
    except UserError as fault:
        raise UserError(f"{file}: {fault}") from fault
    faults = list(_check_file(tables)) or list(_check_overlap(tables))
    if faults:
        _refuse(file, faults)
    varied = _list_runs(tables)
    if len(varied) > MOST_RUNS:
        raise UserError(f"{file}: {len(varied):,} runs; a sweep has at most {MOST_RUNS:,}")
    folder = expand_user(tables["folder"])
    runs = []
    reports: dict[str, list[str]] = {}
    for name, values in zip(_name_runs(varied), varied, strict=True):
        given = _flat(tables.get("set", {})) | values | {"job.dump_folder": str(folder / name)}
        source = Source(str(file), {key: _unset(key, value) for key, value in given.items()})
        try:
            arguments = ["--job.config_file", tables["config_file"]]
            config = JobConfig().parse_args(arguments, world_size, above=source)
            runs.append(SweepRun(name, config))
        except ConfigError as fault:
            for text in re.split(BETWEEN_FAULTS, str(fault))[1:]:
                reports.setdefault(text, []).append(name)
    if reports:
        _refuse(file, _name_culprits(reports, len(varied)))
    return Sweep(file, folder, runs)


def _refuse(file: Path, faults: Iterable[str]) -> None:
    lines = list(faults)
    raise UserError("\n  ".join([f"{file} has {plural(len(lines), 'fault')}:", *lines]))


def _name_culprits(reports: Mapping[str, list[str]], runs: int) -> Iterator[str]:
    """Yield each fault with the runs that have it, unless all do."""
    for text, names in reports.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield text if len(names) == runs else f"{' and '.join(names[:3])}{more}: {text}"


def _check_file(tables: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the file itself."""
    for key in tables.keys() - KEYS.keys():
        meant = "; ".join(f"{name} ({what})" for name, what in KEYS.items())
        yield f"{key}: unknown; a sweep's file holds {meant}"
    for key in ("config_file", "folder"):
        given = tables.get(key)
        if not isinstance(given, str) or not given:
            yield f"{key} = {quoted(given)}: must be text: {KEYS[key]}"
    tables_of_options = [("set", tables.get("set", {})), ("grid", tables.get("grid", {}))]
    runs = tables.get("runs", [])
    if isinstance(runs, list):
        tables_of_options += [(f"runs[{number}]", run) for number, run in enumerate(runs)]
    else:
        yield f"runs = {quoted(runs)}: must be {KEYS['runs']}; write [[runs]]"
    for place, table in tables_of_options:
        yield from _check_table(place, table)
    if not tables.get("grid") and not runs:
        yield "nothing varies: give [grid], [[runs]] or both"


def _check_table(place: str, table: Any) -> Iterator[str]:
    """Yield what is wrong with a table of options; the config check knows more of them."""
    if not isinstance(table, dict):
        yield f"{place} = {quoted(table)}: must be {KEYS[place.partition('[')[0]]}"
        return
    for section, content in table.items():
        if not isinstance(content, dict):
            yield f"{place}: {section} = {quoted(content)}: write section.key = value"
    for name, value in _flat(table).items():
        if name in OF_THE_SWEEP:
            yield f"{place}: {name} cannot be given here: {OF_THE_SWEEP[name]}"
        elif place == "grid" and (not isinstance(value, list) or not value):
            yield f"grid: {name} = {quoted(value)}: must be a list of values, at least one"


def _check_overlap(tables: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options that more than one part of the file gives."""
    names = {part: set(_flat(tables.get(part, {}))) for part in ("set", "grid")}
    names["runs"] = {name for run in tables.get("runs", []) for name in _flat(run)}
    for one, other in itertools.combinations(names, 2):
        for name in sorted(names[one] & names[other]):
            yield f"{name} is given in both {one} and {other}; give it in one of them"


def _flat(table: Mapping[str, Any]) -> Values:
    """Return the values by full name; one that is itself a table stays one."""
    return {
        name: value
        for section, content in table.items()
        if isinstance(content, dict)
        for name, value in flatten_section(section, content).items()
    }


def _list_runs(tables: Mapping[str, Any]) -> list[Values]:
    """Return what is varied in each run: every combination of the grid, in each run of the list."""
    grid = _flat(tables.get("grid", {}))
    combinations = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    listed = [_flat(run) for run in tables.get("runs", [])] or [{}]
    return [one | combination for one in listed for combination in combinations]


def _unset(name: str, value: Any) -> Any:
    """Return None for the text "none", which unsets an option as on the command line."""
    option = options().get(name)
    return None if value == "none" and option is not None and option.default is None else value


def _name_runs(varied: Iterable[Values]) -> Iterator[str]:
    """Yield a name for each run: its values by the last part of their keys, as a folder can have.

    Where two runs have the same, the later ones are numbered.
    """
    varied = list(varied)
    keys = dict.fromkeys(key for values in varied for key in values)
    ends = [key.partition(".")[2] for key in keys]
    taken: dict[str, int] = {}
    for values in varied:
        parts = []
        for key, value in values.items():
            end = key.partition(".")[2]
            parts.append(f"{end if ends.count(end) == 1 else key}={_in_a_name(value)}")
        name = ",".join(parts)[:LONGEST_NAME] or "as-set"
        taken[name] = taken.get(name, 0) + 1
        yield name if taken[name] == 1 else f"{name},{taken[name]}"


def _in_a_name(value: Any) -> str:
    if isinstance(value, str):
        return ODD.sub("-", value).strip("-") or "empty"
    return ODD.sub("-", quoted(value))


# ---- what the sweep's folder holds of an earlier start ----


def find_changes(sweep: Sweep) -> list[str]:
    """Return which runs that have begun were asked for otherwise, and in which options.

    Their results would stand in one table with those of other options.
    """
    changes = []
    for run in sweep.runs:
        file = sweep.path(run, ".toml")
        if not file.exists() or not sweep.path(run).exists():
            continue
        now = _flat(tomli.loads(to_toml(run.config)))
        try:
            before = _flat(tomli.loads(file.read_text("utf-8")))
        except (OSError, ValueError) as fault:
            raise UserError(f"{file} cannot be read: {fault}") from fault
        differing = [
            f"{key} was {quoted(before.get(key))}, is {quoted(now.get(key))}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if differing:
            changes.append(f"{run.name}: {'; '.join(differing)}")
    return changes


def check_unchanged(sweep: Sweep) -> None:
    """Check that what has run so far is what the sweep's file and its config file ask for now.

    Raises:
        UserError: names each run and option that differs.
    """
    changes = find_changes(sweep)
    if changes:
        lines = "\n  ".join(changes)
        raise UserError(
            f"{sweep.file}, or its config file, has changed since runs in {sweep.folder} began:\n"
            f"  {lines}\nGive the sweep another folder, or move away what these runs have left: "
            "all that begins with their names"
        )


def find_others(sweep: Sweep) -> list[str]:
    """Return the names of runs in the folder that the sweep no longer has."""
    names = {run.name for run in sweep.runs}
    files = sorted(sweep.folder.glob("*.toml"))
    return [file.stem for file in files if file.stem not in names]
