"""Whether what a rank takes fits into a device's memory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torchtrain.metrics import GIB

if TYPE_CHECKING:  # the launcher needs this file, and not what that one imports
    from torchtrain.tools.preflight.walk import RankMemory

ALLOCATOR_SHARE = 0.05
"""What is reserved beyond the tensors and the free blocks that are known of, as a share of both:
kernels' workspaces, blocks that come back late since another stream used them. An assumption."""

FITS_BELOW = 0.9
"""Share of the memory up to which a run surely fits: the device's context, NCCL's buffers and
kernels' workspaces, which are not tensors, take some GiB."""


@dataclass(frozen=True)
class Verdict:
    """What a rank takes of a device's memory."""

    reserved: float
    """Bytes that the allocator reserves."""
    memory: float
    """The device's, in bytes."""

    @classmethod
    def of(cls, rank: "RankMemory", memory_gib: float) -> "Verdict":
        """Judge what a rank takes."""
        return cls(rank.allocated * (1 + ALLOCATOR_SHARE), memory_gib * GIB)

    @property
    def word(self) -> Literal["fits", "tight", "does not fit"]:
        """The verdict."""
        if self.reserved > self.memory:
            return "does not fit"
        return "fits" if self.reserved < FITS_BELOW * self.memory else "tight"
