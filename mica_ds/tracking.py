"""The run's tracking: rank 0 writes it to the journal, and a process of its own sends that to MLflow."""

import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mica_ds import comm
from mica_ds.about import about
from mica_ds.config import Config, flatten
from mica_ds.delivery import unsent
from mica_ds.errors import UserError
from mica_ds.journal import Journal
from mica_ds.sender import GRACE
from mica_ds.signals import EXIT_CODE
from mica_ds.stores import SQLITE, check_folder, resolve_uri


class Tracker:
    """An open run in rank 0's journal; on the other ranks every method does nothing.

    A run folder goes on with the run it has, as its next attempt; with resume=never the journal begins another. A
    context manager: the attempt ends as FINISHED, as KILLED at an interrupt, and as FAILED at any other error. No fault
    of the store reaches the training.
    """

    def __init__(self, config: Config) -> None:
        """Collective. Raises: UserError where the store cannot exist, or another run writes to the run folder."""
        self._folder, self._uri = config.output_dir, resolve_uri(config.tracking.uri)
        self._is_warned = False
        hosts = comm.gather(socket.gethostname())
        with comm.failing_together():
            if comm.is_main():
                check_folder(self._uri)
                self._open(config, hosts)

    def _open(self, config: Config, hosts: list[str]) -> None:
        try:
            self._journal = Journal(self._folder)
        except BlockingIOError:
            raise UserError(f"output_dir: {self._folder} belongs to a run that still goes on; choose another") from None
        settings, tracking = flatten(config.model_dump(mode="json")), config.tracking
        if config.resume == "never" or self._journal.run is None:
            self._journal.begin(name=self._folder.name, experiment=tracking.experiment, parent=tracking.parent)
        if not self._journal.params:
            self._journal.write("params", values=settings)
        # What differs from the first attempt is a tag of this one: MLflow changes no parameter.
        known = self._journal.params
        changed = {key: value for key, value in settings.items() if key not in known or known[key] != value}
        made_by = {"world_size": len(hosts), "hosts": ", ".join(dict.fromkeys(hosts)), **about(), **changed}
        self._journal.write("start", attempt=self._journal.attempt + 1, uri=self._uri)
        self.tags({f"attempt.{self._journal.attempt}.{key}": value for key, value in made_by.items()})
        comm.at_abort(lambda code: self._note_end("KILLED" if code == EXIT_CODE else "FAILED"))
        self._sender: subprocess.Popen[bytes] | None = None
        try:
            self._sender = subprocess.Popen(
                [sys.executable, "-m", "mica_ds.sender", str(self._folder), self._uri],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's interrupt is meant for the run
            )
        except OSError as error:
            comm.say(f"warning: tracking: nothing is sent during the run: {error.strerror}")

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

    def _note_end(self, status: str) -> None:
        if not self._journal.is_ended:
            self._journal.write("end", status=status)

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
        self._note_end("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")
        self._journal.close()
        if lost := self._journal.waiting:
            comm.say(f"warning: tracking: {lost} lines could not be written to the journal, and are lost")
        self._end_sender()
        if left := unsent(self._folder, self._uri, self._journal.lines - lost):
            comm.say(
                f"warning: tracking: {left} of {self._journal.lines - lost} lines are not sent to {self._uri} yet; "
                f"`mica-ds sync {self._folder}` sends them"
            )

    def _end_sender(self) -> None:
        """Let the sender bring what is left, for GRACE seconds at most."""
        if self._sender is None:
            return
        assert self._sender.stdin
        with suppress(OSError):  # it has ended already
            self._sender.stdin.write(b"\n")
            self._sender.stdin.close()
        try:
            self._sender.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._sender.kill()


def pages_command(uri: str) -> str:
    """The command that opens MLflow's pages on a store."""
    return f"mlflow server --backend-store-uri {uri}" if uri.startswith(SQLITE) else f"open {uri}"
