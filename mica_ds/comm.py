"""Ranks, collectives, and failing together. The only user of `torch.distributed`.

All collectives here run over gloo on host memory: they carry shards, fingerprints and results of evaluations, while
DeepSpeed's own group (NCCL on GPUs) carries the training. A few bytes beside the steps go through torch's store.
"""

import io
import itertools
import json
import os
import secrets
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

from mica_ds import process, signals
from mica_ds.errors import Preempted, UserError
from mica_ds.watchdog import Watchdog

# A rank may wait here for another's solve, which may take hours: the wait has no limit of its own. Ranks that died,
# stopped or lost their host are the watchdog's.
_PATIENCE = timedelta(days=30)
_group: dist.ProcessGroup | None = None
_watchdog: Watchdog | None = None
_turns = itertools.count()

Work = dist.Work | None


def start(is_watched: bool = False) -> None:
    """Join the process group of the launcher, or become a group of one. Collective.

    The rank comes from RANK, WORLD_SIZE and LOCAL_RANK (deepspeed, torchrun, accelerate) or from srun's variables.
    Once the ranks have met and are watched, this one ends soon after another has failed, ended or fallen silent.
    Raises: UserError where the ranks do not meet in the minutes that DeepSpeed gives them (DEEPSPEED_TIMEOUT, 10).
    """
    global _group
    process.heed_accelerator()
    process.find_ranks()
    if torch.cuda.is_available():
        process.require_own_gpu()
    else:
        process.require_no_gpu()
        process.require_compiler()  # DeepSpeed compiles its shared-memory collectives
        # Where all ranks are on one machine, DeepSpeed (0.19.8) would keep 66 MiB a rank in /dev/shm for those, also
        # after the run; training uses none of them.
        os.environ.pop("LOCAL_SIZE", None)
    process.load_deepspeed(is_quiet=os.environ["RANK"] != "0")
    import deepspeed

    # Before TrainingArguments: else transformers' zero.Init sees a world of one (measured, 5.23.0).
    # DeepSpeed (0.19.8) prints on every rank that it has built its op.
    try:
        with redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
        if is_watched and world_size() > 1:
            _watch()
    except (dist.DistNetworkError, dist.DistStoreError) as error:  # not NCCL's own, which says more
        raise UserError(process.why_apart(error)) from None
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    _group = dist.new_group(backend="gloo", timeout=_PATIENCE)  # meets without a limit, too
    place = process.own_cores()
    places = gather(place)
    process.share_cores(places.count(place))
    # On a CPU DeepSpeed would else ask numactl, for each bucket of gradients.
    os.environ["LOCAL_SIZE"] = str(sum(host == place[0] for host, _ in places))


def start_alone() -> None:
    """Become a group of one for what trains nothing: without DeepSpeed, which compiles ops on a CPU. Local."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def rank() -> int:
    """This process's rank; local."""
    return dist.get_rank()


def world_size() -> int:
    """The number of ranks; local."""
    return dist.get_world_size()


def is_main() -> bool:
    """Whether this is rank 0, which alone speaks and writes what exists once; local."""
    return rank() == 0


def say(message: str) -> None:
    """Print one line on rank 0, clear of progress bars; local."""
    if is_main():
        tqdm.write(message)
        sys.stdout.flush()


def barrier() -> None:
    """Wait for all ranks, however long they take. Collective."""
    dist.barrier(group=_group)


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a CPU tensor over all ranks, in place. Collective; about 2 × its bytes a rank."""
    dist.all_reduce(tensor, group=_group)
    return tensor


def gather(value: Any) -> list[Any]:
    """A small picklable value of each rank, in the order of the ranks, on all ranks. Collective."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_group)
    return values


def sum_to(tensor: torch.Tensor, owner: int) -> None:
    """Sum a CPU tensor over all ranks into the owner's, in place; the others' is left undefined. Collective."""
    dist.reduce(tensor, owner, group=_group)


def broadcast(tensor: torch.Tensor | None, owner: int) -> torch.Tensor:
    """The owner's fp64 matrix on all ranks. Collective."""
    shape = torch.tensor(tensor.shape if tensor is not None else (0, 0))
    dist.broadcast(shape, owner, group=_group)
    whole = tensor.contiguous() if tensor is not None else torch.empty(*shape.tolist(), dtype=torch.float64)
    dist.broadcast(whole, owner, group=_group)
    return whole


def gather_rows(part: torch.Tensor, owner: int) -> torch.Tensor:
    """The ranks' fp64 rows below one another, at the owner; elsewhere the part itself. Collective."""
    heights = gather(len(part))
    if rank() != owner:
        wait([send(part, owner, tag=0)] if len(part) else [])
        return part
    parts = [torch.empty(height, part.shape[1], dtype=part.dtype) for height in heights]
    parts[owner] = part
    wait([receive(p, source, tag=0) for source, p in enumerate(parts) if source != owner and len(p)])
    return torch.cat(parts)


def send(tensor: torch.Tensor, to: int, tag: int) -> Work:
    """Start sending a contiguous CPU tensor, which must not change until the returned work is done. Local."""
    return dist.isend(tensor, to, group=_group, tag=tag)


def receive(tensor: torch.Tensor, source: int, tag: int) -> Work:
    """Start receiving into a contiguous CPU tensor. Local."""
    return dist.irecv(tensor, source, group=_group, tag=tag)


def wait(works: list[Work]) -> None:
    """Wait until sends or receives are done. Local."""
    for work in works:
        if work is not None:
            work.wait()


def count(key: str, amount: int = 0) -> int:
    """Add to a number that all ranks share, and return it. Local."""
    return _store().add(key, amount)


def agreed(key: str, value: str = "") -> str:
    """The value that the first rank gave a key, this rank's if it had none; empty while it has none. Local."""
    return _store().compare_set(key, "", value).decode()


def collect(value: Any) -> list[Any]:
    """A small value of each rank, in the order of the ranks, on rank 0; elsewhere an empty list, at once.

    To be called by all ranks, of which rank 0 waits for the others. The value is of what JSON has.
    """
    turn = next(_turns)
    _store().set(f"collect/{turn}/{rank()}", json.dumps(value))
    if not is_main():
        return []
    keys = [f"collect/{turn}/{source}" for source in range(world_size())]
    values = _store().multi_get(keys)  # not the store's queues: with several waits it wakes for the wrong one (2.13)
    for key in keys:
        _store().delete_key(key)
    return list(map(json.loads, values))


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _watch() -> None:
    """Exchange signs of life with the other ranks, before any collective could wait for one of them. Collective."""
    global _watchdog
    address, listener, port, token = os.environ["MASTER_ADDR"], None, 0, secrets.token_hex()
    if is_main():
        # Other nodes may know this one by another family of addresses than it does itself.
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, backlog=world_size(), dualstack_ipv6=dual)
        port = listener.getsockname()[1]
    # Of the ports and tokens rank 0's count.
    _store().set(f"watch/{rank()}", json.dumps([socket.gethostname(), port, token]))
    theirs = [json.loads(value) for value in _store().multi_get([f"watch/{peer}" for peer in range(world_size())])]
    _, port, token = theirs[0]
    _watchdog = Watchdog(rank(), [host for host, _, _ in theirs])
    _watchdog.start(token, listener, (address, port))


def be_patient(patience: float) -> None:
    """End so many seconds after another rank's last sign of life, from now on. Local, on all ranks at once."""
    if _watchdog is not None:
        _watchdog.be_patient(patience)


def at(stage: str) -> None:
    """Note what the run is at (`step 7`), for what is said of it should it fail. Local."""
    if _watchdog is not None:
        _watchdog.stage = stage


def advise(hint: str) -> None:
    """Say this from now on of a rank that was killed. Local."""
    if _watchdog is not None:
        _watchdog.hint = hint


def at_abort(act: Callable[[int], None]) -> None:
    """Have `act` called with the exit code when another rank's failure is about to end this one. Local."""
    if _watchdog is not None:
        _watchdog.at_abort = act


def _is_speaker(error: UserError) -> bool:
    """Rank 0 prints an error of all ranks; before the ranks have met, the first one of each node prints its own."""
    if not dist.is_initialized():
        return os.environ["LOCAL_RANK"] == "0" or not os.environ["LOCAL_RANK"].isdecimal()
    return is_main() or not error.agreed


class PeerError(RuntimeError):
    """What another rank has raised."""


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise on all ranks what any rank raised inside, the lowest such rank's error. Collective at its end.

    The body must be local: a collective inside it would wait for the rank that has failed.
    Raises: UserError where a rank raised one; RuntimeError that names the rank otherwise.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    theirs = gather(None if error is None else (isinstance(error, UserError), str(error) or repr(error)))
    first = next((rank for rank, failure in enumerate(theirs) if failure), None)
    if first is None:
        return
    is_user_error, message = theirs[first]
    if not is_user_error:
        raise error or PeerError(f"rank {first} failed: {message}")
    raise UserError(message, agreed=True) from None


def run(main: Callable[[], None], is_alone: bool = False) -> NoReturn:
    """Run `main` in the process group and exit; an error ends all ranks within seconds, with codes that are not 0.

    A user's mistake is one line and exit code 2, a scheduler's signal one line and 75, an interrupt one line and
    130, and anything else a traceback and exit code 1. The rank that failed first prints it, after a line of each
    other rank that says that it ends.
    """
    code = 0
    signals.watch()
    try:
        start_alone() if is_alone else start(is_watched=True)
        main()
        if _watchdog is not None:
            _watchdog.finish()
        barrier()
    except BaseException as error:
        signals.defer(True)  # a launcher's SIGTERM must not interrupt the end
        code = _end(error)
    if _watchdog is not None:
        _watchdog.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: tearing down the groups waits for peers, which may have failed.
    os._exit(code)


def _end(error: BaseException) -> int:
    """Print an error where it is this rank's to print, and return the exit code."""
    kinds = {UserError: 2, Preempted: signals.EXIT_CODE, KeyboardInterrupt: signals.INTERRUPT_CODE}
    otherwise = signals.EXIT_CODE if signals.received() else 1
    code = next((code for kind, code in kinds.items() if isinstance(error, kind)), otherwise)
    is_agreed = isinstance(error, UserError | Preempted) and error.agreed
    if isinstance(error, Preempted) and is_agreed:
        barrier()  # a launcher kills the others when the first exits, and would return their code
    if _watchdog is not None and not is_agreed:
        # What gloo or torch's store raise where a peer has gone names no rank; the watchdog soon knows which it was.
        is_about_a_peer = isinstance(error, dist.DistError | PeerError) or "gloo/transport" in str(error)
        if is_about_a_peer and (verdict := _watchdog.verdict_on_another()):
            return verdict.code
        first_line = f"{type(error).__name__}: {error}".split("\n")[0]
        told = (str(error) or "interrupted") if isinstance(error, tuple(kinds)) else first_line
        verdict = _watchdog.accuse(told, code)
        if verdict.rank != rank():
            return verdict.code
    if isinstance(error, UserError):
        if _is_speaker(error):
            print(f"\nerror: {error}", file=sys.stderr)  # a progress bar leaves its line open
    elif isinstance(error, Preempted):
        if os.environ.get("RANK", "0") == "0" or (_watchdog is not None and not is_agreed):
            print(error)
    elif isinstance(error, KeyboardInterrupt):
        if os.environ.get("RANK", "0") == "0" or _watchdog is not None:
            print("\ninterrupted")
    else:
        print(f"rank {os.environ.get('RANK', '0')} (host {socket.gethostname()}) failed:", file=sys.stderr)
        traceback.print_exception(error)
    return code
