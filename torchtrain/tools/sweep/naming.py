"""The names of a sweep's runs, which are those of their folders and files."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torchtrain.config.toml import quoted

Values = dict[str, Any]
"""Values by full name, `section.key`."""

LONGEST_NAME = 120
DIGITS = 8
"""Of the digest that ends a name which does not say all by itself."""
ODD = re.compile(r"[^A-Za-z0-9.+-]+")


def name_runs(varied: Sequence[Values]) -> list[str]:
    """Return a name for each run: its values by the last part of their keys, as a folder can have.

    A digest of the options follows where a name cannot hold them as they are, is too long, or is
    another run's but for its capitals, which some file systems do not tell apart. So the name does
    not depend on the order of the runs.

    Args:
        varied: the options of each run; no two are the same.
    """
    keys = dict.fromkeys(key for values in varied for key in values)
    ends = Counter(_end(key) for key in keys)
    names = []
    for values in varied:
        parts = [f"{_end(key) if ends[_end(key)] == 1 else key}=" for key in values]
        texts = [_in_a_name(value) for value in values.values()]
        name = ",".join(part + text for part, text in zip(parts, texts, strict=True)) or "as-set"
        is_whole = len(name) <= LONGEST_NAME and texts == [_plain(x) for x in values.values()]
        names.append((name, is_whole))
    times = Counter(name.casefold() for name, _ in names)
    return [
        name if is_whole and times[name.casefold()] == 1 else _with_digest(name, values)
        for (name, is_whole), values in zip(names, varied, strict=True)
    ]


def _end(key: str) -> str:
    return key.partition(".")[2]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else quoted(value)


def _in_a_name(value: Any) -> str:
    text = ODD.sub("-", _plain(value))
    return text if text == _plain(value) != "" else text.strip("-") or "empty"


def _with_digest(name: str, values: Values) -> str:
    try:
        text = json.dumps(values, sort_keys=True, default=str)
    except ValueError:  # a number of thousands of digits, which the config check refuses
        text = name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]
    return f"{name[: LONGEST_NAME - DIGITS - 1]},{digest}"
