"""Work on whole matrices of which each rank has a part, shared over those ranks.

Each matrix has one owner among the ranks that hold some of it. One all-to-all brings it the parts
of every matrix that it owns, it computes what is wanted of each, and a second one hands every rank
its part of the results: each element travels once each way, where gathering would send it to all.
The copies of a matrix on replicas have one owner together, so that replicas share the work, too.

The exchanges are made by all ranks of the run, once for all weights: stages of a pipeline and
experts, whose ranks are others, need no groups of their own.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtrain.shards import Box, find_box


@dataclass(frozen=True)
class Matrix:
    """A weight of two dimensions, or one of those that a weight of three has stacked."""

    weight: int
    """Number of the weight."""
    row: int | None
    """Where it is in the stack; None: it is the weight."""
    rows: int
    columns: int

    @property
    def cost(self) -> int:
        """The operations of a product of the matrix with the smaller of its Gram matrices."""
        return self.rows * self.columns * min(self.rows, self.columns)


@dataclass(frozen=True)
class Part:
    """A part of a matrix that goes to another rank, or comes from it."""

    matrix: int
    """Number of the matrix."""
    peer: int
    """The other rank; it may be this one."""
    row: int | None
    """The matrix in the holder's part of the stack; None: it is no stack."""
    box: Box
    """In the whole matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        (_, rows), (_, columns) = self.box
        return rows, columns


class Holding:
    """Which rank has what of a weight."""

    def __init__(self, weight: Tensor, here: int) -> None:
        """Find it for every rank that shares the weight; a plain tensor is whole on rank `here`."""
        self.boxes = {here: [(0, length) for length in weight.shape]}
        self.replicas: dict[int, tuple[int, ...]] = {here: ()}
        self.holders: dict[int | None, list[int]] = {}
        if not isinstance(weight, DTensor):
            return
        mesh = weight.device_mesh.mesh
        copied = [dim for dim, each in enumerate(weight.placements) if each.is_replicate()]
        self.boxes, self.replicas = {}, {}
        for place in torch.cartesian_prod(*map(torch.arange, mesh.shape)).view(-1, mesh.ndim):
            coordinate = place.tolist()
            rank = int(mesh[tuple(coordinate)])
            self.boxes[rank] = find_box(weight, coordinate)
            self.replicas[rank] = tuple(coordinate[dim] for dim in copied)

    def find_holders(self, matrix: Matrix) -> list[int]:
        """Return the ranks that have some of the matrix."""
        if matrix.row not in self.holders:
            self.holders[matrix.row] = [
                rank for rank in self.boxes if self.find_part(0, matrix, rank, rank) is not None
            ]
        return self.holders[matrix.row]

    def find_part(self, number: int, matrix: Matrix, rank: int, peer: int) -> Part | None:
        """Return what `rank` has of the matrix, to be exchanged with `peer`; None: nothing."""
        box = self.boxes[rank]
        row = None
        if matrix.row is not None:
            (start, length), *box = box
            row = matrix.row - start
            if not 0 <= row < length:
                return None
        part = Part(number, peer, row, box)
        return part if all(part.shape) else None


class SharedWork:
    """What this rank sends and receives so that each matrix is computed once."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """Choose the owners, the same on all ranks that share these weights.

        Args:
            weights: of two or three dimensions, plain or sharded, in an order that these ranks have
                in common.
        """
        here = dist.get_rank() if dist.is_initialized() else 0
        holdings = find_holdings(weights, here)
        self.matrices = list(list_matrices(weights))
        owners = choose_owners(self.matrices, holdings)
        there, back = Transfer(), Transfer()
        for number, (matrix, owner) in enumerate(zip(self.matrices, owners, strict=True)):
            holding = holdings[matrix.weight]
            # An owner gathers a matrix from its own replica: that is the nearest.
            replica = holding.replicas[owner]
            own = holding.find_part(number, matrix, here, owner)
            if own is not None:
                back.received.append(own)
                if holding.replicas[here] == replica:
                    there.sent.append(own)
            for rank in holding.boxes if owner == here else ():
                part = holding.find_part(number, matrix, rank, rank)
                if part is not None:
                    back.sent.append(part)
                    if holding.replicas[rank] == replica:
                        there.received.append(part)
        self.there = there.sorted()
        self.back = back.sorted()

    def run(
        self, parts: Sequence[Tensor], work: Callable[[Tensor], Tensor], like: Tensor
    ) -> list[Tensor]:
        """Return this rank's part of the results, shaped as `parts`. A collective call of all.

        Args:
            parts: of each weight this rank's, in the type and on the device of `like`.
            work: from a whole matrix to another of its shape.
            like: any tensor.
        """
        own = [select(parts, self.matrices, part) for part in self.there.sent]
        arrived = self.there.run(own, like)
        pieces = defaultdict(list)
        for part, piece in zip(self.there.received, arrived, strict=True):
            pieces[part.matrix].append((part, piece))
        results = {}
        for number, of_matrix in pieces.items():
            matrix = self.matrices[number]
            whole = like.new_empty(matrix.rows, matrix.columns)
            for part, piece in of_matrix:
                cut(whole, part).copy_(piece)
            results[number] = work(whole)
        returned = self.back.run([cut(results[part.matrix], part) for part in self.back.sent], like)
        updated = [torch.empty_like(part) for part in parts]
        for part, piece in zip(self.back.received, returned, strict=True):
            select(updated, self.matrices, part).copy_(piece)
        return updated


class Transfer:
    """An all-to-all between the ranks of the run."""

    def __init__(self) -> None:
        self.sent: list[Part] = []
        self.received: list[Part] = []

    def sorted(self) -> "Transfer":
        """Return the same with its parts by rank; those for one rank keep the matrices' order."""
        ordered = Transfer()
        ordered.sent = sorted(self.sent, key=lambda part: part.peer)
        ordered.received = sorted(self.received, key=lambda part: part.peer)
        return ordered

    def run(self, pieces: Iterable[Tensor], like: Tensor) -> list[Tensor]:
        """Send the pieces of `sent`, and return those of `received`."""
        outgoing = torch.cat([like.new_empty(0), *(piece.flatten() for piece in pieces)])
        if not dist.is_initialized() or dist.get_world_size() == 1:
            incoming = outgoing
        else:
            sizes = count_elements(self.received)
            incoming = outgoing.new_empty(sum(sizes))
            dist.all_to_all_single(incoming, outgoing, sizes, count_elements(self.sent))
        lengths = [part.shape[0] * part.shape[1] for part in self.received]
        return [
            piece.view(part.shape)
            for part, piece in zip(self.received, incoming.split(lengths), strict=True)
        ]


def find_holdings(weights: Sequence[Tensor], here: int) -> list[Holding]:
    """Return which rank has what of each weight; found once for those that are laid out alike."""
    known: dict[object, Holding] = {}
    holdings = []
    for weight in weights:
        key: object = weight.shape
        if isinstance(weight, DTensor):
            key = (weight.shape, weight.device_mesh, weight.placements)
        if key not in known:
            known[key] = Holding(weight, here)
        holdings.append(known[key])
    return holdings


def list_matrices(weights: Iterable[Tensor]) -> Iterable[Matrix]:
    """Yield the matrices of the weights in their order."""
    for number, weight in enumerate(weights):
        rows, columns = weight.shape[-2:]
        for row in range(weight.shape[0]) if weight.ndim == 3 else (None,):
            yield Matrix(number, row, rows, columns)


def choose_owners(matrices: Sequence[Matrix], holdings: Sequence[Holding]) -> list[int]:
    """Return the owner of each matrix: the largest go first, to the holder with least to do."""
    owners = [0] * len(matrices)
    loads: Counter[int] = Counter()
    queues: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for number in sorted(range(len(matrices)), key=lambda number: -matrices[number].cost):
        matrix = matrices[number]
        holders = tuple(sorted(holdings[matrix.weight].find_holders(matrix)))
        # By load, then rank. A load may have grown since it was put there, so that a rank is moved
        # back when it comes up: a search of thousands of ranks for each matrix would take long.
        queue = queues.setdefault(holders, [(0, rank) for rank in holders])
        while queue[0][0] != loads[queue[0][1]]:
            rank = queue[0][1]
            heapq.heapreplace(queue, (loads[rank], rank))
        owners[number] = queue[0][1]
        loads[owners[number]] += matrix.cost
    return owners


def count_elements(parts: Iterable[Part]) -> list[int]:
    """Return how many elements each rank of the run has of these parts."""
    sizes = [0] * dist.get_world_size()
    for part in parts:
        rows, columns = part.shape
        sizes[part.peer] += rows * columns
    return sizes


def select(locals_: Sequence[Tensor], matrices: Sequence[Matrix], part: Part) -> Tensor:
    """Return what the part is of the holder's tensors, sharing their memory."""
    local = locals_[matrices[part.matrix].weight]
    return local if part.row is None else local[part.row]


def cut(whole: Tensor, part: Part) -> Tensor:
    """Return what the part is of a whole matrix, sharing its memory."""
    (top, rows), (left, columns) = part.box
    return whole[top : top + rows, left : left + columns]
