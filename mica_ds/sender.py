"""Ships a run folder's journal to MLflow: beside the training, as a process of its own, and later by `mica-ds sync`."""

import fcntl
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mica_ds.delivery import Delivery, unsent
from mica_ds.errors import UserError
from mica_ds.journal import JOURNAL, SILENCE, Reader, mend, refuse_elsewhere
from mica_ds.stores import without_secrets

LOCK = "sync.lock"
GRACE = 10
"""Seconds that a sender has for the rest once the run has ended."""
_INTERVAL = 2.0  # seconds between two batches
_LONGEST_PAUSE = 30.0  # seconds between two attempts to reach a store
_SYNC_PAUSES = (0, 1, 3)


def sync(folder: Path, uri: str | None) -> str:
    """Send a run folder's journal to the store it was meant for, or to another, and return what was done. Local.

    Raises: UserError where there is nothing to send, another process is sending or may be on another machine, or the
    store does not take it all.
    """
    refuse_elsewhere(folder)
    mend(folder)
    lines = list(Reader(folder).read())
    uris = [line["uri"] for line in lines if line and line["kind"] == "start"]
    uri = uri or next(reversed(uris), "")
    has_run = any(line and line["kind"] == "run" for line in lines)
    if not uris or not (has_run or unsent(folder, uri) < len(lines)):
        raise UserError(f"{folder}: the journal holds no run" + (", or its first line is damaged" if lines else ""))
    damaged = f", but for {count} that are damaged" if (count := lines.count(None)) else ""
    _prepare()
    with _alone(folder, wait=False):
        before, reason = unsent(folder, uri), ""
        for pause in _SYNC_PAUSES:
            time.sleep(pause)
            try:
                Delivery(folder, uri, _warn).finish()
            except Exception as error:  # whatever MLflow, requests, SQLAlchemy or the disk may raise
                reason = _reason(error)
            else:
                return f"sync: {before} lines sent, {uri} has all {len(lines)} of {folder}{damaged}"
    left = unsent(folder, uri)
    raise UserError(f"{uri} has not taken {left} of {len(lines)} lines ({reason}); the same command sends them later")


def follow(folder: Path, uri: str) -> None:
    """Send the journal as it grows, until stdin is closed; then, for GRACE seconds at most, what is left. Local.

    Stdin brings the lines that the journal had no room for.
    """
    is_over, unwritten = threading.Event(), bytearray()
    threading.Thread(target=_wait_for_end, args=[is_over, unwritten], daemon=True).start()
    threading.Thread(target=_show_life, args=[is_over, folder], daemon=True).start()
    _prepare()
    with _alone(folder, wait=True):
        delivery, failures = Delivery(folder, uri, _warn), 0
        while True:
            is_last = is_over.is_set()
            try:
                if is_last:
                    mend(folder)
                    return delivery.finish(bytes(unwritten))
                delivery.send()
                failures = 0
            except Exception as error:  # whatever MLflow, requests, SQLAlchemy or the disk may raise
                if not failures:
                    _warn(f"{uri} cannot be reached; the run goes on, and its journal is sent later ({_reason(error)})")
                failures += 1
            if is_last:
                time.sleep(1)
            is_over.wait(min(_INTERVAL * 2 ** min(failures, 8), _LONGEST_PAUSE))


def _wait_for_end(is_over: threading.Event, unwritten: bytearray) -> None:
    """The pipe from the run's process closes when that ends, also when it is killed."""
    unwritten += sys.stdin.buffer.read()
    signal.alarm(GRACE)  # ends this process, whatever it waits for
    is_over.set()


def _show_life(is_over: threading.Event, folder: Path) -> None:
    """The journal's time of change tells other machines that the run goes on, when it has nothing to write for long."""
    while not is_over.wait(SILENCE / 10):
        with suppress(OSError):
            os.utime(folder / JOURNAL)


def _prepare() -> None:
    """Without MLflow's own retries, which take minutes for each request, its warnings and its statistics."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


@contextmanager
def _alone(folder: Path, wait: bool) -> Iterator[None]:
    """Hold the run folder's lock for senders. Raises: UserError where another has it, and `wait` is not set."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context((folder / LOCK).open("w"))
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{folder} is being sent by another process; try again when that has ended") from None
        except OSError:
            pass  # a full disk, or a file system without locks
        yield


def _reason(error: Exception) -> str:
    line = next(iter(without_secrets(str(error)).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= 300 else f"{line[:300]}…"


def _warn(message: str) -> None:
    message = without_secrets(message)
    print(f"\nwarning: tracking: {message}", file=sys.stderr, flush=True)  # a progress bar leaves its line open


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # meant for the run, which says when it is over
        signal.signal(number, signal.SIG_IGN)
    follow(Path(sys.argv[1]), sys.argv[2])
