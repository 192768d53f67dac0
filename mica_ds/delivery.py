"""What of a journal a store has, and how it gets the rest: MLflow's side of the tracking.

A line may be sent twice, and counts once: MLflow's SQL store (3.17) ignores a metric that is the same in key, step,
time and value, and the rest sets what is already set. What the store has acknowledged is noted in the run folder.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby, islice, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mica_ds.files import locked, partial, remove_abandoned, replace_text
from mica_ds.journal import Line, Reader
from mica_ds.stores import SQLITE, database_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

RECEIPTS = "sync.json"
JOURNAL_TAG = "mica_ds.journal"
"""The tag of an MLflow run that holds the id of the journal's run."""
_PARENT_TAG = "mlflow.parentRunId"
# MLflow's limits for one request (3.17).
_METRICS, _PARAM_LENGTH, _TAG_LENGTH = 1000, 6000, 8000
_DATA = ("metrics", "params", "tags")
_FILES = ("artifact", "register")
_FINAL = ("INVALID_PARAMETER_VALUE", "PERMISSION_DENIED")
_NOTHING: dict[str, Any] = {"lines": 0, "time": None, "journal": None, "run": None}


class Delivery:
    """Brings one store up to date with one journal. Everything MLflow raises passes through."""

    def __init__(self, folder: Path, uri: str, say: Callable[[str], None]) -> None:
        """`say` is told of an artifact that cannot be sent any more."""
        self._folder, self._uri, self._say = folder, uri, say
        self._reader = Reader(folder)
        self._receipt = _NOTHING | _receipts(folder).get(uri, {})
        self._client: MlflowClient | None = None
        self._ahead = 0  # bytes of the journal whose numbers are sent before the artifacts among them

    def send(self) -> None:
        """Send what the journal holds by now, and note after each part that it has arrived."""
        client = self._client = self._client or self._connect()
        while True:
            start = self._reader.position
            if not (part := self._next_part()):
                return
            is_file = part[0] is not None and part[0]["kind"] in _FILES
            try:
                self._reader.sync()  # else new lines might take the place of sent ones, once the power fails
                self._ship(client, [line for line in part if line])
            except Exception:
                self._reader.position = start
                if is_file:
                    self._send_ahead(client)
                raise
            if is_file:
                self._ahead = 0  # what comes after it is sent again, and older words and states with it
            self._receipt |= {"lines": self._receipt["lines"] + len(part), "time": _time(part[-1])}
            self._save()

    def finish(self, unwritten: bytes = b"") -> None:
        """Send all, with lines that the journal had no room for, and put right what the store has of the run.

        That is: delete runs that it has made twice, when the request for one had timed out, and take in the children
        that were sent before it.
        """
        client = self._client = self._client or self._connect()
        self._send_ahead(client)
        self.send()
        for is_data, lines in groupby(map(json.loads, unwritten.splitlines()), lambda line: line["kind"] in _DATA):
            for part in [list(lines)] if is_data else [[line] for line in lines]:
                self._ship(client, part)
        if run := self._receipt["run"]:
            experiment, journal = client.get_run(run).info.experiment_id, self._receipt["journal"]
            for other in _runs(client, experiment, JOURNAL_TAG, journal):
                if other != run:
                    client.delete_run(other)
            for child in _runs(client, experiment, _PARENT_TAG, journal):
                client.set_tag(child, _PARENT_TAG, run)

    def _send_ahead(self, client: "MlflowClient") -> None:
        """Send numbers, words and the status before the artifacts among them, which may be late or not be taken."""
        start = self._reader.position
        self._reader.position = max(start, self._ahead)
        rest = [line for line in self._reader.read() if line]
        end, self._reader.position = self._reader.position, start
        kinds = {line["kind"] for line in rest}
        has_files = self._ahead > start or not kinds.isdisjoint(_FILES)
        if self._receipt["run"] and has_files and "run" not in kinds:
            _log(client, self._receipt["run"], [line for line in rest if line["kind"] in _DATA])
            for line in rest:
                if line["kind"] in ("start", "end"):
                    self._ship(client, [line])
            self._ahead = end

    def _connect(self) -> "MlflowClient":
        import mlflow  # takes seconds, and memory

        with _alone(self._uri) as database:
            if database and not database.exists():
                _make(database)
            client = mlflow.MlflowClient(tracking_uri=self._uri)
        if self._receipt["run"] and not _is_active(client, self._receipt["run"]):
            self._receipt = dict(_NOTHING)  # deleted, or another store than before at the same address: all over again
        if not _pass_sent(self._reader, self._receipt):
            self._receipt |= {"lines": 0, "time": None}
        return client

    def _next_part(self) -> list[Line | None]:
        """Lines that go in one request each of a kind, or one line that is a request of its own."""
        part: list[Line | None] = []
        before = self._reader.position
        for line in self._reader.read():
            is_data = line is None or line["kind"] in _DATA
            if part and not is_data:
                self._reader.position = before  # for the next part
                break
            part.append(line)
            before = self._reader.position
            if not is_data or len(part) == _METRICS:
                break
        return part

    def _ship(self, client: "MlflowClient", lines: list[Line]) -> None:
        kind, run = lines[0]["kind"] if lines else None, self._receipt["run"]
        if kind == "run":
            self._receipt |= {"journal": lines[0]["id"], "run": self._open_run(client, lines[0])}
        elif run is None:
            return  # nothing of a run whose first line is damaged can be sent
        elif kind == "start":
            client.update_run(run, "RUNNING")
        elif kind == "end":
            client.set_terminated(run, lines[0]["status"], lines[0]["time"])
        elif kind == "artifact":
            path = self._folder / lines[0]["path"]
            unreadable = [part for part in (path, *path.rglob("*")) if not os.access(part, os.R_OK)]
            if unreadable:  # asked beforehand: a file that is refused while it is sent may be the store's
                self._say(f"{path} is not sent: {unreadable[0]} cannot be read")
            else:
                log = client.log_artifacts if path.is_dir() else client.log_artifact
                with self._going_on(str(path)):
                    log(run, str(path), lines[0]["under"])
        elif kind == "register":
            with self._going_on(f"model {lines[0]['name']}"):
                self._register(client, lines[0]["name"], lines[0]["under"])
        else:
            _log(client, run, lines)

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """Pass over what can never be sent: it must not hold up what comes after it."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code not in _FINAL:
                raise
            self._say(f"{what} is refused, and is not sent: {str(error).splitlines()[0]}")

    def _open_run(self, client: "MlflowClient", line: Line) -> str:
        """The journal's run in the store; one that was asked for before may be there without an answer that arrived."""
        experiment = client.get_experiment_by_name(line["experiment"])
        if experiment:
            number = experiment.experiment_id
        else:
            database = database_file(self._uri)
            artifacts = (database.parent / "mlflow-artifacts").as_uri() if database else None
            number = client.create_experiment(line["experiment"], artifacts)
        if runs := _runs(client, number, JOURNAL_TAG, line["id"]):
            return min(runs)
        tags = {JOURNAL_TAG: line["id"]}
        if parent := line["parent"]:  # may be sent later than this one: then that puts it right
            tags[_PARENT_TAG] = min(_runs(client, number, JOURNAL_TAG, parent), default=parent)
        return client.create_run(number, line["time"], tags, line["name"]).info.run_id

    def _register(self, client: "MlflowClient", name: str, under: str) -> None:
        run = self._receipt["run"]
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        source = f"{client.get_run(run).info.artifact_uri}/{under}"
        versions = client.search_model_versions(f"name = '{name}' and run_id = '{run}'")
        if source not in {version.source for version in versions}:
            client.create_model_version(name, source, run)

    def _save(self) -> None:
        with suppress(OSError):  # a full disk: it would be sent again
            receipts = _receipts(self._folder) | {self._uri: self._receipt}
            replace_text(self._folder / RECEIPTS, json.dumps(receipts, indent=1))


def _log(client: "MlflowClient", run: str, lines: list[Line]) -> None:
    """Send the values of some lines in as few requests as MLflow takes."""
    from mlflow.entities import Metric, Param, RunTag

    of = {kind: [line for line in lines if line["kind"] == kind] for kind in _DATA}
    metrics = [
        Metric(key, value, line["time"], line["step"])
        for line in of["metrics"]
        for key, value in line["values"].items()
    ]
    params = {key: str(value)[:_PARAM_LENGTH] for line in of["params"] for key, value in line["values"].items()}
    tags = {key: str(value)[:_TAG_LENGTH] for line in of["tags"] for key, value in line["values"].items()}
    client.log_batch(run, metrics, list(starmap(Param, params.items())), list(starmap(RunTag, tags.items())))


def _pass_sent(reader: Reader, receipt: dict[str, Any]) -> int:
    """Read the lines that a store has acknowledged, and return their number.

    0 where the journal was cut before the last of them, by a repair or an old copy: it may have grown since.
    """
    times = [_time(line) for line in islice(reader.read(), receipt["lines"])]
    if len(times) == receipt["lines"] and times[-1:] in ([], [receipt["time"]]):
        return len(times)
    reader.position = 0
    return 0


def _time(line: Line | None) -> int | None:
    """What tells a line from all others; None for a damaged one."""
    return line.get("time") if line else None


def _runs(client: "MlflowClient", experiment: str, tag: str, journal: str) -> list[str]:
    """The ids of the store's runs with the id of a journal's run as this tag."""
    found = client.search_runs([experiment], f"tags.`{tag}` = '{journal}'")
    return [run.info.run_id for run in found]


def _is_active(client: "MlflowClient", run: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _make(database: Path) -> None:
    """Make a SQLite store, whole or not at all: a half-made one would stay useless. Local."""
    import mlflow

    remove_abandoned(database.parent)
    unfinished = partial(database)
    try:
        mlflow.MlflowClient(tracking_uri=f"{SQLITE}{unfinished}")
        with suppress(OSError):  # another was faster, or the file system has no links: then it is made in its place
            os.link(unfinished, database)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _alone(uri: str) -> Iterator[Path | None]:
    """Keep others from making a SQLite store at the same time: they spoil each other's tables (MLflow 3.17).

    Gives its file; None for other stores.
    """
    database = database_file(uri)
    if database is None:
        yield None
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with locked(database.with_name(f"{database.name}.lock")):
        yield database


def unsent(folder: Path, uri: str) -> int:
    """How many lines of a folder's journal a store has not acknowledged. Local."""
    reader = Reader(folder)
    _pass_sent(reader, _NOTHING | _receipts(folder).get(uri, {}))
    return sum(1 for _ in reader.read())


def _receipts(folder: Path) -> dict[str, dict[str, Any]]:
    """By URI: how many lines it has, the time of the last, of which journal that was, and its run."""
    try:
        found = json.loads((folder / RECEIPTS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
