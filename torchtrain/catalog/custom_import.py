"""Importing the user's own code, which adds to the catalog."""

import importlib
import sys
import traceback
from pathlib import Path

from torchtrain.errors import UserError
from torchtrain.utils import expand_user


def import_custom(given: str) -> None:
    """Import what `experimental.custom_import` names: a dotted module, or a path that ends in .py.

    The working directory, or the file's folder, goes to the end of Python's search path, so that
    the code can import what lies beside it and shadows nothing.

    Raises:
        UserError: not found, or any error of the code, with file and line.
    """
    option = f"experimental.custom_import = {given!r}"
    path = expand_user(given).absolute() if given.endswith(".py") else None
    if path and not path.is_file():
        raise UserError(f"{option}: there is no such file (looked from {Path.cwd()})")
    folder = str(path.parent if path else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec = importlib.import_module(path.stem if path else given).__spec__
    except UserError as error:
        raise UserError(f"{option}: {error}") from error
    except (Exception, SystemExit) as error:
        missing = _missing_module(given, error)
        if missing:
            raise UserError(
                f"{option}: there is no module {missing!r}; give a dotted module name that can be "
                f"imported from {folder} or PYTHONPATH, or the path of a .py file"
            ) from error
        where = user_location(error)
        raise UserError(f"{option}: {where}: {type(error).__name__}: {error}") from error
    if path and (spec is None or Path(str(spec.origin)).resolve() != path.resolve()):
        raise UserError(
            f"{option}: Python already has a module named {path.stem!r}; rename the file"
        )


def _missing_module(given: str, error: BaseException) -> str | None:
    """Return the module that was given, or the package that would hold it, where it is missing."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    return error.name if f"{given}.".startswith(f"{error.name}.") else None


def user_location(error: BaseException) -> str:
    """Return file and line of the user's code in which `error` came up.

    It is the last line in the first file of the traceback that is neither ours nor Python's own.
    """
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    others = (str(Path(__file__).parents[1]), "<frozen importlib", importlib.__file__)
    last_lines = {
        frame.filename: frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(others)
    }
    if not last_lines:
        return "at its import"
    file = next(iter(last_lines))
    return f"{file}:{last_lines[file]}"
