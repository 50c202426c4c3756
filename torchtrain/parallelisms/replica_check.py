"""Finding silent corruption: what several ranks hold must be equal, to the bit.

Ranks with the same part of a parameter (replicas of shards, whole weights under tensor parallelism,
routers' biases) begin with the same bits and get the same sum of gradients, so they make the same
updates. A bit that flips in the memory of one of them stays, and training goes on with ranks that
have different models. The rule is the place, whatever the layout: parts of the same name and at the
same place in the whole tensor are compared.

Letters: R ranks, P parameters and buffers of the rank that has the most of them.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from torchtrain.errors import ReplicasDiffer
from torchtrain.logging_utils import logger
from torchtrain.ranks import gather_rows, gathered, name_ranks
from torchtrain.shards import find_local_box, local
from torchtrain.utils import plural

CHUNK = 2**20
"""Numbers that are hashed at a time."""
BASE = 0x9E3779B97F4A7C15 - 2**64
"""Odd: multiplying a hash by it loses no bit."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Integers with a number's bits, or half of them, by its size in bytes. Of 64 bits the highest ones
of two numbers would cancel out."""


class ReplicaCheck:
    """Compares what ranks have in common; all of them call its methods together."""

    def __init__(
        self, freq: int, state: Mapping[str, Tensor], optimizer: Optimizer, device: torch.device
    ) -> None:
        """Find out which ranks have what in common.

        Args:
            freq: steps from one check to the next; 0: never.
            state: this rank's parameters and buffers by their names in the whole model.
            optimizer: its states of a parameter are hashed with it.
            device: of the computation.
        """
        self.freq = freq
        self.state = state
        self.optimizer = optimizer
        self.device = device
        self.hash = BitHash()
        self.passed: int | None = None
        """The step of this launch's last check that found no difference."""
        self.parts: list[str] = []
        """Name and place of what this rank has."""
        self.width = 0
        self.holders = torch.empty(0, dtype=torch.int64)
        """[R · P]: for each part the first place, in ranks' order, of the same part."""
        if freq > 0:
            self.parts = [f"{name} {find_local_box(tensor)}" for name, tensor in state.items()]
            self.width = max(gathered(len(self.parts)))
            self.holders = self._find_first_holders()
            if not self.counts_of_own_parts().gt(1).any():
                logger.warning(
                    f"debug.replica_check_freq = {freq} has no effect: no two ranks hold the same "
                    "part of the model"
                )

    def is_due(self, step: int) -> bool:
        """Return whether to check after this step."""
        return self.freq > 0 and step % self.freq == 0

    @torch.no_grad()
    def run(self, step: int) -> None:
        """Check that what ranks have in common is the same after this step.

        Hashes, made on the device, are gathered in one collective, 8·P bytes of each rank.

        Raises:
            ReplicasDiffer: it is not; the same on all ranks.
        """
        hashes = [self._hash_with_states(tensor) for tensor in self.state.values()]
        by_rank = self._gather(torch.stack(hashes))
        if not by_rank.equal(by_rank[self.holders]):
            raise ReplicasDiffer(self._describe_difference(step, by_rank))
        self.passed = step

    def counts_of_own_parts(self) -> Tensor:
        """Return how many ranks hold each part of this rank, in its order."""
        counts = self.holders.bincount()[self.holders]
        first = dist.get_rank() * self.width
        return counts[first : first + len(self.parts)]

    def _gather(self, values: Tensor) -> Tensor:
        """Return all ranks' values [R · P], int64; zeros fill up those of ranks with fewer."""
        row = torch.zeros(self.width, dtype=torch.int64, device=self.device)
        row[: len(values)] = values
        return gather_rows(row).flatten()

    def _find_first_holders(self) -> Tensor:
        """Return `holders`. Of the ranks' names only hashes travel: thousands of ranks have many.

        With a million different parts two have one hash of 64 bits once in 10^7 models.
        """
        digests = [hashlib.sha256(part.encode()).digest()[:8] for part in self.parts]
        hashes = [int.from_bytes(digest, "big", signed=True) for digest in digests]
        kinds, kind_of = self._gather(torch.tensor(hashes)).unique(return_inverse=True)
        places = torch.arange(len(kind_of), device=self.device)
        first = places.new_full(kinds.shape, len(places))
        return first.scatter_reduce(0, kind_of, places, "amin")[kind_of]

    def _hash_with_states(self, tensor: Tensor) -> Tensor:
        total = self.hash(local(tensor)).to(self.device)
        for state in self._states_of(tensor):
            total = total * BASE + self.hash(local(state)).to(self.device)
        return total

    def _states_of(self, tensor: Tensor) -> Iterator[Tensor]:
        states = self.optimizer.state.get(tensor, {})
        for key in sorted(states, key=str):
            value = states[key]
            if isinstance(value, float):
                value = torch.tensor(value, dtype=torch.float64)  # which holds all of it
            if isinstance(value, Tensor | int):
                yield torch.as_tensor(value)

    def _describe_difference(self, step: int, by_rank: Tensor) -> str:
        """Name the first parameter that differs and the ranks, those that agree together."""
        differing = self.holders[by_rank != by_rank[self.holders]].unique().tolist()
        first = dist.get_rank() * self.width
        own = range(first, first + len(self.parts))
        named = gathered([self.parts[place - first] for place in differing if place in own])
        names = list(dict.fromkeys(part.partition(" ")[0] for parts in named for part in parts))
        found: dict[int, list[int]] = defaultdict(list)
        for place in (self.holders == differing[0]).nonzero().flatten().tolist():
            found[int(by_rank[place])].append(place // self.width)
        sides = sorted(found.values(), key=len, reverse=True)
        others = f" (and {plural(len(names) - 1, 'other parameter')})" if len(names) > 1 else ""
        before = "there was no earlier check in this launch"
        if self.passed is not None:
            before = f"the check after step {self.passed} found no difference"
        return (
            f"step {step}: silent corruption: {names[0]}{others}, or what the optimizer keeps for "
            f"it, must be the same to the bit on all ranks that hold it, but differs between "
            f"{' and '.join(map(name_ranks, sides))}; {before}. Checkpoints saved since then may "
            "hold the fault: go on from an earlier one with checkpoint.load_step, and have the "
            "memory and the devices of these ranks tested"
        )


class BitHash:
    """Hashes the bits of a tensor, on its device and without a copy of all of it.

    Each number's bits, as an integer, are multiplied by a factor of their place and added up,
    modulo 2^64. The factors are odd: another value of a single number always changes the hash; of
    several, all but certainly. Sums of integers are the same in any order.
    """

    def __init__(self) -> None:
        self.factors: dict[torch.device, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the hash: 0-dim, int64, on the tensor's device."""
        if tensor.device not in self.factors:
            random = torch.randint(
                -(2**62), 2**62, (CHUNK,), generator=torch.Generator().manual_seed(0)
            )
            self.factors[tensor.device] = (2 * random + 1).to(tensor.device)
        factors = self.factors[tensor.device]
        bits = tensor.reshape(-1).contiguous().view(WORDS[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for words in bits.split(CHUNK):
            total = total * BASE + (words * factors[: len(words)]).sum()
        return total
