"""Before the money is spent: one list of checks, each taken on every rank, and what came of them."""

import dataclasses
import functools
import io
import json
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mica_ds import checks, comm, links
from mica_ds.about import about
from mica_ds.config import Config
from mica_ds.errors import UserError
from mica_ds.links import Judgement

_DATA = 300  # seconds: lm-eval opens a suite of many parts, such as mmlu, in minutes
_COMPILING = 600  # seconds; a compiler that is not waited for leaves a lock that later starts would wait at


def _as_on_rank_0(seen: list[str]) -> Judgement:
    return seen[0], {}


@dataclass(frozen=True)
class Check:
    """One thing that can be wrong."""

    name: str
    look: Callable[[], Any]
    """Taken on each rank at the same moment; raises UserError where that rank alone shows that something is wrong."""
    advice: str
    """What to do where it is wrong."""
    judge: Callable[[list[Any]], Judgement] = _as_on_rank_0
    """What all looks come to."""
    limit: float = 60
    """Seconds that a look may take."""


@dataclass(frozen=True)
class Result:
    """What a check has found."""

    name: str
    is_good: bool
    detail: str
    advice: str
    """Empty where all is good."""
    ranks: list[int]
    """Where it is wrong."""


def examine(config: Config) -> list[Result]:
    """Take all checks, without loading a weight; a look that hangs or raises is a finding, too. Collective."""
    token = comm.gather(f"doctor-{secrets.token_hex(8)}")[0]
    results = [_take(check) for check in _checks(config, token)]
    for file in checks.token_files(config, token).values():
        with suppress(OSError):
            file.unlink(missing_ok=True)
            file.parent.rmdir()  # only an empty one: a run's is not
    return results


def print_results(results: list[Result], as_json: bool) -> None:
    """Print a table, or the same as one line of JSON. Local, on one rank."""
    if as_json:
        print(json.dumps([dataclasses.asdict(result) for result in results]), flush=True)
        return
    table = Table(title=f"{comm.world_size()} ranks", show_lines=True)
    for heading in ("check", "", "found"):
        table.add_column(heading)
    for result in results:
        found = Text(result.detail)
        if not result.is_good:
            found.append(f"\n→ {result.advice}", style="bold")
        table.add_row(result.name, Text("good", "green") if result.is_good else Text("BAD", "bold red"), found)
    Console(width=None if Console().is_terminal else 110).print(table)


def _checks(config: Config, token: str) -> list[Check]:
    def of(look: Callable[[Config], Any]) -> Callable[[], Any]:
        return functools.partial(look, config)

    return [
        Check("versions", about, "install the same versions and commit on all nodes (launch/setup.sh)", links.alike),
        Check("clocks", time.time, "synchronise the nodes' clocks (chrony, ntpd)", links.clocks_agree),
        Check("machine", of(checks.machine), "free it, set it up like the others, or leave it out", links.alike),
        Check(
            "collectives",
            of(links.try_collectives),
            "check NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and the fabric; NCCL_DEBUG=INFO says more",
        ),
        Check(
            "links",
            links.time_pairs,
            "check cable, port and driver (ibstat, nvidia-smi topo -m), or leave the node out; between all nodes, "
            "NCCL_SOCKET_IFNAME and NCCL_IB_HCA (in slurm/cluster.env), and that NCCL_IB_DISABLE is not set",
            links.pairs_are_even,
            limit=30,
        ),
        Check(
            "compiled ops",
            of(checks.compiled_ops),
            "install g++, ninja, for GPUs the CUDA toolkit, for NVMe libaio-dev; remove a stale lock from "
            "TORCH_EXTENSIONS_DIR",
            limit=_COMPILING,
        ),
        Check("deepspeed", of(checks.deepspeed_settings), "change the setting, or the number of ranks"),
        Check(
            "folders",
            lambda: checks.shared_folders(config, token),
            "set output_dir and data.cache to storage that all nodes mount at one path",
        ),
        Check("room", of(checks.room), "make room, or lower checkpoint.keep or adapter.r"),
        Check("model", of(checks.model_files), "copy the model again, the same to all nodes", links.alike),
        Check(
            "data",
            of(checks.data_files),
            "correct the file, and give all nodes the same",
            links.alike,
            limit=_DATA,
        ),
        Check("tracker", of(checks.tracker), "start the server, or correct tracking.uri and its credentials"),
    ]


def _take(check: Check) -> Result:
    comm.barrier()  # so that clocks are read at one moment
    looks = comm.gather((socket.gethostname(), *_look(check)))
    hosts = [host for host, _, _ in looks]
    detail, faults = "", {rank: fault for rank, (_, _, fault) in enumerate(looks) if fault}
    if not faults:
        detail, faults = check.judge([seen for _, seen, _ in looks])
    if faults:
        return Result(check.name, False, _told(faults, hosts), check.advice, sorted(faults))
    return Result(check.name, True, detail, "", [])


def _look(check: Check) -> tuple[Any, str]:
    """What this rank sees, and what is wrong about it. Local: whatever happens, the rank comes to the next collective.

    The look has a thread of its own, which is left behind if it hangs: in a file system, a lock, or NCCL.
    """
    with redirect_stdout(io.StringIO()):  # DeepSpeed (0.19.8) prints that it has built an op
        look = ThreadPoolExecutor(1).submit(check.look)
        if not wait([look], check.limit).done:
            return None, f"nothing came of it in {check.limit:g} s"
    error = look.exception()
    if error is None:
        return look.result(), ""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return None, first_line if isinstance(error, UserError) else f"{type(error).__name__}: {first_line}"


def _told(faults: dict[int, str], hosts: list[str]) -> str:
    """Each fault once, with the ranks and hosts that have it."""
    parts = []
    for fault in dict.fromkeys(faults.values()):
        ranks = [rank for rank in faults if faults[rank] == fault]
        where = ", ".join(f"{rank} (host {hosts[rank]})" for rank in ranks)
        parts.append(f"all ranks: {fault}" if len(ranks) == len(hosts) > 1 else f"rank {where}: {fault}")
    return "; ".join(parts)
