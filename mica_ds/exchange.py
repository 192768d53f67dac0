"""Shards to their owners: who solves which matrix, and what travels for it.

Two routes. *Ship*: the slices of W go to its owner, which factors it: 2 · out · in bytes in all for bf16. *Gram*: each
rank multiplies the rows it holds, and fp64 Grams are summed at the owner: about 4 K² bytes for each other rank, then
one round trip for the vectors through W. The Gram pays where a matrix is long against K and the ranks are few, or where
an owner has no room for W.
"""

import ctypes
import functools
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch

from mica_ds import comm, factor, process, solver, symmetric
from mica_ds.shards import Matrix, Shard, whole_at

_TILE = 512  # rows of a Gram that are summed at a time
# Compute capabilities of P100, V100, A100, H100 and B200; other GPUs have a 32nd of fp32's speed or less.
_FAST_FP64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


@dataclass(frozen=True)
class Machine:
    """What the choices depend on."""

    ranks: int
    itemsize: int
    """Bytes of a stored element."""
    memory: int
    """Bytes that the rank with the least room has for a solve."""


def measure_machine(itemsize: int) -> Machine:
    """Look at the ranks' memory. Collective."""
    nodes = comm.gather((socket.gethostname(), process.free_memory()))
    hosts = [host for host, _ in nodes]
    return Machine(comm.world_size(), itemsize, min(free // hosts.count(host) for host, free in nodes))


def choose_route(matrix: Matrix, r: int, machine: Machine, asked: str = "auto") -> str:
    """`ship` or `gram` for one matrix: what was asked, or the cheaper in bytes received of those that fit. Local.

    A matrix that is stored short side first is cut across its long rows: its Gram would need columns, which costs as
    much as shipping it.
    """
    rows, columns = matrix.stored_shape
    if asked == "ship" or machine.ranks == 1 or rows < columns or factor.choose_factor(matrix.shape, r) == "eigh":
        return "ship"
    if asked == "gram":
        return "gram"
    whole = machine.itemsize * rows * columns
    ship, gram = shipped_bytes(matrix, machine), gram_bytes(matrix, r, machine)
    fits = whole + 8 * columns**2 <= machine.memory
    return "ship" if (fits and ship <= gram) or rows == columns else "gram"


def choose_device(matrix: Matrix, asked: str = "auto") -> torch.device:
    """Where the owner solves a matrix that was shipped to it: on its GPU, if that pays, or on its CPU. Local.

    It pays where fp64 runs at half the speed of fp32, and there is room for W, the blocks, and for the whole solve that
    may take over: the Gram before and its inverse factor, the Gram, its eigenvectors and cuSOLVER's workspace.
    """
    host = torch.device("cpu")
    if asked == "cpu" or not torch.cuda.is_available() or torch.cuda.get_device_capability() not in _FAST_FP64:
        return host
    k, long = min(matrix.shape), max(matrix.shape)
    needed = 4 * k * long + 8 * 8 * k * k + (1 << 30)
    return torch.device("cuda") if needed <= torch.cuda.mem_get_info()[0] else host


def shipped_bytes(matrix: Matrix, machine: Machine) -> int:
    """Bytes received at the owner where the slices are equal. Local."""
    return machine.itemsize * math.prod(matrix.stored_shape) * (machine.ranks - 1) // machine.ranks


def gram_bytes(matrix: Matrix, r: int, machine: Machine) -> int:
    """Bytes received by all ranks: lower triangles to the owner, then X to all, Y and T Y back. Local.

    gloo sums in a ring and then collects the parts: each sum costs 1 + 1 / P of what the owner needs of P − 1 ranks.
    """
    rows, columns = matrix.stored_shape
    width = factor.block_width(r)
    triangle, vectors = columns * (columns + _TILE) // 2, width * (2 * columns + rows // machine.ranks)
    return (machine.ranks - 1) * 8 * (triangle + triangle // machine.ranks + vectors)


def assign_owners(matrices: list[Matrix], r: int, ranks: int) -> list[int]:
    """The owner of each matrix: longest processing time first, each to the least loaded rank. Local."""
    costs = [factor.cost(matrix.shape, r) for matrix in matrices]
    load = [0.0] * ranks
    owners = [0] * len(matrices)
    for i in sorted(range(len(matrices)), key=lambda i: -costs[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def ship(shards: list[Shard], owners: list[int]) -> Iterator[tuple[int, Callable[[], torch.Tensor]]]:
    """Yield (index, what returns W (out, in)) of each matrix that this rank owns. Collective.

    All sends are started first and run in the background: no rank waits for another's solve before it begins its own.
    A rank receives out · in elements for each matrix it owns, less its own slice, and holds one matrix at a time if the
    caller lets go of each before it asks for the next. Each must be asked for: others are sending it.
    """
    rank = comm.rank()
    sends = []
    for i, (shard, owner) in enumerate(zip(shards, owners, strict=True)):
        if owner != rank and shard.bounds[rank] < shard.bounds[rank + 1]:
            sends += _send(shard, shard.read(), whole_at(owner, shard.matrix), tag=i)
    for i, (shard, owner) in enumerate(zip(shards, owners, strict=True)):
        if owner == rank:
            yield i, functools.partial(_receive_whole, shard, owner, tag=i)
    comm.wait(sends)


def _receive_whole(shard: Shard, owner: int, tag: int) -> torch.Tensor:
    matrix = shard.matrix
    W = _receive(shard, shard.read(), whole_at(owner, matrix), tag).view(matrix.stored_shape)
    return W.T if matrix.is_transposed else W


def sum_grams(shards: list[Shard], owners: list[int], r: int) -> Iterator[tuple[int, solver.Solution | None]]:
    """Yield (index, solution) of each matrix that this rank owns, by the Gram route; None where it failed. Collective.

    In rounds of as many matrices as there are ranks, each with another owner: their Grams are summed first, so that the
    owners solve side by side. A rank holds the one Gram that it owns, and a tile of another.
    """
    ranks = comm.world_size()
    for first in range(0, len(shards), ranks):
        yield from _sum_round(shards, owners, range(first, min(first + ranks, len(shards))), r)
        # glibc keeps what was freed, up to a Gram and more (measured), while the next round or a shipped W needs room.
        ctypes.CDLL(None).malloc_trim(0)


def _sum_round(
    shards: list[Shard], owners: list[int], batch: range, r: int
) -> Iterator[tuple[int, solver.Solution | None]]:
    parts = {i: _whole_rows(shards[i]) for i in batch}
    sums = [_sum_gram(parts[i], owners[i]) for i in batch]  # all of them before the first is factored
    mine: factor.Factored | None = None
    for G_KK in sums:
        if G_KK is not None:
            with suppress(*symmetric.FAILURES):  # then there are no columns to multiply
                mine = factor.factor_gram(G_KK, r, is_refined=False)
    for i in batch:
        is_mine = owners[i] == comm.rank()
        nothing = torch.empty(shards[i].matrix.stored_shape[1], 0, dtype=torch.float64)
        X_KQ = comm.broadcast((mine.start_KQ if mine else nothing) if is_mine else None, owners[i])
        Y_LQ, Z_KQ = factor.multiply(parts[i].T, X_KQ)
        comm.sum_to(Z_KQ, owners[i])
        Y_LQ = comm.gather_rows(Y_LQ, owners[i])
        if is_mine:
            is_left = shards[i].matrix.is_transposed
            yield i, solver.finish(mine, Y_LQ, Z_KQ, r, is_left) if mine else None


def _whole_rows(shard: Shard) -> torch.Tensor:
    """The stored rows that begin in this rank's slice, completed from the next slices: (rows, columns)."""
    columns = shard.matrix.stored_shape[1]
    wanted = [-(-bound // columns) * columns for bound in shard.bounds]
    values = shard.read()
    sends = _send(shard, values, wanted, tag=0)
    rows = _receive(shard, values, wanted, tag=0).view(-1, columns)
    comm.wait(sends)
    return rows


def _sum_gram(rows_PK: torch.Tensor, owner: int) -> torch.Tensor | None:
    """The lower triangle of the Gram of all ranks' rows, fp64, at the owner; None elsewhere. Collective."""
    k = rows_PK.shape[1]
    G_KK = symmetric.zeros(k, torch.device("cpu")) if owner == comm.rank() else None
    tiles, casts = (torch.empty(_TILE * k, dtype=torch.float64) for _ in range(2))
    for start in range(0, k, _TILE):
        stop = min(start + _TILE, k)
        tile = tiles[: (stop - start) * stop].view(-1, stop).zero_()
        for part in rows_PK.split(_TILE):
            fp64 = casts[: len(part) * stop].view(-1, stop).copy_(part[:, :stop])
            tile.addmm_(fp64[:, start:].T, fp64)
        comm.sum_to(tile, owner)
        if G_KK is not None:
            G_KK[start:stop, :stop] = tile
    return G_KK


def _send(shard: Shard, values: torch.Tensor, wanted: list[int], tag: int) -> list[comm.Work]:
    """Start sending what other ranks want of this rank's slice."""
    rank = comm.rank()
    begin = shard.bounds[rank]
    sends = []
    for target in range(comm.world_size()):
        start, stop = _overlap(shard.bounds, rank, wanted, target)
        if target != rank and start < stop:
            sends.append(comm.send(values[start - begin : stop - begin], target, tag))
    return sends


def _receive(shard: Shard, values: torch.Tensor, wanted: list[int], tag: int) -> torch.Tensor:
    """What this rank wants of the flattened matrix, from the slices of all."""
    rank = comm.rank()
    if shard.bounds[rank] == wanted[rank] and shard.bounds[rank + 1] == wanted[rank + 1]:
        return values
    flat = torch.empty(wanted[rank + 1] - wanted[rank], dtype=values.dtype)
    receives = []
    for source in range(comm.world_size()):
        start, stop = _overlap(shard.bounds, source, wanted, rank)
        if start >= stop:
            continue
        part = flat[start - wanted[rank] : stop - wanted[rank]]
        if source == rank:
            part.copy_(values[start - shard.bounds[rank] : stop - shard.bounds[rank]])
        else:
            receives.append(comm.receive(part, source, tag))
    comm.wait(receives)
    return flat


def _overlap(bounds: list[int], source: int, wanted: list[int], target: int) -> tuple[int, int]:
    """The elements that one rank holds and another wants."""
    return max(bounds[source], wanted[target]), min(bounds[source + 1], wanted[target + 1])
