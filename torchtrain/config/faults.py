"""What is wrong with one section, key or value."""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from torchtrain.config import torchtitan_keys
from torchtrain.config.options import options
from torchtrain.config.schema import SECTIONS
from torchtrain.config.toml import quoted
from torchtrain.utils import nearest

NOT_YET = "is a torchtitan v0.2.2 option that torchtrain does not support yet"


@dataclass(frozen=True)
class Fault:
    """One thing wrong with the values given."""

    keys: tuple[str, ...]
    """Options made unreliable by this fault, `section.key`; checks that use them are skipped."""
    text: str
    """What was given, what is allowed, what to do."""


def value_fault(name: str, value: Any) -> Fault | None:
    """Return what is wrong with this key or its value, or None."""
    given = f"{name} = {quoted(value)}"
    option = options().get(name)
    if option is None:
        return unknown_key(name, given)
    if value in torchtitan_keys.VALUES.get(name, ()):
        return Fault((name,), f"{given}: this value {NOT_YET}; it must be {option.allowed}")
    section, _, key = name.partition(".")
    try:
        SECTIONS[section].model_validate({key: value})
    except ValidationError:
        return Fault((name,), f"{given}: must be {option.allowed}")
    return None


def unknown_key(name: str, given: str, prefix: str = "") -> Fault:
    """Return the fault of a `section.key` that is not ours, with the nearest that is.

    Args:
        name: the key.
        given: the key as it was given, with its value.
        prefix: written before each suggestion.
    """
    section, _, key = name.partition(".") if "." in name else ("", "", name)
    known = f"{section}.{key.split('.')[0]}"
    if section in torchtitan_keys.SECTIONS or known in torchtitan_keys.KEYS:
        advice = torchtitan_keys.ADVICE.get(name, "leave it out")
        return Fault((name,), f"{given}: {NOT_YET}; {advice}")
    close = _suggestions(section, key)
    if close:
        hint = "did you mean " + " or ".join(prefix + other for other in close) + "?"
    elif section in SECTIONS:
        hint = f"the keys of [{section}] are {', '.join(SECTIONS[section].model_fields)}"
    else:
        hint = f"the sections are {', '.join(SECTIONS)}; --help prints every option"
    return Fault((name, *close), f"{given}: unknown; {hint}")


def unknown_section(name: str, content: Any) -> Fault:
    """Return the fault of a name at the top of a file that is not a section of ours."""
    if name in torchtitan_keys.SECTIONS:
        return Fault((), f"[{name}]: this section {NOT_YET}; leave it out")
    if not isinstance(content, dict):
        close = _suggestions("", name)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        text = f"{name} = {quoted(content)}: a key must be in a section{hint}"
        return Fault(tuple(close), text)
    section = nearest(name, SECTIONS)
    hint = f"; did you mean [{section}]?" if section else ""
    text = f"[{name}]: unknown section{hint}; the sections are {', '.join(SECTIONS)}"
    doubtful = [option for option in options() if section and option.startswith(f"{section}.")]
    return Fault(tuple(doubtful), text)


def _suggestions(section: str, key: str) -> list[str]:
    """Return the same key elsewhere; else the nearest of its section; else the nearest of all."""
    by_key: dict[str, list[str]] = {}
    for name in options():
        by_key.setdefault(name.partition(".")[2], []).append(name)
    if key in by_key:
        return by_key[key]
    if section in SECTIONS:
        close = nearest(key, SECTIONS[section].model_fields)
        if close:
            return [f"{section}.{close}"]
    close = nearest(key, by_key)
    return by_key[close] if close else []
