"""A program for the tests: `mica_ds` on ranks of which one is ill in several ways, named in AILMENTS (JSON)."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from mica_ds import cli, comm


def main() -> None:
    """AILMENTS: the `rank`, a folder of other `versions`, seconds by which its `clock` is ahead, its own `output_dir`,
    `collectives` whose results it gets wrong, a `link` (rank) that is slow and late for it, and whether it has
    `one_core`, finds `no_compiler` or `hangs` in these collectives.
    """
    ailments = json.loads(os.environ["AILMENTS"])
    if str(ailments["rank"]) == os.environ["RANK"]:
        sys.path.insert(0, ailments["versions"])
        sys.argv.append(f"output_dir={ailments['output_dir']}")
        run = comm.run
        comm.run = lambda verb: run(lambda: _fall_ill(verb, ailments))  # type: ignore[assignment]
    cli.app()


def _fall_ill(verb: Callable[[], None], ailments: dict[str, Any]) -> None:
    from deepspeed import comm as training

    now, exchange, receive, wait = time.time, training.batch_isend_irecv, comm.receive, comm.wait
    received: list[torch.Tensor] = []

    def spoilt(collective: Callable[..., Any]) -> Callable[..., None]:
        def wrong(output: torch.Tensor, *args: Any) -> None:
            if ailments["hangs"]:
                time.sleep(1000)
            collective(output, *args)
            output[-1] += 1

        return wrong

    def noted(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
        received.append(tensor)
        return receive(tensor, *args, **more)

    def spoil_received(works: list[Any]) -> None:
        wait(works)
        for tensor in received:
            tensor[-1] += 1

    def slow(operations: list[Any]) -> Any:
        if operations[0].peer == ailments["link"]:
            time.sleep(1 if operations[0].tensor.numel() > 1 else 0.05)
        return exchange(operations)

    time.time = lambda: now() + ailments["clock"]
    for name in ailments["collectives"]:
        setattr(training, name, spoilt(getattr(training, name)))
    comm.receive, comm.wait = noted, spoil_received
    training.batch_isend_irecv = slow
    if ailments["one_core"]:
        os.sched_setaffinity(0, {0})
    if ailments["no_compiler"]:
        os.environ["PATH"] = ""
    verb()


if __name__ == "__main__":
    main()
