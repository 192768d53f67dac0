"""What the benchmarks share: rank processes, their memory, and the table of ratios."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import scipy
import torch
from rich.console import Console
from rich.table import Table

from mica_ds.process import free_port

ROOT = Path(__file__).resolve().parents[2]
CORES = len(os.sched_getaffinity(0))
GIB = 1 << 30

Found = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One ratio: how many times faster ours is or, where there is a limit, how much more it takes."""

    work: str
    against: str
    layout: str
    """Ranks x threads."""
    ours: float
    other: float
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "s"
    """Seconds, an amount, or a rate (`…/s`)."""

    @property
    def ratio(self) -> float:
        is_time = self.at_most is None and self.unit == "s"
        return self.other / self.ours if is_time else self.ours / self.other

    @property
    def target(self) -> str:
        """The bound, and whether it is met."""
        if self.at_most is not None:
            return f"at most {self.at_most:g}: {'met' if self.ratio <= self.at_most else 'MISSED'}"
        if self.at_least is not None:
            return f"at least {self.at_least:g}: {'met' if self.ratio >= self.at_least else 'MISSED'}"
        return ""


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reset_peak() -> None:
    """VmHWM begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def run_ranks(script: str, work: Callable[..., Any], folder: Path, ranks: int, threads: int, **arguments: Any) -> Any:
    """Run `script --as-rank work folder arguments` as rank processes, and return the found.json that they leave."""
    say(f"{work.__name__} {arguments or ''} on {ranks} x {threads} ...")
    port = str(free_port())
    command = [sys.executable, script, "--as-rank", work.__name__, str(folder), json.dumps(arguments)]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": str(threads)}
    environments = [{**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    # Their stdout goes to stderr: the tables alone go to stdout.
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=2) for environment in environments]
    try:
        if any(process.wait() for process in processes):
            raise SystemExit(f"{work.__name__} failed")
    finally:
        for process in processes:
            process.kill()
    return json.loads((folder / "found.json").read_text())


def run_row(name: str, row: Callable[[Path], tuple[list[Row], Found]]) -> tuple[list[Row], Found]:
    """The figures of a row, in a folder of its own. GPUs are hidden from all but the row `gpu`."""
    hiding = {} if name == "gpu" else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, hiding):
        return row(Path(folder))


def describe_machine() -> Found:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cpu": cpu, "cores": CORES, **gpu, "torch": torch.__version__, "scipy": scipy.__version__}


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)


def print_rows(rows: list[Row]) -> None:
    title = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    table = Table("work", "against", "ranks x threads", "ours", "other", "ratio", "target", title=title)
    for row in rows:
        sizes = (f"{value:.2f} {row.unit}" for value in (row.ours, row.other))
        table.add_row(row.work, row.against, row.layout, *sizes, f"{row.ratio:.2f} x", row.target)
    console().print(table)


def write_json(file: Path, rows: list[Row], details: Found) -> None:
    kept = [{**dataclasses.asdict(row), "ratio": row.ratio, "target": row.target} for row in rows]
    file.write_text(json.dumps({"machine": describe_machine(), "rows": kept, "details": details}, indent=1))
