"""A program for the campaign: `mica_ds` whose checkpoints and exports take long enough to be hit."""

import time
from collections.abc import Callable
from typing import Any

from mica_ds import checkpoint, cli, export

PAUSE = 0.1  # seconds before each file
_gather_states = checkpoint.gather_states


def _slow(write: Callable[..., None]) -> Callable[..., None]:
    def write_slowly(*args: Any, **kwargs: Any) -> None:
        time.sleep(PAUSE)
        write(*args, **kwargs)

    return write_slowly


def _gather_slowly(engine: Any) -> Any:
    for found in _gather_states(engine):
        time.sleep(PAUSE / 5)  # a tensor
        yield found


if __name__ == "__main__":
    checkpoint.save_file, export.save_file = _slow(checkpoint.save_file), _slow(export.save_file)  # type: ignore[assignment]
    checkpoint.gather_states = _gather_slowly
    cli.app()
