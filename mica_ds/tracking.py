"""The run's tracking: rank 0 writes it to the journal, and a process of its own sends that to MLflow."""

import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from mica_ds import comm
from mica_ds.about import about
from mica_ds.config import TrackingSettings
from mica_ds.delivery import unsent
from mica_ds.errors import UserError
from mica_ds.journal import JOURNAL, Journal
from mica_ds.sender import GRACE
from mica_ds.settings import flatten
from mica_ds.signals import EXIT_CODE, INTERRUPT_CODE
from mica_ds.stores import SQLITE, check_folder, resolve_uri


class Tracker:
    """An open run in rank 0's journal; on the other ranks every method does nothing.

    A run folder goes on with the run it has, as its next attempt; with resume=never the journal begins another. A
    context manager: the attempt ends as FINISHED, as KILLED at an interrupt, and as FAILED at any other error. No fault
    of the store reaches the training.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrackingSettings,
        parameters: dict[str, Any],
        begins_anew: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the run of a folder, or another one where it `begins_anew`. Collective.

        `parameters` may be nested; `check` is called on rank 0 once no other process writes to the folder. Raises:
        UserError where the store cannot exist, or another process writes to the folder; what `check` raises.
        """
        self._folder, self._uri, self._is_warned = folder, resolve_uri(settings.uri), False
        hosts = comm.gather(socket.gethostname())
        with comm.failing_together():
            if comm.is_main():
                self._open(settings, flatten(parameters), begins_anew, check, hosts)
        self.id: str = comm.gather(self._journal.run if comm.is_main() else None)[0]
        """Of the journal's run: what its children name as `tracking.parent`, before any store has the run."""

    def _open(
        self,
        settings: TrackingSettings,
        parameters: dict[str, Any],
        begins_anew: bool,
        check: Callable[[], None],
        hosts: list[str],
    ) -> None:
        try:
            check_folder(self._uri)
        except UserError as error:
            if begins_anew or not (self._folder / JOURNAL).exists():
                raise
            comm.say(f"warning: {error}")  # a run that was requeued does not end for it
        try:
            self._journal = Journal(self._folder)
        except BlockingIOError:
            raise UserError(f"output_dir: {self._folder} belongs to a run that still goes on; choose another") from None
        try:
            check()
        except BaseException:
            self._journal.close()
            raise
        if begins_anew or self._journal.run is None:
            self._journal.begin(name=self._folder.name, experiment=settings.experiment, parent=settings.parent)
        if not self._journal.params:
            self._journal.write("params", values=parameters)
        # What differs from the first attempt is a tag of this one: MLflow changes no parameter.
        known = self._journal.params
        changed = {key: value for key, value in parameters.items() if key not in known or known[key] != value}
        made_by = {"world_size": len(hosts), "hosts": ", ".join(dict.fromkeys(hosts)), **about(), **changed}
        self._journal.start(self._uri)
        self.tags({f"attempt.{self._journal.attempt}.{key}": value for key, value in made_by.items()})
        comm.at_abort(lambda code: self._journal.end("KILLED" if code in (EXIT_CODE, INTERRUPT_CODE) else "FAILED"))
        self._sender = _start_sender(self._folder, self._uri)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Note numbers at a step; some 0.1 ms. Local."""
        if values:
            self._write("metrics", step=step, values={key: float(value) for key, value in values.items()})

    def tags(self, values: dict[str, Any]) -> None:
        """Note words about the run, which later ones of the same keys replace. Local."""
        self._write("tags", values={key: str(value) for key, value in values.items()})

    def artifact(self, path: Path, under: str | None = None) -> None:
        """Note a file, or a folder with all that is in it; it is read when it is sent. Local."""
        path, folder = path.absolute(), self._folder.absolute()
        self._write("artifact", path=str(path.relative_to(folder) if folder in path.parents else path), under=under)

    def register(self, name: str, under: str) -> None:
        """Note that the artifact under this name is a new version of a model in MLflow's registry. Local."""
        self._write("register", name=name, under=under)

    def _write(self, kind: str, **content: Any) -> None:
        if not comm.is_main():
            return
        self._journal.write(kind, **content)
        if (error := self._journal.error) and not self._is_warned:
            self._is_warned = True
            comm.say(f"warning: tracking: the journal waits in memory: {error.strerror}; make room in {self._folder}")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not comm.is_main():
            return
        self._journal.end("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")
        _close(self._journal, self._sender, self._folder, self._uri)


def finish(folder: Path, uri: str) -> None:
    """Note that a folder's run has finished, and send what the store has not got, for GRACE seconds at most. Local.

    Nothing where another process writes to the folder. Raises: UserError where the journal cannot be written.
    """
    uri = resolve_uri(uri)
    try:
        journal = Journal(folder)
    except BlockingIOError:
        return
    if journal.run and journal.status != "FINISHED":  # killed after its last work, before its last line
        journal.write("end", status="FINISHED")
    sender = _start_sender(folder, uri) if unsent(folder, uri) else None
    _close(journal, sender, folder, uri)


def _start_sender(folder: Path, uri: str) -> "subprocess.Popen[bytes] | None":
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "mica_ds.sender", str(folder), uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's interrupt is meant for the run
        )
    except OSError as error:
        comm.say(f"warning: tracking: nothing is sent during the run: {error.strerror}")
        return None


def _close(journal: Journal, sender: "subprocess.Popen[bytes] | None", folder: Path, uri: str) -> None:
    """Let the sender bring what is left, for GRACE seconds at most, and say what was not sent or found no room."""
    unwritten = journal.close()
    if sender:
        try:
            sender.communicate(unwritten, timeout=GRACE)
        except subprocess.TimeoutExpired:
            sender.kill()
            sender.wait()
    is_sent = sender is not None and sender.returncode == 0
    if lost := unwritten.count(b"\n"):
        what = f"{uri} has them, and no other store will" if is_sent else "they are lost"
        comm.say(f"warning: tracking: {lost} lines found no room in {folder}: {what}")
    written = journal.lines - lost
    if not is_sent and (left := unsent(folder, uri)):
        command = ["mica-ds", "sync", str(folder), *(["--uri", uri] if uri != journal.uri else [])]
        comm.say(
            f"warning: tracking: {left} of {written} lines are not sent to {uri} yet; "
            f"`{shlex.join(command)}` sends them"
        )


def pages_command(uri: str) -> str:
    """The command that opens MLflow's pages on a store."""
    return shlex.join(["mlflow", "server", "--backend-store-uri", uri] if uri.startswith(SQLITE) else ["open", uri])
