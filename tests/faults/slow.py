"""A program for the campaign: `mica_ds` that tells when the parts of a step begin, and some of whose work is slowed.

Updates, checkpoints and exports are over so soon that a signal would seldom meet them.
"""

import time
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

from mica_ds import checkpoint, cli, export, trainer

PAUSE = 0.25  # seconds before and after each optimizer's step and each file
_gather_states, _heed_signals = checkpoint.gather_states, trainer.heed_signals


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


def _tell(step: object, what: str) -> None:
    print(f"\nstep {step}: {what}", flush=True)


class _TellingTrainer(trainer.MicaTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step + 1
        _tell(step, "forward")
        loss = super().compute_loss(*args, **kwargs)
        _tell(step, "backward")
        return loss


def _heed_telling(step: int) -> None:
    _tell(step, "update")  # begins so
    _heed_signals(step)


if __name__ == "__main__":
    checkpoint.save_file, export.save_file = _slow(checkpoint.save_file), _slow(export.save_file)
    checkpoint.gather_states = _gather_slowly
    trainer.MicaTrainer, trainer.heed_signals = _TellingTrainer, _heed_telling  # type: ignore[misc]
    Zero._optimizer_step = _slow(Zero._optimizer_step)
    cli.app()
