"""The variables by which a launcher tells each rank its place: torchrun's, which others set too.

A shell inside a Slurm job, a notebook or a rank's debugger can leave some of them to a process that
nobody launched.
"""

from collections.abc import Mapping

from torchtrain.errors import UserError

MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a rank needs, beside WORLD_SIZE, to meet the others."""
COUNTS = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
"""How often torchrun has started the ranks again, and may."""
OF_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Is set where torchrun, or our launcher, has started this rank, and keeps a store for it."""
ADVICE = (
    "Launchers such as torchrun set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for "
    "each rank; to run one process, unset the first three"
)


def check_place(variables: Mapping[str, str]) -> None:
    """Check that the variables are those of one rank of a launch, or of a process on its own.

    Raises:
        UserError: one has an impossible value, or one of several ranks lacks some.
    """
    for name in COUNTS:
        _number(variables, name, default=0, least=0)
    world_size = _number(variables, "WORLD_SIZE", default=1, least=1)
    for name in ("RANK", "LOCAL_RANK"):
        if _number(variables, name, default=0, least=0) >= world_size:
            given = f"= {world_size}" if "WORLD_SIZE" in variables else "(1, since it is not set)"
            raise UserError(
                f"{name} = {variables[name]}: must be below WORLD_SIZE {given}. {ADVICE}"
            )
    if world_size == 1:
        return
    missing = [name for name in MEETING if not variables.get(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"WORLD_SIZE = {world_size}, but {', '.join(missing)} {verb} not set. {ADVICE}"
        )
    if _number(variables, "MASTER_PORT", default=0, least=1) > 65535:
        raise UserError(f"MASTER_PORT = {variables['MASTER_PORT']}: must be at most 65535")


def meets_in_store(variables: Mapping[str, str]) -> bool:
    """Return whether this process is to meet other ranks, or its launcher, in a store.

    A single rank meets nobody but torchrun, so it needs no MASTER_PORT.
    """
    if int(variables.get("WORLD_SIZE", "1")) > 1:
        return True
    return OF_TORCHRUN in variables and all(name in variables for name in ("WORLD_SIZE", *MEETING))


def _number(variables: Mapping[str, str], name: str, *, default: int, least: int) -> int:
    given = variables.get(name, str(default))
    if not given.isdecimal() or int(given) < least:
        raise UserError(f"{name} = {given!r}: must be a whole number >= {least}. {ADVICE}")
    return int(given)
