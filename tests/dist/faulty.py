"""A program for the tests: `mica_ds`, on one rank of which a function does something else than it should."""

import os
import sys
from collections.abc import Callable
from typing import Any

from mica_ds import cli, comm

ACTS: dict[str, Callable[[], Any]] = {
    "raise": lambda: 1 / 0,
    "exit": lambda: os._exit(0),
}


def main() -> None:
    """Arguments: RANK MODULE.FUNCTION ACT, then those of `mica-ds`; `return` leaves the verb itself early."""
    rank, place, act = sys.argv[1:4]
    sys.argv[1:4] = []
    if rank == os.environ["RANK"]:
        comm.run, run = lambda verb: run(lambda: _broken(verb, place, act)), comm.run
    cli.app()


class _Returned(Exception):  # noqa: N818
    pass


def _broken(verb: Callable[[], None], place: str, act: str) -> None:
    import importlib

    from mica_ds import recipe  # noqa: F401  all modules of the package

    def fault(*args: Any, **kwargs: Any) -> Any:
        if act == "return":
            raise _Returned
        return ACTS[act]()

    module, function = place.rsplit(".", 1)
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:
        module, cls = module.rsplit(".", 1)
        owner = getattr(importlib.import_module(module), cls)
    setattr(owner, function, fault)
    try:
        verb()
    except _Returned:
        return


if __name__ == "__main__":
    main()
