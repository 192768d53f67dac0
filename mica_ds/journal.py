"""The run folder's journal: everything that is tracked, one JSON object a line, before anything is sent anywhere.

    {"kind": "run", "id": …, "name": …, "experiment": …, "parent": …}     once for a run
    {"kind": "params", "values": {…}}                                     once for a run
    {"kind": "start", "attempt": 2, "uri": …, "host": …, "boot": …}       for each start of it
    {"kind": "tags", "values": {…}}
    {"kind": "metrics", "step": 7, "values": {…}}                         numbers, NaN and Infinity among them
    {"kind": "artifact", "path": …, "under": …}                           a path in the run folder, or an absolute one
    {"kind": "register", "name": …, "under": …}                           an artifact for the model registry
    {"kind": "end", "status": "FINISHED" | "FAILED" | "KILLED"}

Each line has a `time` (ms since 1970) that no other line has, so that no two metrics are equal in all they hold.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mica_ds.errors import UserError

JOURNAL = "journal.jsonl"
_RESERVE = "journal.reserve"
_RESERVED = 16 << 10  # bytes, for the end of a run on a full disk
SILENCE = 300
"""Seconds without a sign of life after which a run on another machine is taken for dead."""
_WAIT = 2.0  # seconds for a lock that another process may hold for a moment, to mend the journal

Line = dict[str, Any]


class Reader:
    """Reads a journal that may still grow. Raises: UserError where there is none."""

    def __init__(self, folder: Path) -> None:
        try:
            self._file = (folder / JOURNAL).open("rb")
        except OSError as error:
            raise UserError(f"{folder / JOURNAL} cannot be read: {error.strerror}") from None
        self.position = 0
        """Bytes of the whole lines that were read."""

    def read(self) -> Iterator[Line | None]:
        """The lines that are whole and were not read before; None for one that is damaged."""
        self._file.seek(0, os.SEEK_END)  # forgets what it has buffered: half a line, perhaps, that was cut since
        self._file.seek(self.position)
        while (line := self._file.readline()).endswith(b"\n"):
            self.position += len(line)
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            yield found if isinstance(found, dict) else None

    def sync(self) -> None:
        """Have what was written put on the disk, whoever wrote it."""
        os.fsync(self._file.fileno())

    def age(self) -> float:
        """Seconds since the last line or other sign of life."""
        return time.time() - os.fstat(self._file.fileno()).st_mtime

    def has_locks(self) -> bool:
        """Whether a lock shows if a process of this machine writes."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(self._file, fcntl.LOCK_UN)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._file.close()


class Journal:
    """A journal open for writing, by one process at a time; what a writer that was killed left half is taken away.

    A disk that is full or fails raises nothing: the lines wait in memory for the next one. For the last one, and what
    fits besides it, room is kept on the disk meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        """Raises: UserError where the file cannot be opened, BlockingIOError while another process writes to it."""
        try:
            self._file = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"{folder / JOURNAL} cannot be written: {error.strerror}") from None
        try:
            _lock(self._file)
        except BlockingIOError:
            os.close(self._file)
            raise
        self.lines = self.attempt = 0
        """Lines of the file and of what waits; starts of the run."""
        self.run: str | None = None
        """Id of the run that the last lines are of."""
        self.uri: str | None = None
        """Of the store that the last start has named; None before the first."""
        self.params: dict[str, Any] = {}
        self.status: str | None = "none yet"
        """How the last attempt has ended; None while it goes on."""
        self.error: OSError | None = None
        """Why lines wait."""
        self._waiting = bytearray()
        self._reserve = folder / _RESERVE
        self._lock = threading.Lock()  # a failure's end is written by another thread
        self._time = 0
        reader = Reader(folder)
        for line in reader.read():
            self._note(line or {})
        if os.fstat(self._file).st_size > reader.position:
            os.ftruncate(self._file, reader.position)
        reader.close()
        self._keep_room()

    def begin(self, **about: Any) -> None:
        """Write the first line of a run."""
        self.end("KILLED")
        self.write("run", id=uuid.uuid4().hex, **about)

    def start(self, uri: str) -> None:
        """Write the first line of the run's next attempt, on this machine."""
        self.write("start", attempt=self.attempt + 1, uri=uri, host=socket.gethostname(), boot=_boot())

    def end(self, status: str) -> None:
        """Write the last line of an attempt that has none; on a full disk before those that find no room in the end."""
        with self._lock:
            if self.status:
                return
            self._append("end", status=status)
            if self._waiting:
                with suppress(OSError):
                    self._reserve.unlink()
                last = self._waiting.rfind(b"\n", 0, -1) + 1
                # Whole blocks are given away: what fills half of them leaves room for one line.
                first = self._waiting.rfind(b"\n", 0, min(last, _RESERVED // 2)) + 1
                self._waiting = self._waiting[:first] + self._waiting[last:] + self._waiting[first:last]
                self._write()

    def write(self, kind: str, **content: Any) -> None:
        """Write one line, after those that wait; some 0.1 ms."""
        with self._lock:
            self._append(kind, **content)

    def _append(self, kind: str, **content: Any) -> None:
        line = {"kind": kind, "time": max(time.time_ns() // 1_000_000, self._time + 1), **content}
        self._note(line)
        self._waiting += json.dumps(line).encode() + b"\n"
        self._write()

    def close(self) -> bytes:
        """Try a last time to write what waits, let others write, and return the lines that found no room."""
        self._write()
        os.close(self._file)
        with suppress(OSError):  # there is none
            self._reserve.unlink()
        return bytes(self._waiting)

    def _write(self) -> None:
        """Write what waits, or as many lines of it as there is room for."""
        try:
            while self._waiting:
                written = os.write(self._file, self._waiting)
                whole = self._waiting.rfind(b"\n", 0, written) + 1
                del self._waiting[:whole]
                if whole < written:
                    os.ftruncate(self._file, os.fstat(self._file).st_size - (written - whole))
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.error = None
        except OSError as error:
            self.error = error

    def _keep_room(self) -> None:
        with suppress(OSError):  # a disk that is full already
            file = os.open(self._reserve, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.posix_fallocate(file, 0, _RESERVED)
            finally:
                os.close(file)

    def _note(self, line: Line) -> None:
        self.lines += 1
        self._time = max(self._time, line.get("time", 0))
        match line.get("kind"):
            case "run":
                self.run, self.attempt, self.params, self.status = line["id"], 0, {}, None
            case "params":
                self.params |= line["values"]
            case "start":
                self.attempt, self.uri, self.status = line["attempt"], line["uri"], None
            case "end":
                self.status = line["status"]


def mend(folder: Path) -> None:
    """Note the end of a run whose process was killed; nothing, where it goes on or has ended in good order. Local.

    Raises: UserError where there is no journal, or it cannot be written.
    """
    Reader(folder).close()
    try:
        journal = Journal(folder)
    except BlockingIOError:
        return
    journal.end("KILLED")
    journal.close()


def refuse_elsewhere(folder: Path) -> None:
    """Refuse a run that may go on on another machine, whose lock may not be seen here. Local.

    A killed one is taken for dead at once on its own machine, and after SILENCE seconds on others.
    Raises: UserError that names the other host.
    """
    reader, last = Reader(folder), None
    for line in reader.read():
        if line and line.get("kind") in ("start", "end"):
            last = line
    age = reader.age()
    may_go_on = last and last["kind"] == "start" and age < SILENCE
    if last and may_go_on and not (last["boot"] == _boot() and reader.has_locks()):
        raise UserError(
            f"{folder} belongs to a run that was alive on {last['host']} {age:.0f} s ago, and sends its journal from "
            f"there; if it has been killed since, try again in {SILENCE - age:.0f} s"
        )
    reader.close()


def _boot() -> str:
    """What tells one start of one machine from all others: containers share locks if they share it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _lock(file: int) -> None:
    deadline = time.monotonic() + _WAIT
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        except OSError:
            return None  # a file system without locks
