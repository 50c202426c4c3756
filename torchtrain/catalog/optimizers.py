"""The optimizers by their names, as data. No torch here: the config check reads it."""

from torchtrain.errors import UserError
from torchtrain.utils import nearest

OPTIMIZERS = {
    "AdamW": "torchtrain.optimizers.adam:build_adamw",
    "Adam": "torchtrain.optimizers.adam:build_adam",
    "Muon": "torchtrain.optimizers.muon:build_muon",
}
"""By `optimizer.name`, the function that builds it, "module:build": from the weights by name and
the section [optimizer] to a `torch.optim.Optimizer`. A user's own file may add to it as the config
is read."""


def register_optimizer(name: str, build: str) -> None:
    """Make `optimizer.name` = name stand for what the function at `build` builds.

    Args:
        name: the optimizer.
        build: the function, "module:build", imported where the optimizer is built.

    Raises:
        UserError: another optimizer has this name.
    """
    if OPTIMIZERS.setdefault(name, build) != build:
        raise UserError(
            f"register_optimizer({name!r}): this optimizer exists already; choose another name"
        )


def find_optimizer(name: str) -> str:
    """Return the function that builds the optimizer, "module:build".

    Raises:
        UserError: unknown; names the nearest.
    """
    if name not in OPTIMIZERS:
        close = nearest(name, OPTIMIZERS)
        hint = f"; did you mean {close}?" if close else ""
        raise UserError(
            f"optimizer.name = {name!r} is unknown; allowed: {', '.join(OPTIMIZERS)}, and what "
            f"experimental.custom_import registers{hint}"
        )
    return OPTIMIZERS[name]
