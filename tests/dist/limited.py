"""A program for the tests: `mica_ds` with little memory for the training steps."""

import resource
from pathlib import Path

from mica_ds import cli, comm

ROOM = 100 << 20  # bytes


def _limit(rest: str) -> None:
    """Note the first step as `comm.at` does, and from then on allow little more than what is taken."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, resource.RLIM_INFINITY))


if __name__ == "__main__":
    comm.at = _limit  # called as the first step begins
    cli.app()
