"""A program for the campaign: `mica_ds` that tells when a step and its update begin, and some of whose work is slowed.

Updates, checkpoints and exports are over so soon that a signal would seldom meet them.
"""

import time
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

from mica_ds import checkpoint, cli, comm, export, trainer

PAUSE = 0.1  # seconds before and after each optimizer's step and each file
_gather_states = checkpoint.gather_states


def _slow(act: Callable[..., Any]) -> Callable[..., Any]:
    def act_slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(PAUSE)
        found = act(*args, **kwargs)
        time.sleep(PAUSE)
        return found

    return act_slowly


def _gather_slowly(engine: Any) -> Any:
    for found in _gather_states(engine):
        time.sleep(PAUSE / 100)  # a tensor
        yield found


def _telling(act: Callable[[Any], None], what: str) -> Callable[[Any], None]:
    def tell(step: Any) -> None:
        print(f"\n{step}: {what}", flush=True)
        act(step)

    return tell


if __name__ == "__main__":
    checkpoint.save_file, export.save_file = _slow(checkpoint.save_file), _slow(export.save_file)
    checkpoint.gather_states = _gather_slowly
    comm.at = _telling(comm.at, "computing")  # called as a step begins
    trainer.heed_signals = _telling(trainer.heed_signals, "updating")  # called as a step's update begins
    Zero._optimizer_step = _slow(Zero._optimizer_step)
    cli.app()
