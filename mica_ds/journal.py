"""The run folder's journal: everything that is tracked, one JSON object a line, before anything is sent anywhere.

    {"kind": "run", "id": …, "name": …, "experiment": …, "parent": …}     once for a run
    {"kind": "params", "values": {…}}                                     once for a run
    {"kind": "start", "attempt": 2, "uri": …}                             for each start of it
    {"kind": "tags", "values": {…}}
    {"kind": "metrics", "step": 7, "values": {…}}                         numbers, NaN and Infinity among them
    {"kind": "artifact", "path": …, "under": …}                           a path in the run folder, or an absolute one
    {"kind": "register", "name": …, "under": …}                           an artifact for the model registry
    {"kind": "end", "status": "FINISHED" | "FAILED" | "KILLED"}

Each line has a `time` (ms since 1970) that no other line has, so that no two metrics are equal in all they hold.
"""

import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mica_ds.errors import UserError

JOURNAL = "journal.jsonl"
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

    def close(self) -> None:
        self._file.close()


class Journal:
    """A journal open for writing, by one process at a time; what a writer that was killed left half is taken away.

    A disk that is full or fails raises nothing: the lines wait in memory for the next one.
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
        self.params: dict[str, Any] = {}
        self.is_ended = True
        self.error: OSError | None = None
        """Why lines wait."""
        self._waiting = bytearray()
        self._lock = threading.Lock()  # a failure's end is written by another thread
        self._time = 0
        reader = Reader(folder)
        for line in reader.read():
            self._note(line or {})
        if os.fstat(self._file).st_size > reader.position:
            os.ftruncate(self._file, reader.position)
        reader.close()

    @property
    def waiting(self) -> int:
        """Lines that could not be written yet."""
        return self._waiting.count(b"\n")

    def begin(self, **about: Any) -> None:
        """Write the first line of a run."""
        if not self.is_ended:
            self.write("end", status="KILLED")
        self.write("run", id=uuid.uuid4().hex, **about)

    def write(self, kind: str, **content: Any) -> None:
        """Write one line, after those that wait; some 0.1 ms."""
        with self._lock:
            line = {"kind": kind, "time": max(time.time_ns() // 1_000_000, self._time + 1), **content}
            self._note(line)
            self._waiting += json.dumps(line).encode() + b"\n"
            self._write()

    def close(self) -> None:
        """Try a last time to write what waits, and let others write."""
        self._write()
        os.close(self._file)

    def _write(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: os.write(self._file, self._waiting)]
            self.error = None
        except OSError as error:
            self.error = error

    def _note(self, line: Line) -> None:
        self.lines += 1
        self._time = max(self._time, line.get("time", 0))
        match line.get("kind"):
            case "run":
                self.run, self.attempt, self.params, self.is_ended = line["id"], 0, {}, False
            case "params":
                self.params |= line["values"]
            case "start":
                self.attempt, self.is_ended = line["attempt"], False
            case "end":
                self.is_ended = True


def mend(folder: Path) -> None:
    """Note the end of a run whose process was killed; nothing, where it goes on or has ended in good order. Local.

    Raises: UserError where there is no journal, or it cannot be written.
    """
    Reader(folder).close()
    try:
        journal = Journal(folder)
    except BlockingIOError:
        return
    if not journal.is_ended:
        journal.write("end", status="KILLED")
    journal.close()


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
