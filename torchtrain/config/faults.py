"""What is wrong with one section, key or value."""

import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from torchtrain.config import torchtitan_keys
from torchtrain.config.options import options
from torchtrain.config.schema import SECTIONS
from torchtrain.config.toml import quoted
from torchtrain.utils import nearest

NOT_YET = "is a torchtitan v0.2.2 option that torchtrain does not support yet"

# Other trainers' names for keys of ours that spelling alone does not find.
SYNONYMS = {
    "learning_rate": "lr",
    "batch_size": "local_batch_size",
    "max_steps": "steps",
    "sequence_length": "seq_len",
    "grad_clip": "max_norm",
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "output_dir": "dump_folder",
}

OPTION_NAME = re.compile(r"\b[a-z_]+(?:\.[a-z0-9_]+)+\b")


@dataclass(frozen=True)
class Fault:
    """One thing wrong with the values given."""

    text: str
    """What was given, what is allowed, what to do."""
    depends_on: tuple[str, ...] = ()
    """Options that it depends on beside those that the text names, as `section.key`."""

    @property
    def keys(self) -> set[str]:
        """The options made unreliable by this fault; checks that use them are skipped."""
        return {*self.depends_on, *options().keys() & OPTION_NAME.findall(self.text)}


def value_fault(name: str, value: Any) -> Fault | None:
    """Return what is wrong with this key or its value, or None."""
    given = f"{name} = {quoted(value)}"
    option = options().get(name)
    if option is None:
        if not torchtitan_keys.find_entry(name):
            return unknown_key(name, given)
        if torchtitan_keys.is_idle(name, value):
            return None
        advice = torchtitan_keys.ADVICE.get(name, "leave it out")
        return Fault(f"{given}: {NOT_YET}; {advice}")
    if value in torchtitan_keys.UNSUPPORTED_VALUES.get(name, ()):
        return Fault(f"{given}: this value {NOT_YET}; it must be {option.allowed}")
    section, _, key = name.rpartition(".")
    try:
        SECTIONS[section].model_validate({key: value})
    except ValidationError:
        return Fault(f"{given}: must be {option.allowed}")
    return None


def unknown_key(name: str, given: str, prefix: str = "") -> Fault:
    """Return the fault of a `section.key` that nobody knows, with the nearest that we know.

    Args:
        name: the key.
        given: the key as it was given, with its value.
        prefix: written before each suggestion.
    """
    section, _, key = name.rpartition(".")
    close = _suggestions(section, key)
    if close:
        hint = "did you mean " + " or ".join(prefix + other for other in close) + "?"
    elif section in SECTIONS:
        hint = f"the keys of [{section}] are {', '.join(SECTIONS[section].model_fields)}"
    else:
        hint = f"the sections are {', '.join(SECTIONS)}; --help prints every option"
    return Fault(f"{given}: unknown; {hint}")


def unknown_section(name: str, content: Any) -> Fault:
    """Return the fault of a name at the top of a file that is not a section."""
    if not isinstance(content, dict):
        close = _suggestions("", name)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        return Fault(f"{name} = {quoted(content)}: a key must be in a section{hint}")
    section = nearest(name, SECTIONS)
    hint = f"; did you mean [{section}]?" if section else ""
    meant = [option for option in options() if option.startswith(f"{section}.")]
    return Fault(
        f"[{name}]: unknown section{hint}; the sections are {', '.join(SECTIONS)}",
        depends_on=tuple(meant),
    )


def _suggestions(section: str, key: str) -> list[str]:
    """Return the same key elsewhere; else the nearest of its section; else the nearest of all."""
    key = SYNONYMS.get(key, key)
    by_key: dict[str, list[str]] = {}
    for name in options():
        by_key.setdefault(name.rpartition(".")[2], []).append(name)
    if f"{section}.{key}" in options():
        return [f"{section}.{key}"]
    if key not in by_key and section in SECTIONS:
        close = nearest(key, SECTIONS[section].model_fields)
        if close:
            return [f"{section}.{close}"]
    return by_key.get(nearest(key, by_key) or "", [])
