"""Reading a config: command line over TOML file over defaults, every fault in one report."""

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from torchtrain.catalog.custom_import import import_custom
from torchtrain.config import torchtitan_keys
from torchtrain.config.checks import NAMED_BY_USERS, check
from torchtrain.config.faults import Fault, unknown_key, unknown_section, value_fault
from torchtrain.config.notes import find_idle_options
from torchtrain.config.options import Option, options, print_help
from torchtrain.config.schema import SECTIONS, Config
from torchtrain.config.toml import quoted, shortened
from torchtrain.errors import ConfigError, UserError
from torchtrain.installation import PROGRAM
from torchtrain.utils import expand_user, plural, wants_help

STEPS = "training.steps"
TOKENS = "training.tokens"
EITHER_OR = (STEPS, TOKENS)
"""Two ways to say the same: one that is given takes the place of the other of an earlier source."""

# key = word, where the word is neither quoted nor a value of TOML's.
BARE_VALUE = re.compile(r"\s*[\w.-]+\s*=\s*(?P<word>[\w./~:@-]*[A-Za-z/~][\w./~:@-]*)\s*(#.*)?")

CONFIGS = "train_configs"
"""The folder of the config files that come with torchtrain."""


@dataclass
class Source:
    """The config file or the command line, as read."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    """Values by full name, `section.key`, torchtitan's among them; not checked yet."""
    faults: list[Fault] = field(default_factory=list)
    """What is wrong with the file, the arguments or their names."""


@dataclass
class Report:
    """All faults found so far, and the options that they make unreliable."""

    lines: list[str] = field(default_factory=list)
    unreliable: set[str] = field(default_factory=set)

    def add(self, where: str, fault: Fault) -> None:
        """Note a fault found in the file, or on the command line, called `where`."""
        self.lines.append(f"{where}: {fault.text}")
        self.unreliable.update(fault.keys)


def read_config(
    args_list: list[str] | None = None,
    world_size: int | None = None,
    beneath: Source | None = None,
    above: Source | None = None,
) -> tuple[Config, list[str]]:
    """Read default < TOML < command line. `-h` or `--help` prints every option and exits with 0.

    Args:
        args_list: the command line; by default this process's.
        world_size: ranks of the run; by default WORLD_SIZE, torchrun's variable, or 1. 0: not
            known, so no layout is checked.
        beneath: what has been read already, and counts where the others give nothing.
        above: what has been read already, and takes precedence over the others.

    Returns:
        The config, and the options that have no effect, a sentence each.

    Raises:
        ConfigError: every fault that can be known, in one report.
    """
    args = sys.argv[1:] if args_list is None else args_list
    if wants_help(args):
        print_help()
        raise SystemExit(0)
    sources = [read_command_line(args)]
    config_file = sources[0].values.get("job.config_file")
    if config_file is not None:
        sources.insert(0, read_toml(config_file))
    if beneath is not None:
        sources.insert(0, beneath)
    if above is not None:
        sources.append(above)

    report = Report()
    for source in sources:
        _check_alone(source, report)
    config, origin = _merge(sources, report)
    if config.experimental.custom_import:
        try:
            import_custom(config.experimental.custom_import)
        except UserError as fault:
            where = origin["experimental.custom_import"]
            report.add(where, Fault(str(fault), depends_on=NAMED_BY_USERS))
    if world_size is None:
        world_size = _launched_world_size(report)
    for clash in check(config, world_size or None):
        if not report.unreliable.intersection(clash.keys):
            origins = {origin[key] for key in clash.keys if key in origin}
            where = ", ".join(source.name for source in sources if source.name in origins)
            report.lines.append(f"{where or 'defaults'}: {clash.text}")
    if report.lines:
        heading = f"The configuration has {plural(len(report.lines), 'fault')}:"
        raise ConfigError("\n  ".join([heading, *report.lines]))
    notes = find_idle_options(config)
    foreign = [name for source in sources for name in source.values if name not in options()]
    if foreign:
        names = ", ".join(dict.fromkeys(foreign))
        notes.insert(0, f"torchtitan options that have no effect here: {names}")
    return config, notes


def _check_alone(source: Source, report: Report) -> None:
    """Report what is wrong with each key and value on its own."""
    for fault in source.faults:
        report.add(source.name, fault)
    for name, value in source.values.items():
        wrong = value_fault(name, value)
        if wrong is not None:
            report.add(source.name, wrong)
    steps, tokens = (source.values.get(name) for name in EITHER_OR)
    if steps is not None and tokens is not None:
        given = f"{STEPS} = {quoted(steps)}, {TOKENS} = {quoted(tokens)}"
        report.add(source.name, Fault(f"{given}: both say how long the run is; give one of them"))


def _merge(sources: list[Source], report: Report) -> tuple[Config, dict[str, str]]:
    """Return the values that are not in doubt, later sources first, and where each comes from."""
    merged: dict[str, dict[str, Any]] = {}
    origin: dict[str, str] = {}
    for source in sources:
        for name, value in source.values.items():
            if name in options() and name not in report.unreliable:
                section, _, key = name.rpartition(".")
                merged.setdefault(section, {})[key] = value
                origin.pop(name, None)
                origin[name] = source.name  # the last one given is the last one here
    if merged.get("training", {}).get("tokens") is not None:
        *earlier, _ = (name for name in origin if name in EITHER_OR)
        for name in earlier:
            del merged["training"][name.partition(".")[2]], origin[name]
    return Config.model_validate(merged), origin


def _launched_world_size(report: Report) -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    world_size = int(text) if text.isdecimal() else 0
    if world_size == 0:
        fault = Fault(f"WORLD_SIZE = {quoted(text)}: must be a whole number >= 1")
        report.add("environment", fault)
    return world_size


def read_command_line(args: list[str]) -> Source:
    """Read the arguments; their values are checked later, by `value_fault`."""
    source = Source("command line")
    rest = list(args)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            text = f"unexpected argument {quoted(argument)}; expected --section.key value"
            source.faults.append(Fault(text))
            continue
        name, equals, after = argument[2:].partition("=")
        value = after if equals else None
        if value is None and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        option = options().get(name)
        if name in source.values:
            source.faults.append(Fault(f"--{name} is given twice; give it once"))
        elif option is None and not torchtitan_keys.find_entry(name):
            source.faults.append(unknown_key(name, given=f"--{name}", prefix="--"))
        elif value is not None:
            source.values[name] = _parse_value(option, value)
        elif option is None or option.kind == "boolean":
            source.values[name] = True
        else:
            text = f"--{name} has no value; it must be {option.allowed}"
            source.faults.append(Fault(text))
    return source


def _parse_value(option: Option | None, text: str) -> Any:
    """Return the text as a value of the option's type, or as it is, to be refused by the check.

    Without an option, of torchtitan's: as the value that it stands for in TOML, or as it is.
    """
    try:
        if option is None:
            return tomli.loads(f"value = {text}")["value"]
        if option.default is None and text == "none":
            return None
        if option.kind == "boolean":
            return {"true": True, "false": False}.get(text, text)
        if option.kind == "array":
            return text.split(",") if text else []
        if option.kind == "lists":
            return [part.split(",") for part in text.split(";")]
        if option.kind == "tables":
            return tomli.loads(f"value = [{text}]")["value"]
        return {"integer": int, "number": float, "string": str}[option.kind](text)
    except ValueError:
        return text


def read_toml(path: str) -> Source:
    """Read a config file; its values are checked later, by `value_fault`."""
    source = Source(path)
    try:
        tables = load_tables(path)
    except UserError as fault:
        source.faults.append(Fault(str(fault), depends_on=tuple(options())))
        return source
    for section, table in tables.items():
        if section not in SECTIONS and section not in torchtitan_keys.SECTIONS:
            source.faults.append(unknown_section(section, table))
        elif isinstance(table, dict):
            source.values.update(flatten_section(section, table))
        else:
            given = f"{section} = {quoted(table)}"
            text = f"{given}: this is a section; write [{section}] and its keys"
            source.faults.append(Fault(text))
    if source.values.pop("job.config_file", None) is not None:
        text = "job.config_file: belongs on the command line only; leave it out"
        source.faults.append(Fault(text))
    return source


def list_configs() -> list[str]:
    """Return the names of the config files that come with torchtrain."""
    return sorted(file.name for file in (PROGRAM / CONFIGS).glob("*.toml"))


def find_config(path: str) -> Path:
    """Return the file at `path`, or else the one of that name that comes with torchtrain."""
    file = expand_user(path)
    names = (file.name, f"{CONFIGS}/{file.name}")
    if not file.exists() and path in names and file.name in list_configs():
        return PROGRAM / CONFIGS / file.name
    return file


def flatten_section(section: str, table: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a section by full name; [quantize] holds sections of its own."""
    values = {}
    for key, value in table.items():
        name = f"{section}.{key}"
        is_table = isinstance(value, dict) and name.startswith("quantize.")
        holds_keys = is_table and (value or name in SECTIONS)
        values.update(flatten_section(name, value) if holds_keys else {name: value})
    return values


def load_tables(path: str) -> dict[str, Any]:
    """Return what the file holds.

    Raises:
        UserError: it cannot be read, is not UTF-8 or not TOML.
    """
    try:
        text = find_config(path).read_bytes().decode("utf-8-sig")
    except OSError as fault:
        where = ""
        if isinstance(fault, FileNotFoundError):
            names = ", ".join(list_configs())
            where = f" (looked from {Path.cwd()}); those that come with torchtrain are {names}"
        raise UserError(f"the config file cannot be read: {fault.strerror}{where}") from fault
    except UnicodeDecodeError as fault:
        line = fault.object[: fault.start].count(b"\n") + 1
        byte = f"{fault.object[fault.start]:#04x}"
        raise UserError(
            f"not UTF-8 text: byte {byte} in line {line}; save the file as UTF-8"
        ) from fault
    try:
        return tomli.loads(text)
    except (ValueError, RecursionError) as fault:
        raise UserError(_locate(str(fault), text.replace("\r\n", "\n"))) from fault


def _locate(message: str, text: str) -> str:
    """Return tomli's message with the line that it is about, where it names a location."""
    problem, _, location = message.partition(" (at ")
    numbers = re.fullmatch(r"line (\d+), column (\d+)\)", location)
    if numbers:
        line, column = int(numbers[1]), int(numbers[2])
    elif location:  # "end of document"
        lines = text.rstrip("\n").split("\n")
        line, column = len(lines), len(lines[-1]) + 1
    else:
        return f"not TOML: {problem}"
    if problem == "Cannot overwrite a value":
        problem = "this key was given before; give it once"
    code = text.split("\n")[line - 1]
    if problem.startswith(("Invalid value", "Expected newline")):
        problem = _hint_for_bare_value(code) or problem
    return f"not TOML: line {line}, column {column}: {problem}\n      {line} | {shortened(code)}"


def _hint_for_bare_value(code: str) -> str | None:
    """Return what to do about a value that is a word without quotes, or None."""
    bare = BARE_VALUE.fullmatch(code)
    if bare is None:
        return None
    word = bare["word"]
    if word.lower() in ("true", "false"):
        return f"write {word.lower()}, without capitals"
    return f'text needs quotes: "{word}"'
