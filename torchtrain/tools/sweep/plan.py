"""What a sweep's file asks for: its runs, each with a name, a folder and a checked config."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtrain.config.options import options
from torchtrain.config.plans import list_output_folders
from torchtrain.config.reading import Source, flatten_section, load_tables
from torchtrain.config.toml import quoted
from torchtrain.config_manager import JobConfig
from torchtrain.errors import ConfigError, UserError
from torchtrain.installation import PROGRAM
from torchtrain.tools.sweep.naming import Values, name_runs
from torchtrain.utils import describe_no_folder, expand_user, plural

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
    names = name_runs(varied)
    folder = expand_user(tables["folder"])
    faults = list(_check_names(file, folder, names, varied))
    if faults:
        _refuse(file, faults)
    sweep = Sweep(file, folder, _check_runs(file, tables, names, varied, world_size))
    faults = list(_check_own_folders(sweep.runs))
    if faults:
        _refuse(file, faults)
    return sweep


def _check_runs(
    file: Path,
    tables: Mapping[str, Any],
    names: Sequence[str],
    varied: Sequence[Values],
    world_size: int,
) -> list[SweepRun]:
    """Return the runs, each with its checked config.

    Raises:
        UserError: all faults of all runs.
    """
    folder = expand_user(tables["folder"])
    runs = []
    reports: dict[str, list[str]] = {}
    for name, values in zip(names, varied, strict=True):
        given = flat(tables.get("set", {})) | values | {"job.dump_folder": str(folder / name)}
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
    return runs


def _check_names(
    file: Path, folder: Path, names: Sequence[str], varied: Sequence[Values]
) -> Iterator[str]:
    """Yield the runs that are there twice, or whose files would replace the sweep's own."""
    for number, (name, values) in enumerate(zip(names, varied, strict=True)):
        if values in varied[:number]:
            yield f"two runs have the same options: {name}"
        if (folder / f"{name}.toml").resolve() == file.resolve():
            yield f"the run {name} would write its config over {file}; give that another name"


def _check_own_folders(runs: Sequence[SweepRun]) -> Iterator[str]:
    """Yield the folders that more than one run would write: only one would train, or none alone."""
    writers: dict[Path, dict[str, str]] = {}
    for run in runs:
        inside = expand_user(run.config.job.dump_folder)
        for key, folder in _list_written(run.config).items():
            writers.setdefault((inside / folder).resolve(), {})[run.name] = key
    sharing: dict[str, list[str]] = {}
    for folder, by_run in writers.items():
        if len(by_run) > 1:
            for name, key in by_run.items():
                text = (
                    f"{key} = {quoted(str(folder))}: more than one run would write there; a "
                    "relative folder lies in the run's own"
                )
                sharing.setdefault(text, []).append(name)
    yield from _name_culprits(sharing, len(runs))


def _list_written(config: JobConfig) -> dict[str, Path]:
    """Return the folders that a run writes beside its own, by key, without those it has no use for.

    A run that only loads may share its checkpoints with others.
    """
    is_idle = {
        "checkpoint.folder": not config.checkpoint.enable or config.checkpoint.load_only,
        "metrics.save_tb_folder": not config.metrics.enable_tensorboard,
        "profiling.save_traces_folder": not config.profiling.enable_profiling,
        "profiling.save_memory_snapshot_folder": not config.profiling.enable_memory_snapshot,
    }
    return {key: path for key, path in list_output_folders(config).items() if not is_idle[key]}


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
        elif key == "folder" and (fault := describe_no_folder(given)):
            yield f"{key} = {quoted(given)} {fault}"
    tables_of_options = [("set", tables.get("set", {})), ("grid", tables.get("grid", {}))]
    runs = tables.get("runs", [])
    if isinstance(runs, list):
        tables_of_options += [(f"runs[{number}]", run) for number, run in enumerate(runs)]
    else:
        yield f"runs = {quoted(runs)}: must be {KEYS['runs']}; write [[runs]]"
    for place, table in tables_of_options:
        yield from _check_table(place, table)
    if not any(flat(table) for place, table in tables_of_options if place != "set"):
        yield "nothing varies: give [grid], [[runs]] or both"


def _check_table(place: str, table: Any) -> Iterator[str]:
    """Yield what is wrong with a table of options; the config check knows more of them."""
    if not isinstance(table, dict):
        yield f"{place} = {quoted(table)}: must be {KEYS[place.partition('[')[0]]}"
        return
    for section, content in table.items():
        if not isinstance(content, dict):
            yield f"{place}: {section} = {quoted(content)}: write section.key = value"
    for name, value in flat(table).items():
        if name in OF_THE_SWEEP:
            yield f"{place}: {name} cannot be given here: {OF_THE_SWEEP[name]}"
        elif place == "grid" and (not isinstance(value, list) or not value):
            yield f"grid: {name} = {quoted(value)}: must be a list of values, at least one"


def _check_overlap(tables: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options that more than one part of the file gives."""
    names = {part: set(flat(tables.get(part, {}))) for part in ("set", "grid")}
    names["runs"] = {name for run in tables.get("runs", []) for name in flat(run)}
    for one, other in itertools.combinations(names, 2):
        for name in sorted(names[one] & names[other]):
            yield f"{name} is given in both {one} and {other}; give it in one of them"


def flat(table: Any) -> Values:
    """Return the values by full name; one that is itself a table stays one."""
    return {
        name: value
        for section, content in (table.items() if isinstance(table, dict) else ())
        if isinstance(content, dict)
        for name, value in flatten_section(section, content).items()
    }


def _list_runs(tables: Mapping[str, Any]) -> list[Values]:
    """Return what is varied in each run: every combination of the grid, in each run of the list."""
    grid = flat(tables.get("grid", {}))
    combinations = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    listed = [flat(run) for run in tables.get("runs", [])] or [{}]
    return [one | combination for one in listed for combination in combinations]


def _unset(name: str, value: Any) -> Any:
    """Return None for the text "none", which unsets an option as on the command line."""
    option = options().get(name)
    return None if value == "none" and option is not None and option.default is None else value
