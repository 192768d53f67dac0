"""One MLflow run for one run folder, from rank 0."""

import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from mica_ds import comm
from mica_ds.config import Config
from mica_ds.errors import UserError

_SQLITE = "sqlite:///"


class Tracker:
    """An open MLflow run on rank 0; on the other ranks every method does nothing.

    A context manager: the run ends as FINISHED, as KILLED at an interrupt, and as FAILED at any other error.
    """

    def __init__(self, config: Config) -> None:
        """Collective. Raises: UserError where the tracking store cannot be opened."""
        with comm.failing_together():
            if comm.is_main():
                self._open(config)

    def _open(self, config: Config) -> None:
        # Imported here: it takes seconds, which the other ranks need not spend.
        import mlflow
        from mlflow.entities import Param

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel("WARNING")
        uri, artifacts = config.tracking.uri, None
        try:
            if uri.startswith(_SQLITE):
                database = Path(uri.removeprefix(_SQLITE)).absolute()
                database.parent.mkdir(parents=True, exist_ok=True)
                uri, artifacts = (
                    f"{_SQLITE}{database}",
                    (database.parent / "mlflow-artifacts").as_uri(),
                )
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            name = config.tracking.experiment
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name, artifacts)
            self._run = self._client.create_run(number, run_name=config.output_dir.name).info.run_id
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"tracking.uri: {config.tracking.uri} cannot be opened: {reason}") from None
        parameters = [Param(key, str(value)[:6000]) for key, value in _flatten(config.model_dump(mode="json"))]
        self._client.log_batch(self._run, params=parameters)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log numbers at a step. Local."""
        if comm.is_main():
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            self._client.log_batch(
                self._run,
                metrics=[Metric(k, float(v), now, step) for k, v in values.items()],
            )

    def artifact(self, path: Path, under: str | None = None) -> None:
        """Log a file, or a folder with all that is in it. Local."""
        if comm.is_main():
            log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            log(self._run, str(path), under)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if comm.is_main():
            status = "FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
            self._client.set_terminated(self._run, status)


def pages_command(uri: str) -> str:
    """The command that opens MLflow's pages on a store."""
    return f"mlflow server --backend-store-uri {uri}" if uri.startswith(_SQLITE) else f"open {uri}"


def _flatten(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in settings.items():
        flat += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return flat
