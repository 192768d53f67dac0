"""A program for the tests: `mica_ds` on a host of given room, which notes its memory before a model is loaded."""

import os
from pathlib import Path
from typing import Any

from mica_ds import capacity, cli, comm, recipe
from mica_ds.meter import rss

_load_model = recipe.load_model


def _noting(*args: Any) -> Any:
    Path(os.environ["MEASURED"], str(comm.rank())).write_text(str(rss()))
    return _load_model(*args)


if __name__ == "__main__":
    recipe.load_model = _noting
    if "FREE_MIB" in os.environ:
        capacity._host_memory = lambda: int(os.environ["FREE_MIB"]) << 20
    cli.app()
