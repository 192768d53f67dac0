"""The study's own run in MLflow, of which its runs are children: a journal like theirs, in the study's folder."""

import subprocess
import sys
from pathlib import Path
from types import TracebackType

from mica_ds.arms import StudySettings
from mica_ds.config import TrackingSettings, flatten, save_config
from mica_ds.errors import UserError
from mica_ds.journal import Journal
from mica_ds.stores import check_folder, resolve_uri


class Parent:
    """The journal of a study, open for one process at a time.

    A context manager: the attempt ends as FINISHED, as FAILED where `is_failed` is set or at an error, and as KILLED at
    an interrupt. No fault of the store reaches the study.
    """

    def __init__(self, study: StudySettings, tracking: TrackingSettings) -> None:
        """Local. Raises: UserError where the folder cannot be written, or another study writes to it."""
        self._folder, self._uri = study.output_dir, resolve_uri(tracking.uri)
        self.is_failed = False
        check_folder(self._uri)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_config(study, self._folder / "study.yaml")
            self._journal = Journal(self._folder)
        except BlockingIOError:
            raise UserError(f"output_dir: {self._folder} belongs to a study that still goes on") from None
        except OSError as error:
            raise UserError(f"output_dir: {self._folder} cannot be written: {error.strerror}") from None
        if self._journal.run is None:
            self._journal.begin(name=self._folder.name, experiment=tracking.experiment, parent=tracking.parent)
            self._journal.write("params", values=flatten(study.model_dump(mode="json")))
        assert self._journal.run
        self.id: str = self._journal.run
        """Of the journal's run: what the study's runs name as `tracking.parent`."""
        self._journal.start(self._uri)
        self.artifact(self._folder / "study.yaml")
        self._sync()  # before the runs, so that a new SQLite file is made by one process alone

    def metrics(self, values: dict[str, float]) -> None:
        """Note numbers. Local."""
        self._journal.write("metrics", step=0, values=values)

    def artifact(self, path: Path) -> None:
        """Note a file of the study's folder. Local."""
        self._journal.write("artifact", path=path.name, under=None)

    def _sync(self) -> None:
        """Send what the journal holds, by a process of its own: MLflow takes seconds and memory."""
        command = [sys.executable, "-m", "mica_ds", "sync", str(self._folder), "--uri", self._uri]
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
        if done.returncode:
            print(f"warning: tracking: {done.stderr.strip().removeprefix('error: ')}", file=sys.stderr)

    def __enter__(self) -> "Parent":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_killed = kind is not None and issubclass(kind, KeyboardInterrupt)
        is_failed = kind is not None or self.is_failed
        self._journal.end("KILLED" if is_killed else "FAILED" if is_failed else "FINISHED")
        self._journal.close()
        self._sync()
