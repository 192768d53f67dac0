"""A program for the tests: the bases of a config from ZeRO-3's partitions, and what they cost in memory and traffic.

From the checkpoint's files with SOURCE=files.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

from mica_ds import comm


def main() -> None:
    from mica_ds.adapter import stored_targets, target_modules  # these import DeepSpeed, to be started first
    from mica_ds.arguments import training_arguments
    from mica_ds.basis import build_basis
    from mica_ds.config import load_config
    from mica_ds.model import DTYPES, load_model, load_skeleton
    from mica_ds.shards import CheckpointSource, PartitionSource, WeightSource
    from mica_ds.weights import open_checkpoint

    config = load_config(Path(sys.argv[1]), sys.argv[2:])
    source: WeightSource
    if os.environ.get("SOURCE") == "files":
        targets = stored_targets(load_skeleton(config.model), config.adapter, open_checkpoint(config.model.path))
        source = CheckpointSource(targets, DTYPES[config.model.dtype])
    else:
        _arguments = training_arguments(config)  # kept alive: zero.Init reads its DeepSpeed settings
        model = load_model(config.model)
        source = PartitionSource(target_modules(model, config.adapter))
    # glibc raises the size from which it hands freed blocks back (M_MMAP_THRESHOLD) as blocks are freed: which it kept
    # for itself moved a peak of 180 MB by 16, from one run to the next.
    ctypes.CDLL(None).mallopt(-3, 128 << 10)
    comm.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, traffic = _peak(), _received()
    comm.barrier()
    build_basis(source, config.adapter, config.basis, 0, config.output_dir / "basis")
    comm.barrier()
    grown = comm.gather(_peak() - before)
    if comm.is_main():
        costs = {"received": _received() - traffic, "grown": grown}
        (config.output_dir / "costs.json").write_text(json.dumps(costs))


def _peak() -> int:
    """The most memory since the last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _received() -> int:
    """Bytes that the loopback interface has received: what all ranks of this machine have, whoever sent it how."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


if __name__ == "__main__":
    comm.run(main)
