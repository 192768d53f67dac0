"""A program for the tests and benchmarks: a loop of one process that tracks like a training, and takes as long.

Arguments: the config, the number of steps, the seconds of each; a file `enough` beside the config ends it earlier.
Prints the share of a step that tracking took (the median and the highest), the seconds that the end took, and the
id of the run and the addresses that Python has connected to.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mica_ds.config import load_config
from mica_ds.tracking import Tracker

SPECIAL = {2: math.inf, 3: -math.inf, 4: math.nan}


def main(file: str, steps: str, seconds: str, *overrides: str) -> None:
    connected: list[str] = []
    sys.addaudithook(lambda event, values: connected.append(str(values[1])) if event == "socket.connect" else None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = load_config(Path(file), list(overrides))
    config.output_dir.mkdir(exist_ok=True)
    settings, shares = config.model_dump(mode="json"), []
    with Tracker(config.output_dir, config.tracking, settings, begins_anew=config.resume == "never") as tracker:
        for step in range(int(steps)):
            started = time.perf_counter()
            time.sleep(float(seconds))
            worked = time.perf_counter()
            values = {"loss": SPECIAL.get(step, 1 / (step + 1)), "learning_rate": 1e-3, "grad_norm": 0.1 * step}
            tracker.metrics(values, step)
            ended = time.perf_counter()
            shares.append((ended - worked) / (ended - started))
            print(step, flush=True)
            if Path(file).with_name("enough").exists():
                break
        adapter = Path(file).with_name("adapter")
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text("{}")
        tracker.artifact(Path(file))
        tracker.artifact(adapter, under="adapter")
        if config.tracking.register_as:
            tracker.register(config.tracking.register_as, under="adapter")
        ended = time.perf_counter()
    found: dict[str, Any] = {
        "median": statistics.median(shares),
        "highest": max(shares),
        "end": time.perf_counter() - ended,
    }
    found |= {"id": tracker.id, "connected": connected, "imported": "mlflow" in sys.modules}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
