"""A program for the tests: `mica_ds`, on one rank of which a function does something else than it should."""

import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mica_ds import cli, comm


class Returned(BaseException):
    """Leaves the verb, as if it had come to its end."""


def main() -> None:
    """Arguments: the RANK, a MODULE.FUNCTION or MODULE.CLASS.METHOD, what it does, then those of `mica-ds`.

    It may `return` from the verb, or give `none` instead of what it should; beside that and the others below, it may go
    on with little memory: a number of bytes, or a cgroup's folder.
    """
    rank, place, act = sys.argv[1:4]
    del sys.argv[1:4]
    if rank == os.environ["RANK"]:
        run = comm.run

        def run_faulty(verb: Callable[[], None]) -> None:
            if place.startswith("mica_ds."):  # imports DeepSpeed, which wants to be started first
                run(lambda: _break_down(verb, place, act))
            _break_down(lambda: run(verb), place, act)

        comm.run = run_faulty  # type: ignore[assignment]
    cli.app()


def _raise(_: str) -> None:
    raise ZeroDivisionError("division by zero")


def _starve(room: str) -> None:
    """Go on with so many bytes more than are taken, or in the memory cgroup of a folder."""
    if room.isdigit():
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + int(room), resource.RLIM_INFINITY))
    else:
        Path(room, "cgroup.procs").write_text(str(os.getpid()))


_ACTS: dict[str, Callable[[str], Any]] = {
    "raise": _raise,
    "exit": lambda _: os._exit(0),
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda _: time.sleep(75),
}


def _break_down(verb: Callable[[], None], place: str, act: str) -> None:
    def fault(*args: Any, **kwargs: Any) -> Any:
        print("FAULT", flush=True)
        setattr(owner, names[-1], original)
        if act == "return":
            raise Returned
        if act == "none":
            return None
        _ACTS.get(act, _starve)(act)
        return original(*args, **kwargs)

    package, module, *names = place.split(".")
    owner = importlib.import_module(f"{package}.{module}")
    for name in names[:-1]:
        owner = getattr(owner, name)
    original = getattr(owner, names[-1])
    setattr(owner, names[-1], fault)
    try:
        verb()
    except Returned:
        return


if __name__ == "__main__":
    main()
