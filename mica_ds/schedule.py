"""Who solves which matrix where, how its weight gets there, and what all of that moves and takes: the engine's choices.

Two routes. *Ship*: the slices of W go to its owner, which factors it: 2 · out · in bytes in all for bf16. *Gram*: each
rank multiplies the rows it holds, and fp64 Grams are summed at the owner: about 4 K² bytes for each other rank, then
one round trip for the vectors through W. The Gram pays where a matrix is long against K and the ranks are few, or where
an owner has no room for W.

Where few matrices are most of the work they do not share out evenly. Then a rank with less to do helps an owner: it
sums the last quarter of a shipped matrix's Gram, in fp32, and sends 2 K² bytes. It needs a quarter of W for that: the
owner sends it where it reads files; of partitions it is in the helper's own slice, where two ranks hold the halves of
the long side.
"""

import math
import socket
from collections import defaultdict
from dataclasses import dataclass

import torch

from mica_ds import comm, factor, process, symmetric
from mica_ds.config import BasisSettings
from mica_ds.shards import Matrix

TILE = 512
"""Rows of a Gram that all ranks sum at a time."""
# Compute capabilities of P100, V100, A100, H100 and B200; other GPUs have a 32nd of fp32's speed or less.
_FAST_FP64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
_BANDWIDTH = 1e9  # bytes a second between two ranks, as a network of 10 Gbit/s has


@dataclass(frozen=True)
class Machine:
    """What the choices depend on."""

    ranks: int
    itemsize: int
    """Bytes of a stored element."""
    memory: int
    """Bytes that the rank with the least room has for a solve."""
    is_sliced: bool
    """Whether each rank holds a slice of each matrix; else the files hold them."""
    is_on_host: bool
    """Whether no owner solves on a GPU."""
    threads: int
    """The fewest that a rank has."""


@dataclass(frozen=True)
class Assignment:
    """Who solves what."""

    owners: list[int]
    """The rank that solves each matrix."""
    helpers: dict[int, int]
    """The rank that sums the last quarter of a Gram for the owner, by the matrix's index.

    A higher one than the owner: of two partitions it holds the second half.
    """


def measure_machine(itemsize: int, is_sliced: bool, device: str) -> Machine:
    """Look at the ranks' memory, GPUs and threads. Collective."""
    found = comm.gather((socket.gethostname(), process.free_memory(), _solves_on_host(device), torch.get_num_threads()))
    hosts, free, on_host, threads = zip(*found, strict=True)
    memory = min(room // hosts.count(host) for host, room in zip(hosts, free, strict=True))
    return Machine(comm.world_size(), itemsize, memory, is_sliced, all(on_host), min(threads))


def allowed_exchange(settings: BasisSettings, subspace: str) -> str:
    """`basis.exchange`, or `ship` where there is no Gram that several ranks could sum. Local.

    A Gram's factor gives the minor vectors alone.
    """
    may_sum = subspace == "minor" and settings.factor in ("auto", "gram")
    return settings.exchange if may_sum else "ship"


def may_share(settings: BasisSettings, subspace: str) -> bool:
    """Whether a rank may sum a part of another's Gram: where the engine chooses exchange and factor. Local."""
    return settings.factor == "auto" and allowed_exchange(settings, subspace) == "auto"


def choose_route(matrix: Matrix, r: int, machine: Machine, asked: str = "auto") -> str:
    """`ship` or `gram` for one matrix: what was asked, or the cheaper in bytes received of those that fit. Local.

    A matrix that is stored short side first is cut across its long rows: its Gram would need columns, which costs as
    much as shipping it. A file's reader has the whole matrix.
    """
    rows, columns = matrix.stored_shape
    is_whole = machine.ranks == 1 or not machine.is_sliced
    if asked == "ship" or is_whole or rows < columns or factor.choose_factor(matrix.shape, r) == "eigh":
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
    if _solves_on_host(asked):
        return host
    k, long = min(matrix.shape), max(matrix.shape)
    needed = 4 * k * long + 8 * 8 * k * k + (1 << 30)
    return torch.device("cuda") if needed <= torch.cuda.mem_get_info()[0] else host


def _solves_on_host(asked: str) -> bool:
    is_host = asked == "cpu" or not torch.cuda.is_available()
    return is_host or torch.cuda.get_device_capability() not in _FAST_FP64


def shipped_bytes(matrix: Matrix, machine: Machine) -> int:
    """Bytes received at the owner, where the slices are equal; none where it reads the files. Local."""
    if not machine.is_sliced:
        return 0
    return machine.itemsize * math.prod(matrix.stored_shape) * (machine.ranks - 1) // machine.ranks


def gram_bytes(matrix: Matrix, r: int, machine: Machine) -> int:
    """Bytes received by all ranks: lower triangles to the owner, then X to all, Y and T Y back. Local.

    gloo sums in a ring and then collects the parts: each sum costs 1 + 1 / P of what the owner needs of P − 1 ranks.
    """
    rows, columns = matrix.stored_shape
    width = factor.block_width(r)
    triangle, vectors = columns * (columns + TILE) // 2, width * (2 * columns + rows // machine.ranks)
    return (machine.ranks - 1) * 8 * (triangle + triangle // machine.ranks + vectors)


def shared_bytes(matrix: Matrix, machine: Machine) -> int:
    """Bytes received for a matrix with a helper: a Gram's triangle, and what one of the two lacks of W. Local."""
    k, lacks = min(matrix.shape), 1 / 2 if machine.is_sliced else factor.SHARED
    triangle = k * (k + symmetric.STRIP) // 2 + k  # strips, and the diagonal
    return int(machine.itemsize * math.prod(matrix.shape) * lacks) + 4 * triangle


def moved_bytes(
    matrices: list[Matrix], assignment: Assignment, r: int, machine: Machine, asked: str = "auto"
) -> list[int]:
    """Bytes received for each matrix. Local."""
    moved = []
    for i, matrix in enumerate(matrices):
        if choose_route(matrix, r, machine, asked) == "gram":
            moved.append(gram_bytes(matrix, r, machine))
        elif i in assignment.helpers:
            moved.append(shared_bytes(matrix, machine))
        else:
            moved.append(shipped_bytes(matrix, machine))
    return moved


def assign_owners(matrices: list[Matrix], r: int, ranks: int) -> list[int]:
    """The owner of each matrix: longest processing time first, each to the least loaded rank. Local.

    The ranks are numbered by their load, the busiest first, so that `assign` can pair them from both ends.
    """
    costs = [factor.cost(matrix.shape, r) for matrix in matrices]
    load = [0.0] * ranks
    owners = [0] * len(matrices)
    for i in sorted(range(len(matrices)), key=lambda i: -costs[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    places = sorted(range(ranks), key=lambda rank: -load[rank])
    return [places.index(owner) for owner in owners]


def assign(matrices: list[Matrix], r: int, machine: Machine, may_share: bool = True) -> Assignment:
    """Owners for all matrices, and helpers for some where that saves 5 % of the time at least. Local.

    The busiest rank is helped by the least busy one, the second by the last but one, and so on, as long as the longest
    becomes shorter, each with the costliest of its matrices that may be shared.
    """
    owners, helpers = assign_owners(matrices, r, machine.ranks), {}
    alone = Assignment(owners, {})
    load = [factor.seconds(work, factor.RATES) for work in rank_work(matrices, alone, r, machine.ranks)]
    longest = max(load)
    shareable = [i for i, matrix in enumerate(matrices) if may_share and _is_shareable(matrix, r, machine)]
    for owner in range(machine.ranks // 2):
        helper = machine.ranks - 1 - owner
        mine = [i for i in shareable if owners[i] == owner]
        if not mine or load[owner] <= max(load[:owner], default=0.0):
            break  # what is longest stays so
        costliest = max(mine, key=lambda i: factor.cost(matrices[i].shape, r))
        saved = factor.SHARED * factor.work(matrices[costliest].shape, r)["gram32"] / factor.RATES["gram32"]
        # Loads are seconds of one core: more threads shorten the work, but not what is sent.
        more = shared_bytes(matrices[costliest], machine) - shipped_bytes(matrices[costliest], machine)
        sending = machine.threads * more / _BANDWIDTH
        shared = load[owner] + sending - saved, load[helper] + sending + saved
        if max(shared) >= load[owner]:
            break
        helpers[costliest] = helper
        load[owner], load[helper] = shared
    return Assignment(owners, helpers) if max(load) <= 0.95 * longest else alone


def _is_shareable(matrix: Matrix, r: int, machine: Machine) -> bool:
    """Whether an owner may have help: for a Gram of W on the host, where that moves little more than W."""
    rows, columns = matrix.stored_shape
    if not machine.is_on_host or choose_route(matrix, r, machine) == "gram":
        return False
    is_held = not machine.is_sliced or (machine.ranks == 2 and rows > columns)
    is_cheap = shared_bytes(matrix, machine) <= 1.1 * machine.itemsize * rows * columns
    return is_held and is_cheap and factor.choose_factor(matrix.shape, r) == "gram32"


def rank_work(matrices: list[Matrix], assignment: Assignment, r: int, ranks: int) -> list[dict[str, float]]:
    """The work of each rank by kind, as `factor.work` counts it. Local."""
    totals: list[dict[str, float]] = [defaultdict(float) for _ in range(ranks)]
    for i, (matrix, owner) in enumerate(zip(matrices, assignment.owners, strict=True)):
        for kind, amount in factor.work(matrix.shape, r).items():
            share = factor.SHARED * amount if kind == "gram32" and i in assignment.helpers else 0.0
            totals[owner][kind] += amount - share
            totals[assignment.helpers.get(i, owner)][kind] += share
    return totals
