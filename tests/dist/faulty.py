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

    Beside `raise`, `return`, `exit`, `kill`, `stop` and `sleep` it may go on with little memory: with so many bytes
    more than are taken, or in the memory cgroup of a folder.
    """
    rank, place, act = sys.argv[1:4]
    del sys.argv[1:4]
    if rank == os.environ["RANK"]:
        run = comm.run
        comm.run = lambda verb: run(lambda: _break_down(verb, place, act))  # type: ignore[assignment]
    cli.app()


def _break_down(verb: Callable[[], None], place: str, act: str) -> None:
    def fault(*args: Any, **kwargs: Any) -> Any:
        print("FAULT", flush=True)
        if act == "exit":
            os._exit(0)
        if act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if act.isdigit():
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + int(act), resource.RLIM_INFINITY))
        if act.startswith("/"):
            Path(act, "cgroup.procs").write_text(str(os.getpid()))
        if act.isdigit() or act.startswith("/"):
            setattr(owner, names[-1], original)
            return original(*args, **kwargs)
        if act == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            return original(*args, **kwargs)
        if act == "sleep":
            time.sleep(75)
            return original(*args, **kwargs)
        raise Returned if act == "return" else ZeroDivisionError("division by zero")

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
