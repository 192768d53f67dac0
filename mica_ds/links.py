"""Between ranks: whether they are alike, and whether their collectives are right and their links fast.

A look is taken on each rank; a judgement compares what all ranks have seen. Collectives go through `deepspeed.comm`, as
the training's do: NCCL on GPUs, gloo on CPUs.
"""

import os
import socket
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from deepspeed import comm as training

from mica_ds import comm
from mica_ds.config import Config, copy_group
from mica_ds.errors import UserError
from mica_ds.model import DTYPES

_APART = 1.0  # seconds by which clocks may differ
_BLOCK = 256  # elements that each rank gives to each other in a trial
_TURNS = 20  # exchanges of one element for a latency
_LARGE = 8 << 20  # elements (32 MiB) of an exchange for a bandwidth
_LEAST = 1e9  # bytes/s between nodes' GPUs, far below any fabric made for them: NCCL has fallen back to Ethernet
_SLOW, _LATE = 2, 10  # times the usual bandwidth, latency: a latency also grows with what else a machine is doing

T = TypeVar("T")
Judgement = tuple[str, dict[int, str]]
"""What was found in all, and what is wrong by rank."""
Pairs = tuple[str, dict[int, tuple[float, float]]]
"""A rank's host, and by partner the seconds of a small exchange and the bytes/s of a large one, each way."""


def alike(seen: list[dict[str, str]]) -> Judgement:
    """Which ranks differ from most others, or from rank 0 where there is no majority. Local."""
    keys = list(dict.fromkeys(key for facts in seen for key in facts))
    usual = {key: Counter(facts.get(key, "none") for facts in seen).most_common(1)[0][0] for key in keys}
    faults = {}
    for rank, facts in enumerate(seen):
        mine = {key: facts.get(key, "none") for key in keys}
        if different := [f"{key} {mine[key]} instead of {usual[key]}" for key in keys if mine[key] != usual[key]]:
            faults[rank] = ", ".join(different)
    return ", ".join(f"{key} {value}" for key, value in usual.items()), faults


def clocks_agree(seen: list[float]) -> Judgement:
    """Which clocks (seconds, read at one moment) are more than a second from the middle one. Local."""
    middle = statistics.median_low(seen)
    faults = {rank: f"{now - middle:+.1f} s" for rank, now in enumerate(seen) if abs(now - middle) > _APART}
    return f"{max(seen) - min(seen):.2f} s apart", faults


def try_collectives(config: Config) -> str:
    """Check each collective that training uses, in its dtypes, on numbers whose result is known exactly. Collective.

    Raises: UserError that names those with a wrong result on this rank.
    """
    trials = list(_trials(DTYPES[config.model.dtype], copy_group(config, comm.world_size())))
    wrong = [name for name, expected, found in trials if not torch.equal(expected, found)]
    if wrong:
        raise UserError(f"wrong result of {', '.join(wrong)}")
    return f"{', '.join(name for name, *_ in trials)}: right on {comm.world_size()} ranks"


def time_pairs() -> Pairs:
    """Time exchanges of neighbours within nodes, and of ranks in the same place of neighbouring nodes.

    Each GPU so crosses to a node that has as many, at once with the others of its own. Collective; up to 540 MB a rank,
    each way.
    """
    rank, host, found = comm.rank(), socket.gethostname(), {}
    for pair in pairs_to_time(comm.gather(host)):  # the same order on all ranks
        if rank in pair:
            partner = pair[1 - pair.index(rank)]
            measured = _time_pair(partner)
            if rank == pair[0]:
                found[partner] = measured
    return host, found


def pairs_to_time(hosts: list[str]) -> list[tuple[int, int]]:
    """Ranks on these hosts that are to exchange, first those within nodes; many can side by side. Local."""
    nodes = [[rank for rank, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)]
    within = [pair for node in nodes for pair in _ring(node)]
    return within + [pair for one, other in _ring(nodes) for pair in zip(one, other, strict=False)]


def _ring(members: list[T]) -> list[tuple[T, T]]:
    """All neighbours, every second pair first."""
    count = len(members) if len(members) > 2 else len(members) - 1
    return [(members[i], members[(i + 1) % len(members)]) for i in (*range(0, count, 2), *range(1, count, 2))]


def pairs_are_even(seen: list[Pairs]) -> Judgement:
    """Which pairs have half of the usual bandwidth, or ten times the latency, within a node or between nodes. Local.

    Between nodes GPUs must also have what any fabric made for them has.
    """
    found: list[str] = []
    faults: dict[int, str] = {}
    for is_within, kind in ((True, "within a node"), (False, "between nodes")):
        pairs = {
            (first, second): times
            for first, (host, partners) in enumerate(seen)
            for second, times in partners.items()
            if (host == seen[second][0]) is is_within
        }
        if not pairs:
            continue
        latencies, speeds = zip(*pairs.values(), strict=True)
        usual, prompt = statistics.median_high(speeds), statistics.median_low(latencies)
        found.append(
            f"{kind} {_gigabytes(min(speeds))} to {_gigabytes(max(speeds))} GB/s, "
            f"{min(latencies) * 1e6:.0f} to {max(latencies) * 1e6:.0f} µs"
        )
        together: defaultdict[tuple[str, ...], float] = defaultdict(float)  # by what lies between two hosts
        for (first, second), (_, speed) in pairs.items():
            together[tuple(sorted({seen[first][0], seen[second][0]}))] += speed
        for pair, (latency, speed) in pairs.items():
            between = tuple(sorted({seen[rank][0] for rank in pair}))
            wrong = []
            if speed < usual / _SLOW:
                wrong.append(f"exchange {_gigabytes(speed)} GB/s, usual {kind} are {_gigabytes(usual)}")
            elif together[between] < _LEAST and not is_within and device().type == "cuda":
                at_all = f"their hosts {_gigabytes(together[between])}"
                wrong.append(f"exchange {_gigabytes(speed)} GB/s, and {at_all}: nodes with GPUs need {_LEAST / 1e9:g}")
            if latency > prompt * _LATE:
                wrong.append(f"need {latency * 1e6:.0f} µs for a word, usual {kind} are {prompt * 1e6:.0f}")
            for said in wrong:
                slow = f"ranks {pair[0]} and {pair[1]} {said}"
                faults |= {rank: "; ".join(filter(None, (faults.get(rank), slow))) for rank in pair}
    return "; ".join(found) or "a single rank", faults


def device() -> torch.device:
    """This rank's GPU, or the CPU; in any thread. Local."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def _trials(dtype: torch.dtype, size: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each collective's name, the result that is due on this rank, and the one that came.

    `size` is that of hpZ's groups, from which weights are gathered; 0 without any.
    """
    ranks, rank, place = comm.world_size(), comm.rank(), device()
    parts = [range(first, first + size) for first in range(0, ranks, size)] if size and ranks % size == 0 else []
    groups = [training.new_group(list(part)) for part in parts]  # by all ranks, before any can hang

    def given(by: int, below: int = 257, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return ((torch.arange(ranks * _BLOCK, device=place) % 7 + by) % below).to(dtype)

    # Integers up to 256 are exact in each dtype: so are sums of these, to which 256 ranks at most give other than 0.
    small = [max(2, 1 + 256 // ranks) if by < 256 else 1 for by in range(ranks)]
    summed = sum((given(by, small[by]) for by in range(ranks)), torch.zeros(ranks * _BLOCK, device=place))
    # The bases' own way. First, since later ones may hang on some ranks alone, and the doctor goes on in this group.
    owned = given(rank, small[rank]).double().cpu()
    comm.sum_to(owned, 0)
    yield "reduce", summed.double().cpu() if rank == 0 else owned, owned
    for kind in dict.fromkeys((torch.float32, dtype)):
        named = "" if kind == torch.float32 else f" of {str(kind).removeprefix('torch.')}"
        reduced = given(rank, small[rank], kind)
        training.all_reduce(reduced)
        yield f"all_reduce{named}", summed.to(kind), reduced
        gathered = torch.empty(ranks * ranks * _BLOCK, device=place, dtype=kind)
        training.all_gather_into_tensor(gathered, given(rank, dtype=kind))
        yield f"all_gather_into_tensor{named}", torch.cat([given(by, dtype=kind) for by in range(ranks)]), gathered
        scattered = torch.empty(_BLOCK, device=place, dtype=kind)
        training.reduce_scatter_tensor(scattered, given(rank, small[rank], kind))
        yield f"reduce_scatter_tensor{named}", summed.chunk(ranks)[rank].to(kind), scattered
    for part, group in zip(parts, groups, strict=True):
        if rank in part:
            gathered = torch.empty(size * ranks * _BLOCK, device=place, dtype=dtype)
            training.all_gather_into_tensor(gathered, given(rank, dtype=dtype), group)
            yield "all_gather_into_tensor of hpZ", torch.cat([given(by, dtype=dtype) for by in part]), gathered
    highest = given(rank)
    training.all_reduce(highest, training.ReduceOp.MAX)
    yield "all_reduce of the highest", torch.stack([given(by) for by in range(ranks)]).amax(0), highest
    sent = given(rank, dtype=dtype).view(torch.uint8)  # as zero.Init sends weights (DeepSpeed 0.19.8)
    training.broadcast(sent, ranks - 1)
    yield "broadcast", given(ranks - 1, dtype=dtype).view(torch.uint8), sent
    swapped = torch.empty(ranks * _BLOCK, device=place)
    training.all_to_all_single(swapped, given(rank))
    yield "all_to_all_single", torch.cat([given(by).chunk(ranks)[rank] for by in range(ranks)]), swapped
    if ranks > 1:  # the bases' own way, too
        left, right = (rank - 1) % ranks, (rank + 1) % ranks
        came = torch.empty(ranks * _BLOCK)
        comm.wait([comm.send(given(rank).cpu(), right, tag=0), comm.receive(came, left, tag=0)])
        yield "send and receive", given(left).cpu(), came


def _time_pair(partner: int) -> tuple[float, float]:
    small, large = _exchange(partner, 1), _exchange(partner, _LARGE)
    small(), large()  # connects, and waits for the partner
    latency = statistics.median(_seconds(small) for _ in range(_TURNS))
    return latency, 4 * _LARGE / min(_seconds(large) for _ in range(3))


def _exchange(partner: int, length: int) -> Callable[[], None]:
    place = device()
    out, into = torch.ones(length, device=place), torch.empty(length, device=place)

    def exchange() -> None:
        both = [training.P2POp(training.isend, out, partner), training.P2POp(training.irecv, into, partner)]
        for work in training.batch_isend_irecv(both):
            work.wait()
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    return exchange


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _gigabytes(speed: float) -> str:
    return f"{speed / 1e9:.3g}"
