"""The nodes of a run, as torchrun's environment variables name them.

No torch here: this is read before the config, which is to be answered at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torchtrain.errors import UserError

DEFAULT_PORT = 29500  # torchrun's
DEFAULT_ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run, as one of them sees them."""

    count: int
    rank: int
    """This node's number, from 0."""
    address: str
    port: int
    """Where node 0 is met."""
    static: bool
    """Whether torchrun's static rendezvous is used, so that numbers and address mean something."""
    least: int = 0
    """MIN of NNODES = MIN:MAX, where `count` is MAX; 0: the number of nodes is fixed."""

    @property
    def is_elastic(self) -> bool:
        """Whether nodes may come and go while the run goes on."""
        return self.least > 0

    @property
    def endpoint(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def meet_here(self) -> bool:
        """Whether node 0 serves the store: torchrun does so with its static rendezvous."""
        return self.static and self.count > 1 and not self.is_elastic


def read_nodes(variables: Mapping[str, str]) -> Nodes:
    """Read torchrun's PET_ variables.

    Raises:
        UserError: one of them has an impossible value.
    """
    static = variables.get("PET_RDZV_BACKEND", "static") == "static"
    least, count = _read_count(variables)
    if least and not static:
        backend = variables["PET_RDZV_BACKEND"]
        raise UserError(
            f"RDZV_BACKEND = {backend!r}: must be left out with NNODES = MIN:MAX, for which the "
            "nodes meet at MASTER_ADDR:MASTER_PORT"
        )
    rank = _number(variables, "NODE_RANK", "0", 0, count - 1 if static else None)
    port = _number(variables, "MASTER_PORT", str(DEFAULT_PORT), 1, 65535)
    address = variables.get("PET_MASTER_ADDR", DEFAULT_ADDRESS)
    endpoint = variables.get("PET_RDZV_ENDPOINT", "")
    if static and endpoint:
        address, _, given_port = endpoint.rpartition(":")
        if not (address and given_port.isdigit()):
            raise UserError(f"RDZV_ENDPOINT = {endpoint!r}: must be HOST:PORT")
        port = int(given_port)
    return Nodes(count=count, rank=rank, address=address, port=port, static=static, least=least)


def _read_count(variables: Mapping[str, str]) -> tuple[int, int]:
    """Return MIN, 0 where the number is fixed, and MAX of NNODES."""
    given = variables.get("PET_NNODES", "1")
    least, colon, most = given.partition(":")
    if not colon:
        return 0, _number(variables, "NNODES", "1", 1, None)
    if not (least.isdigit() and most.isdigit() and 1 <= int(least) <= int(most)):
        raise UserError(
            f"NNODES = {given!r}: must be a whole number at least 1, or MIN:MAX, with MIN at least "
            "1 and at most MAX"
        )
    return int(least), int(most)


def _number(
    variables: Mapping[str, str], name: str, default: str, least: int, largest: int | None
) -> int:
    given = variables.get(f"PET_{name}", default)
    allowed = f"at least {least}" if largest is None else f"from {least} to {largest}"
    if not given.isdigit() or int(given) < least or (largest is not None and int(given) > largest):
        of_how_many = " (NNODES - 1)" if name == "NODE_RANK" and largest is not None else ""
        raise UserError(f"{name} = {given!r}: must be a whole number {allowed}{of_how_many}")
    return int(given)
