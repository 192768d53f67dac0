"""Folders that several jobs work on at once."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(file: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Keep other jobs out meanwhile; whether that worked, since not every file system knows locks. Local.

    `waiting` is called where another job is inside, before this one waits for it.
    """
    with open(file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = True
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
            is_held = True
        except OSError:
            is_held = False
        yield is_held


def partial(target: Path) -> Path:
    """Where to write what is to become `target`: a name that no other job writes to. Local."""
    return target.with_name(f"{target.name}.{socket.gethostname()}-{os.getpid()}.partial")
