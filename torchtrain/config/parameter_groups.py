"""Which parameters a group of `optimizer.groups` is for, by their full names."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torchtrain.config.schema import ParameterGroup
from torchtrain.config.toml import quoted
from torchtrain.errors import SharedUserError
from torchtrain.utils import nearest


def find_group(name: str, groups: Sequence[ParameterGroup]) -> int | None:
    """Return the number of the parameter's group, None where no pattern matches its name."""
    numbers = (n for n, group in enumerate(groups) if fnmatchcase(name, group.pattern))
    return next(numbers, None)


def check_groups(names: Iterable[str], groups: Sequence[ParameterGroup]) -> None:
    """Check that each pattern matches a parameter of the whole model, and no other's.

    Raises:
        SharedUserError: names the pattern, or the parameter and its patterns.
    """
    names = list(names)
    for group in groups:
        if not any(fnmatchcase(name, group.pattern) for name in names):
            close = nearest(group.pattern, names) or names[0]
            raise SharedUserError(
                f"optimizer.groups: {quoted(group.pattern)} matches no parameter of the model; "
                f"their names are such as {close}, and * stands for any text"
            )
    for name in names:
        found = [group.pattern for group in groups if fnmatchcase(name, group.pattern)]
        if len(found) > 1:
            raise SharedUserError(
                f"optimizer.groups: {name} is matched by {quoted(found[0])} and by "
                f"{quoted(found[1])}; a parameter can be in one group"
            )
