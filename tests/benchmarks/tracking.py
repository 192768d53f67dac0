"""What tracking costs the step of a training.

    python tests/benchmarks/tracking.py [--out FILE.json]

The time inside the tracker's calls over the time of the step, in one run, with an `mlflow server` that is healthy, that
is down, and that accepts requests and never answers; and the same of MLflow's own client, to the healthy one. Each step
takes 50 ms, as no real one is shorter, and logs three metrics.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlflow
from common import ROOT, Row, print_rows, say, write_json
from mlflow.entities import Metric

sys.path.append(str(ROOT))
from tests.conftest import environment, free_ports, write_config
from tests.servers import Proxy, Server

STEPS, STEP = 300, 0.05
SHARE = 0.02


def track(folder: Path, uri: str) -> dict[str, float]:
    """Run tests/tracked.py against a store, and return what it has found."""
    folder.mkdir()
    config = write_config(folder, Path("none"), tracking={"uri": uri, "experiment": folder.name})
    command = [sys.executable, "-m", "tests.tracked", str(config), str(STEPS), str(STEP)]
    output = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"median"')))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder)
        proxy = Proxy(server.port)
        proxy.mode = "hang"
        stores = {"healthy": server.uri, "down": f"http://127.0.0.1:{free_ports(1)[0]}", "hanging": proxy.uri}
        try:
            for state, uri in stores.items():
                say(f"a server that is {state} ...")
                found[state] = track(folder / state, uri)
            stock = track_by_mlflow(server.uri)
        finally:
            proxy.close()
            server.kill()
    rows = [
        Row(
            f"tracking, server {state}",
            "step",
            "1 x 1",
            share["median"] * STEP * 1e3,
            STEP * 1e3,
            at_most=SHARE,
            unit="ms",
        )
        for state, share in found.items()
    ]
    rows.append(Row("MLflow's client, server healthy", "step", "1 x 1", stock * STEP * 1e3, STEP * 1e3, unit="ms"))
    print_rows(rows)
    for state, share in found.items():
        median, highest, end = share["median"], share["highest"], share["end"]
        print(f"server {state}: {median:.2%} of a step, the highest {highest:.2%}; {end:.1f} s at the end")
    if arguments.out:
        write_json(arguments.out, rows, found)


if __name__ == "__main__":
    main()
