"""Imports without garbage collection, which takes a sixth of their time and finds next to nothing.

Imports no torch: a program calls it before that is imported.
"""

import gc


def begin_imports() -> None:
    """Collect no garbage: what imports make stays to the end."""
    gc.disable()


def end_imports() -> None:
    """Collect garbage again; no collection needs to walk what has been made so far."""
    gc.freeze()
    gc.enable()
