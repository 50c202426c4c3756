"""Where this package lies, and whether its Python has what it needs. Imports nothing."""

import importlib.util
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent
_IS_INSTALLED = (_PACKAGE / "program").is_dir()

PROGRAM = _PACKAGE / "program" if _IS_INSTALLED else _CHECKOUT
"""The folder with train.py and train_configs/: the repository, or part of the installed package."""

NEEDED = (
    "torch",
    "numpy",
    "pydantic",
    "tomli",
    "xxhash",
    "sentencepiece",
    "safetensors",
    "zstandard",
)
"""What commands import at once. What only some options need is looked for where they ask for it."""


def exit_without_dependencies() -> None:
    """End with status 2 and one message where this Python lacks what every command needs.

    A command calls it before its first import of another package.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return
    activate = _CHECKOUT / ".venv" / "bin" / "activate"
    if _IS_INSTALLED:
        advice = "Install torchtrain with its dependencies."
    elif activate.exists():
        advice = f"Activate the environment that has them: source {activate}"
    else:
        script = _CHECKOUT / "run_llama_train.sh"
        advice = f"{script} makes an environment that has them; then: source {activate}"
    print(f"error: {sys.executable} has no {', '.join(missing)}. {advice}", file=sys.stderr)
    raise SystemExit(2)
