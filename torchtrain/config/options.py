"""The fields described in words: for --help, the command line and the messages."""

import functools
import os
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

from torchtrain.catalog.datasets import DATASETS
from torchtrain.catalog.models import FAMILIES
from torchtrain.catalog.optimizers import OPTIMIZERS
from torchtrain.config.schema import SECTIONS
from torchtrain.config.toml import quoted

BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
}
TYPES = {
    "integer": "a whole number",
    "number": "a finite number",
    "boolean": "true or false",
    "string": "UTF-8 text",
}
INDENT = " " * 6


@dataclass(frozen=True)
class Option:
    """One field, described."""

    kind: str
    """JSON Schema's name of its type: integer, number, boolean, string, array; "lists" of lists;
    "tables"."""
    allowed: str
    """Type and bounds, in words."""
    default: Any
    """None where the field can be unset."""
    doc: str


@functools.cache
def options() -> dict[str, Option]:
    """Return every field by its full name, `section.key`, in the order of declaration."""
    found = {}
    for section, model in SECTIONS.items():
        section_schema = model.model_json_schema()
        tables = section_schema.get("$defs", {})
        for key, schema in section_schema["properties"].items():
            value_schema, *others = schema.get("anyOf", [schema])
            auto = "-1, or " if schema["default"] == -1 else ""
            found[f"{section}.{key}"] = Option(
                kind=_kind(value_schema),
                allowed=auto + _in_words(value_schema, tables) + _texts_in_words(others),
                default=schema["default"],
                doc=" ".join(schema["description"].split()),  # of several lines, one
            )
    return found


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema.get("items", {}):
        return "tables"
    if schema.get("items", {}).get("type") == "array":
        return "lists"
    return str(schema["type"])


def _in_words(schema: dict[str, Any], tables: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if schema["type"] == "array":
        items = schema["items"]
        if "$ref" in items:
            keys = tables[items["$ref"].rpartition("/")[2]]["properties"]
            described = [
                f"{key} ({_in_words(value.get('anyOf', [value])[0], tables)})"
                for key, value in keys.items()
            ]
            return f"a list of tables with {', '.join(described)}"
        if "enum" in items or "const" in items:
            some = "at least one" if "minItems" in schema else "any"
            return f"a list with {some} of " + ", ".join(items.get("enum") or [items["const"]])
        what = "lists of names" if items["type"] == "array" else "texts"
        return f"a list of {what}, none empty"
    words = TYPES[schema["type"]]
    if "minLength" in schema:
        words += ", not empty"
    limits = [f"{sign} {schema[bound]:,}" for bound, sign in BOUNDS.items() if bound in schema]
    return f"{words} {' and '.join(limits)}".rstrip()


def _texts_in_words(schemas: list[dict[str, Any]]) -> str:
    """Return which texts may stand for a number, if any may."""
    words = ""
    for schema in schemas:
        if isinstance(schema.get("const"), str):
            words += f", or {quoted(schema['const'])}"
        if "examples" in schema:
            words += f", or text such as {quoted(schema['examples'][0])}"
    return words


def print_help() -> None:
    """Print the help; a reader that has seen enough (`--help | head`) is not a fault."""
    try:
        print(help_text(), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text() -> str:
    """Return every option with what it allows, its default and its meaning."""
    lines = [
        "Train a Llama. Options can also be set in a TOML file, as KEY under [SECTION];",
        "the command line takes precedence.",
        "",
        "  --SECTION.KEY VALUE or --SECTION.KEY=VALUE",
        "  A true/false option without a value means true. Commas separate the items of a list,",
        "  semicolons the lists of a list of lists; tables are as in TOML: { key = value, … }, …",
        "  The value none unsets an option whose default is unset.",
    ]
    for section, model in SECTIONS.items():
        lines += ["", f"[{section}] {model.__doc__}"]
        for name, option in options().items():
            if name.startswith(f"{section}."):
                lines.append(f"  --{name}  ({option.allowed}; default: {quoted(option.default)})")
                for text in (option.doc, *known_names(name)):
                    lines += textwrap.wrap(INDENT + text, 100, subsequent_indent=INDENT)
    return "\n".join(lines)


def known_names(option: str) -> list[str]:
    """Return what an option can name, one line for each: flavors, optimizers, datasets."""
    if option == "model.flavor":
        return [f"{name}: {', '.join(family.flavors)}" for name, family in FAMILIES.items()]
    if option == "optimizer.name":
        return [", ".join(OPTIMIZERS)]
    if option == "training.dataset":
        return [f"{dataset}: {spec.description}" for dataset, spec in DATASETS.items()]
    return []
