"""A program for the tests: `mica_ds` on a host of given room; notes what memory and traffic its training takes."""

import json
import os
from pathlib import Path
from typing import Any

from mica_ds import cli, comm, process, recipe
from mica_ds.callback import RunCallback
from mica_ds.meter import rss

from ..collectives import Collectives

_load_model, _begin, _end = recipe.load_model, RunCallback.on_step_begin, RunCallback.on_step_end
_collectives = Collectives()


def _note(**found: int) -> None:
    with Path(os.environ["MEASURED"], f"{comm.rank()}.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")


def _noting(*args: Any) -> Any:
    """Memory before a model is loaded."""
    _note(before=rss())
    return _load_model(*args)


def _counting(self: RunCallback, args: Any, state: Any, control: Any, **others: Any) -> None:
    """What is gathered in the last step, in bytes of whole tensors."""
    if state.global_step == state.max_steps - 1:
        _collectives.__enter__()
    _begin(self, args, state, control, **others)


def _counted(self: RunCallback, args: Any, state: Any, control: Any, **others: Any) -> None:
    if state.global_step == state.max_steps:
        _collectives.__exit__(None, None, None)
        _note(gathered=_collectives.bytes["all-gather"])
    _end(self, args, state, control, **others)


if __name__ == "__main__":
    recipe.load_model = _noting
    RunCallback.on_step_begin, RunCallback.on_step_end = _counting, _counted  # type: ignore[method-assign]
    if "FREE_MIB" in os.environ:
        process.free_memory = lambda: int(os.environ["FREE_MIB"]) << 20
    cli.app()
