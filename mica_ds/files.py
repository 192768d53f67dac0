"""Files that are whole or absent, their hashes, and folders that several jobs work on at once."""

import fcntl
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


@contextmanager
def replacing(file: Path, is_shared: bool = False) -> Iterator[Path]:
    """Gives a path to write to, which takes the file's place at the end and is removed at an error. Local.

    `is_shared`: other jobs may write the same file now. What is written is on the disk before it has its name: after a
    power cut the file may be the earlier one, but not empty.
    """
    unfinished = partial(file) if is_shared else file.with_name(f"{file.name}.partial")
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def replace_text(file: Path, text: str, is_shared: bool = False) -> None:
    """Write a text file by `replacing`. Local."""
    with replacing(file, is_shared) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Local."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def partial(target: Path) -> Path:
    """Where to write what is to become `target`: a name that no other job writes to. Local."""
    return target.with_name(f"{target.name}.{socket.gethostname()}-{os.getpid()}.partial")


def remove_abandoned(folder: Path) -> None:
    """Remove what is left in a folder at names that `partial` gave to processes of this host which are gone. Local.

    Those of other hosts may still write: not every file system's locks reach over hosts.
    """
    name = re.compile(rf".+\.{re.escape(socket.gethostname())}-(\d+)\.partial")
    for left in list(folder.iterdir()):
        if (match := name.fullmatch(left.name)) and not psutil.pid_exists(int(match[1])):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with suppress(OSError):  # another user's, or another rank was faster
                    left.unlink()


def file_hash(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits. Local."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


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


def lock_at_once(file: int) -> bool:
    """Take the lock of an open file; False while another process has it. Local."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True
