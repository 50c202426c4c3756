"""Values in TOML's notation: the run's config.toml, and values quoted in messages."""

import json
from typing import Any

from torchtrain.config.schema import Config

LONGEST_QUOTE = 120


def to_toml(config: Config) -> str:
    """Return the values as a config file, without unset keys and `job.config_file`; -1 stays.

    `training.steps` is left out where `training.tokens` says how long the run is.
    """
    left_out = [("job", "config_file")]
    if config.training.tokens is not None:
        left_out.append(("training", "steps"))
    lines = []
    for section, table in config.model_dump().items():
        lines.append(f"[{section}]")
        for key, value in table.items():
            if value is not None and (section, key) not in left_out:
                lines.append(f"{key} = {toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """Return one value in TOML's notation (https://toml.io/en/v1.0.0).

    JSON's escapes are TOML's too, except for DEL, which JSON leaves as it is.

    Raises:
        TypeError: the value is not a str, bool, int, float, or a list or a table of them.
    """
    if isinstance(value, dict):
        given = [f"{key} = {toml_value(item)}" for key, item in value.items() if item is not None]
        return f"{{ {', '.join(given)} }}"
    if isinstance(value, list):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    raise TypeError(f"no TOML for {type(value).__name__}")


def quoted(value: Any) -> str:
    """Return a value as TOML writes it, shortened where it is long; None is "unset"."""
    if value is None:
        return "unset"
    try:
        return shortened(toml_value(value))
    except TypeError:  # a date: TOML has them, no field of ours does
        return shortened(str(value))
    except ValueError:  # Python does not print an integer of thousands of digits
        return "a number of thousands of digits"


def shortened(text: str) -> str:
    """Return the text, or its beginning and an ellipsis where it is longer than a line."""
    return text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 3] + "..."
