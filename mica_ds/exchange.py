"""Shards to their owners: each weight travels once, to the rank that solves it.

Sending the shards of W to one owner moves out · in elements in all; reducing fp64 Grams would move about
P · 8 · K² bytes, and its owner would still lack W for the vectors of a tall matrix.
"""

from collections.abc import Iterator

import torch

from mica_ds import comm
from mica_ds.shards import Shard


def assign_owners(shapes: list[tuple[int, int]], ranks: int) -> list[int]:
    """The owner of each matrix: longest processing time first, each to the least loaded rank. Local."""
    load = [0] * ranks
    owners = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -_cost(shapes[i])):
        owners[i] = load.index(min(load))
        load[owners[i]] += _cost(shapes[i])
    return owners


def ship(shards: list[Shard], owners: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (index, W (out, in)) of each matrix that this rank owns, one at a time. Collective.

    All sends are started first and run in the background: no rank waits for another's solve before it begins its own.
    A rank receives out · in elements for each matrix it owns, less its own slice, and holds one matrix at a time.
    """
    rank = comm.rank()
    sends = [
        comm.send(shard.values, owner, tag=i)
        for i, (shard, owner) in enumerate(zip(shards, owners, strict=True))
        if owner != rank and len(shard.values)
    ]
    for i, (shard, owner) in enumerate(zip(shards, owners, strict=True)):
        if owner == rank:
            yield i, _receive_whole(shard, tag=i)
    for work in sends:
        if work is not None:
            work.wait()


def _receive_whole(shard: Shard, tag: int) -> torch.Tensor:
    flat = torch.empty(shard.bounds[-1], dtype=shard.values.dtype)
    receives = []
    for source in range(comm.world_size()):
        part = flat[shard.bounds[source] : shard.bounds[source + 1]]
        if source == comm.rank():
            part.copy_(shard.values)
        elif len(part):
            receives.append(comm.receive(part, source, tag))
    for work in receives:
        if work is not None:
            work.wait()
    W = flat.view(shard.stored_shape)
    return W.T if shard.is_transposed else W


def _cost(shape: tuple[int, int]) -> int:
    """Floating-point operations of a solve, about: the Gram, then the tridiagonal form of the small side."""
    k = min(shape)
    return 2 * max(shape) * k * k + 4 * k**3
