"""Write docs/config.md, the reference of all options, from what --help prints.

python -m torchtrain.tools.config_reference > docs/config.md
"""

from torchtrain.config.options import known_names, options
from torchtrain.config.schema import SECTIONS
from torchtrain.config.toml import quoted

HEAD = """\
# Options

Every option of a run, by section. In a TOML file an option is a key under its section, on the
command line it is `--section.key value`, which takes precedence. `python train.py --help` prints
the same.

This file is generated: `python -m torchtrain.tools.config_reference > docs/config.md`.
"""


def reference() -> str:
    """Return the reference as Markdown, a table per section."""
    parts = [HEAD]
    for section, model in SECTIONS.items():
        parts.append(f"\n## {section}\n\n{model.__doc__}\n")
        parts.append("| key | allowed | default | meaning |\n| --- | --- | --- | --- |")
        names = [name for name in options() if name.startswith(f"{section}.")]
        parts += [_row(name) for name in names]
        for name in names:
            parts += _list_of_names(name)
    return "\n".join(parts) + "\n"


def _row(name: str) -> str:
    option = options()[name]
    key = name.rpartition(".")[2]
    cells = [f"`{key}`", option.allowed, f"`{quoted(option.default)}`", option.doc]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _list_of_names(name: str) -> list[str]:
    names = known_names(name)
    if not names:
        return []
    return [f"\nNames for `{name}`:\n", *(f"- {line}" for line in names)]


def main() -> None:
    """Print the reference."""
    print(reference(), end="")


if __name__ == "__main__":
    main()
