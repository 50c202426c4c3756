"""Finding silent corruption: what several ranks hold must be equal, to the bit.

Ranks with the same part of a parameter (replicas of shards, whole weights under tensor parallelism,
routers' biases) begin with the same bits and get the same sum of gradients, so they make the same
updates. A bit that flips in the memory of one of them stays, and training goes on with ranks that
have different models. The rule is the place, whatever the layout: parts of the same name and at the
same place in the whole tensor are compared.

Letters: R ranks, P parameters and buffers of the rank that has the most of them.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from torchtrain.errors import ReplicasDiffer
from torchtrain.logging_utils import logger
from torchtrain.ranks import gathered, name_ranks
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
        self.parts: list[list[str]] = []
        """Name and place of what each rank has."""
        if freq > 0:
            own = [f"{name} {find_local_box(tensor)}" for name, tensor in state.items()]
            self.parts = gathered(own)
        self.width = max(map(len, self.parts), default=0)
        self.holders = self._find_first_holders()
        """[R · P]: for each part the first place, in ranks' order, of the same part."""
        if freq > 0 and self.holders.equal(torch.arange(len(self.holders))):
            logger.warning(
                f"debug.replica_check_freq = {freq} has no effect: no two ranks hold the same part "
                "of the model"
            )
        self.holders = self.holders.to(device)

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
        row = torch.zeros(self.width, dtype=torch.int64, device=self.device)
        row[: len(hashes)] = torch.stack(hashes)
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, row)
        by_rank = torch.cat(rows)
        if not by_rank.equal(by_rank[self.holders]):
            raise ReplicasDiffer(self._describe_difference(step, by_rank.tolist()))
        self.passed = step

    def _find_first_holders(self) -> Tensor:
        first: dict[str, int] = {}
        holders = list(range(len(self.parts) * self.width))
        for rank, parts in enumerate(self.parts):
            for place, part in enumerate(parts, start=rank * self.width):
                holders[place] = first.setdefault(part, place)
        return torch.tensor(holders, dtype=torch.int64)

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

    def _describe_difference(self, step: int, by_rank: list[int]) -> str:
        """Name the first parameter that differs and the ranks, those that agree together."""
        found: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for rank, parts in enumerate(self.parts):
            for place, part in enumerate(parts, start=rank * self.width):
                found[part][by_rank[place]].append(rank)
        differing = [part for part, ranks_by_hash in found.items() if len(ranks_by_hash) > 1]
        sides = sorted(found[differing[0]].values(), key=len, reverse=True)
        names = list(dict.fromkeys(part.partition(" ")[0] for part in differing))
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
