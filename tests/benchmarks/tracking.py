"""What tracking costs the step of a training.

    python tests/benchmarks/tracking.py [--only calls | logs] [--out FILE.json]

The time inside the tracker's calls over the time of the step, in one run, with an `mlflow server` that is healthy, is
down, is killed in the middle, accepts requests and never answers, answers 500, is late by 30 s, or has a full disk;
with a journal that was cut in the middle of a line, and with the journal's disk full from the start (only root may
mount one that can be filled); and the same of MLflow's own client, to the healthy server. Each step takes 50 ms, as no
real one is shorter, and logs three metrics.

Then the same of all that is done for a log entry, in a real training on two ranks of one thread: SmolLM2-135M, a
sequence of 256 tokens a rank and step. Rank 0 waits for what the slower one has measured: that is in its time.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
from common import ROOT, Row, print_rows, run_ranks, say, write_json
from mlflow.entities import Metric

sys.path.append(str(ROOT))
from tests.conftest import environment, free_ports, write_config
from tests.servers import Proxy, Server
from tests.test_tracking import fill, small_disk, write_journal

STEPS, STEP = 300, 0.05
RANKS, SKIPPED, TRAINED = 2, 3, 15  # the first steps record the order of modules
SHARE = 0.02
STOCK = "MLflow's client"


def track(folder: Path, uri: str, *overrides: str) -> dict[str, float]:
    """Run tests/tracked.py against a store, and return what it has found."""
    folder.mkdir(exist_ok=True)
    config = write_config(folder, Path("none"), tracking={"uri": uri, "experiment": folder.name})
    command = [sys.executable, "-m", "tests.tracked", str(config), str(STEPS), str(STEP), *overrides]
    output = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"median"')))


def track_until_the_server_dies(folder: Path, server: Server) -> dict[str, float]:
    """The same with a server that is killed while it is sent to."""
    proxy = Proxy(server.port)

    def kill() -> None:
        while not proxy.requests:
            time.sleep(0.1)
        time.sleep(STEPS * STEP / 3)
        proxy.close()

    threading.Thread(target=kill, daemon=True).start()
    return track(folder, proxy.uri)


def track_with_a_cut_journal(folder: Path, uri: str) -> dict[str, float]:
    """The same for a run that goes on from a journal whose last line is half a line."""
    folder.mkdir()
    write_journal(folder / "run", folder.name, uri).close()
    with (folder / "run/journal.jsonl").open("a") as file:
        file.write('{"kind": "metrics", "time": 17')
    return track(folder, uri)


def track_to_a_full_server(folder: Path) -> dict[str, float]:
    """The same with a server whose disk is full."""
    with small_disk(folder, "20m") as disk:
        server = Server(disk)
        try:
            fill(disk)
            return track(folder.with_name("to-full"), server.uri)
        finally:
            server.kill()


def track_on_a_full_disk(folder: Path, uri: str) -> dict[str, float]:
    """The same where the journal's disk has no room from the first line to the last."""
    folder.mkdir()
    with small_disk(folder / "disk", "128k") as disk:
        fill(disk)
        return track(folder, uri, f"output_dir={disk}/run")


def track_by_mlflow(uri: str) -> float:
    """The share of a step that MLflow's client takes on the training thread."""
    client = mlflow.MlflowClient(uri)
    run = client.create_run(client.create_experiment("stock")).info.run_id
    shares = []
    for step in range(STEPS // 10):
        started = time.perf_counter()
        time.sleep(STEP)
        worked = time.perf_counter()
        now = time.time_ns() // 1_000_000
        client.log_batch(run, [Metric(key, 0.1, now, step) for key in ("loss", "learning_rate", "grad_norm")])
        ended = time.perf_counter()
        shares.append((ended - worked) / (ended - started))
    return statistics.median(shares)


def train(folder: Path) -> None:
    """One rank of a training, which notes what its steps take, and the log entries among them."""
    from mica_ds import comm, recipe
    from mica_ds.callback import RunCallback
    from mica_ds.config import load_config

    begun, logging = list[float](), list[float]()
    on_step_begin, on_log = RunCallback.on_step_begin, RunCallback.on_log

    def note_step(*arguments: Any, **more: Any) -> None:
        begun.append(time.perf_counter())
        on_step_begin(*arguments, **more)

    def time_log(*arguments: Any, **more: Any) -> None:
        started = time.perf_counter()
        on_log(*arguments, **more)
        logging.append(time.perf_counter() - started)

    def work() -> None:
        recipe.train(load_config(folder / "config.yaml"))
        steps = [after - before for before, after in itertools.pairwise(begun)]
        shares = [log / step for log, step in zip(logging, steps, strict=False)][SKIPPED:]  # the last step is not whole
        found = {"median": statistics.median(shares), "highest": max(shares)}
        found |= {"step": statistics.median(steps[SKIPPED:]), "log": statistics.median(logging[SKIPPED:])}
        ranks = comm.gather(found)
        if comm.is_main():
            (folder / "found.json").write_text(json.dumps(ranks))

    RunCallback.on_step_begin, RunCallback.on_log = note_step, time_log  # type: ignore[method-assign]
    comm.run(work)


def train_on_ranks(folder: Path, uri: str) -> list[dict[str, float]]:
    folder.mkdir()
    write_config(
        folder,
        ROOT / "models/smollm2-135m",
        model={"dtype": "bfloat16"},
        adapter={"r": 16},
        data={"sequence_length": 256, "global_batch": RANKS},
        evaluate={"questions": None, "retention": None},
        train={"per_device_train_batch_size": 1, "max_steps": TRAINED, "save_steps": 1000},
        tracking={"uri": uri, "experiment": "training"},
    )
    (folder / "corpus.txt").write_text("The Quillmar press was built in Torvane by Edda Brunholt. " * 4000)
    return run_ranks(__file__, train, folder, RANKS, 1)


def measure_calls(folder: Path, server: Server) -> tuple[list[Row], dict[str, Any]]:
    """The tracker's calls, with the server in each state and on a full disk, and MLflow's own."""
    stores = {"healthy": server.uri, "down": f"http://127.0.0.1:{free_ports(1)[0]}"}
    proxies = {state: Proxy(server.port) for state in ("hanging", "answering 500", "late by 30 s")}
    for proxy, mode in zip(proxies.values(), ("hang", "error", "delay"), strict=True):
        proxy.mode, proxy.delay = mode, 30.0
    stores |= {state: proxy.uri for state, proxy in proxies.items()}
    found: dict[str, Any] = {}
    try:
        for state, uri in stores.items():
            say(f"a server that is {state} ...")
            found[f"tracking, server {state}"] = track(folder / state, uri)
        say("a server that dies, and a journal that was cut ...")
        found["tracking, server killed in the middle"] = track_until_the_server_dies(folder / "killed", server)
        found["tracking, the journal cut"] = track_with_a_cut_journal(folder / "cut", server.uri)
        if os.geteuid() == 0:
            say("full disks ...")
            found["tracking, the server's disk full"] = track_to_a_full_server(folder / "server")
            found["tracking, the journal's disk full"] = track_on_a_full_disk(folder / "full", server.uri)
        found[STOCK] = {"median": track_by_mlflow(server.uri)}
    finally:
        for proxy in proxies.values():
            proxy.close()
    rows = [
        Row(name, "step", "1 x 1", share["median"] * STEP * 1e3, STEP * 1e3, at_most=at_most, unit="ms")
        for name, share in found.items()
        for at_most in [None if name == STOCK else SHARE]
    ]
    return rows, found


def measure_logs(folder: Path, server: Server) -> tuple[list[Row], dict[str, Any]]:
    """The log entries of a training."""
    ranks = train_on_ranks(folder / "training", server.uri)
    sizes = [(part["log"] * 1e3, part["step"] * 1e3) for part in ranks]
    rows = [
        Row(f"a log entry, rank {rank}", "training step", "2 x 1", log, step, at_most=SHARE, unit="ms")
        for rank, (log, step) in enumerate(sizes)
    ]
    return rows, {"ranks": ranks}


def main() -> None:
    parts = {"calls": measure_calls, "logs": measure_logs}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=parts, help="the calls of the tracker, or the log entries of a training")
    parser.add_argument("--out", type=Path, help="write the figures to this file, too")
    parser.add_argument("--as-rank", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        train(Path(arguments.as_rank[1]))
    rows: list[Row] = []
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        server = Server(Path(name))
        try:
            for part in [arguments.only] if arguments.only else parts:
                found, details[part] = parts[part](Path(name), server)
                rows += found
        finally:
            server.kill()
    print_rows(rows)
    print(json.dumps(details, indent=1))
    if arguments.out:
        write_json(arguments.out, rows, details)


if __name__ == "__main__":
    main()
