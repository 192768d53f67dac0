"""Shards to their owners, by the routes and with the help that `schedule` chose.

An owner gives its helper the last quarter of T's columns (T as in `factor`), unless that is in the helper's slice. Each
sums the Gram of its part, and the helper gives its one back, strip by strip, and then the diagonal.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import psutil
import torch

from mica_ds import comm, factor, solver, symmetric
from mica_ds.schedule import TILE, Assignment
from mica_ds.shards import Shard, whole_at

_PART = 1024  # stored rows of a quarter that are sent at a time: a wide one is copied for that
_TAG = 1 << 30  # the tag of what owners and helpers exchange, apart from those of slices: the matrices' indices


@dataclass(frozen=True)
class Received:
    """A matrix at its owner, ready to be solved."""

    W_MN: torch.Tensor
    """(out, in)."""
    gram_KK: torch.Tensor | None
    """What `factor.shared_gram` makes of it, where a helper has summed its part."""
    seconds: float
    """For the Gram, with the wait for the helper."""


def ship(shards: list[Shard], assignment: Assignment) -> Iterator[tuple[int, Callable[[], Received]]]:
    """Yield (index, what receives it) of each matrix that this rank owns. Collective.

    All sends are started first and run in the background: no rank waits for another's solve before it begins its own.
    Owners and helpers begin with what they share. A rank receives out · in elements for each matrix it owns, less its
    own slice, and with a helper about 2 K² bytes more; a helper at most a quarter of W. It holds one matrix at a time
    if the caller lets go of each before it asks for the next. Each must be asked for: others are sending it.
    """
    rank = comm.rank()
    sends = []
    for i, (shard, owner) in enumerate(zip(shards, assignment.owners, strict=True)):
        if owner != rank and _holds_slice(shard, rank):
            sends += _send(shard, shard.read(), whole_at(owner, shard.matrix), tag=i)
    for i, helper in assignment.helpers.items():
        if helper == rank:
            sends += _help(shards[i], assignment.owners[i])
    owned = [i for i, owner in enumerate(assignment.owners) if owner == rank]
    for i in sorted(owned, key=lambda i: i not in assignment.helpers):
        yield i, functools.partial(_receive_whole, shards[i], assignment.helpers.get(i), tag=i)
    comm.wait(sends)


def _receive_whole(shard: Shard, helper: int | None, tag: int) -> Received:
    matrix = shard.matrix
    stored = _receive(shard, shard.read(), whole_at(comm.rank(), matrix), tag).view(matrix.stored_shape)
    started = time.perf_counter()
    gram_KK = None if helper is None else _share_gram(shard, stored, helper)
    W_MN = stored.T if matrix.is_transposed else stored
    return Received(W_MN, gram_KK, time.perf_counter() - started)


def _share_gram(shard: Shard, stored: torch.Tensor, helper: int) -> torch.Tensor:
    is_long = len(stored) > stored.shape[1]
    first = factor.first_columns(max(stored.shape))
    if not _holds_slice(shard, helper):
        for part in (stored[first:] if is_long else stored[:, first:]).split(_PART):
            comm.wait([comm.send(part.contiguous(), helper, _TAG)])
    G_KK = factor.gram(stored[:first].T if is_long else stored[:, :first], torch.float32)
    for rows in symmetric.strips(len(G_KK)):
        strip = torch.empty(rows.stop - rows.start, rows.stop)
        comm.wait([comm.receive(strip, helper, _TAG)])
        symmetric.add_strip(G_KK, rows, strip)
    diagonal = torch.empty(len(G_KK))
    comm.wait([comm.receive(diagonal, helper, _TAG)])
    G_KK.diagonal().add_(diagonal)
    return G_KK


def _help(shard: Shard, owner: int) -> list[comm.Work]:
    """The other side of `_share_gram`, which takes longer: its strips, 2 K² bytes, wait for the owner to take them."""
    G_KK = factor.gram(_last_quarter(shard, owner), torch.float32, to_lower=False)
    copied = functools.partial(torch.clone, memory_format=torch.contiguous_format)  # so that the Gram is let go
    strips = [copied(symmetric.read_strip(G_KK, rows)) for rows in symmetric.strips(len(G_KK))]
    return [comm.send(strip, owner, _TAG) for strip in [*strips, G_KK.diagonal().clone()]]


def _last_quarter(shard: Shard, owner: int) -> torch.Tensor:
    """The columns of T of which this rank sums the Gram."""
    rows, columns = shard.matrix.stored_shape
    first, rank, values = factor.first_columns(max(rows, columns)), comm.rank(), shard.read()
    if _holds_slice(shard, rank):  # of two, and the long side is cut: it holds the second half
        return values[first * columns - shard.bounds[rank] :].view(-1, columns).T
    last = torch.empty((rows - first, columns) if rows > columns else (rows, columns - first), dtype=values.dtype)
    for part in last.split(_PART):
        comm.wait([comm.receive(part, owner, _TAG)])
    return last.T if rows > columns else last


def _holds_slice(shard: Shard, rank: int) -> bool:
    return shard.bounds[rank] < shard.bounds[rank + 1]


def sum_grams(shards: list[Shard], owners: list[int], r: int) -> Iterator[tuple[int, solver.Solution | None]]:
    """Yield (index, solution) of each matrix that this rank owns, by the Gram route; None where it failed. Collective.

    In rounds of as many matrices as there are ranks, each with another owner: their Grams are summed first, so that the
    owners solve side by side. A rank holds the one Gram that it owns, and a tile of another.
    """
    ranks = comm.world_size()
    for first in range(0, len(shards), ranks):
        yield from _sum_round(shards, owners, range(first, min(first + ranks, len(shards))), r)
        # glibc keeps what was freed, up to a Gram and more (measured), while the next round or a shipped W needs room.
        psutil.heap_trim()


def _sum_round(
    shards: list[Shard], owners: list[int], batch: range, r: int
) -> Iterator[tuple[int, solver.Solution | None]]:
    parts = {i: _whole_rows(shards[i]) for i in batch}
    sums = [_sum_gram(parts[i], owners[i]) for i in batch]  # all of them before the first is factored
    mine: factor.Factored | None = None
    for G_KK in sums:
        if G_KK is not None:
            with suppress(*symmetric.FAILURES):  # then there are no columns to multiply
                mine = factor.factor_gram(G_KK, r, tolerance=1e-8)
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
    tiles, casts = (torch.empty(TILE * k, dtype=torch.float64) for _ in range(2))
    for start in range(0, k, TILE):
        stop = min(start + TILE, k)
        tile = tiles[: (stop - start) * stop].view(-1, stop).zero_()
        for part in rows_PK.split(TILE):
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
