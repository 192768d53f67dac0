"""SIGTERM and SIGUSR1, by which schedulers ask for the end of a job.

The program ends where it is, except in the training loop, which asks `received` between steps and saves a checkpoint.
"""

import os
import signal
import sys
from types import FrameType

from mica_ds.errors import Preempted

EXIT_CODE = os.EX_TEMPFAIL
"""75: nothing is wrong, start the same command again."""

INTERRUPT_CODE = 130
"""Of a program that an interrupt from its terminal has ended, as in shells."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_is_deferred = _is_received = _has_raised = False


def watch_imports() -> None:
    """End at once at the two signals, until `watch`: no library's import has to bear an exception. Local."""
    for number in _SIGNALS:
        signal.signal(number, _leave)


def watch() -> None:
    """Take notice of the two signals from now on. Local, on the main thread."""
    for number in _SIGNALS:
        signal.signal(number, _handle)


def received() -> bool:
    """Whether this rank has got one of the signals. Local."""
    return _is_received


def defer(is_deferred: bool) -> None:
    """Whether to note signals only, instead of ending at once. Local. Raises: Preempted, at the end of a deferral."""
    global _is_deferred
    _is_deferred = is_deferred
    if _is_received and not is_deferred:
        raise Preempted("stopped by a signal; start again to go on")


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(sys.stdout.fileno(), _told(number).encode() + b"\n")
    os._exit(EXIT_CODE)


def _told(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}; start again to go on"


def _handle(number: int, frame: FrameType | None) -> None:
    global _is_received, _has_raised
    _is_received = True
    # An exception that is being handled may be the end of a rank that got its signal first: it goes on its way.
    if not _has_raised and not _is_deferred and sys.exception() is None:
        _has_raised = True
        raise Preempted(_told(number))
