"""Tracking against a real `mlflow server` that breaks down: nothing waits for it, and nothing is lost or kept twice."""

import base64
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest

from mica_ds.errors import UserError
from mica_ds.journal import Journal, Reader
from mica_ds.stores import check_folder, check_uri

from .conftest import ROOT, Finished, environment, finish, free_ports, launch_ranks, start, start_ranks, write_config
from .servers import Proxy, Server
from .slurm import wait_until

SHARE = 0.02  # of a step
STEP = 0.05  # seconds
END_LIMIT = 12  # seconds: 10 for the sender
LARGEST = sys.float_info.max  # what MLflow makes of Infinity


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    if os.system(f"mount -t tmpfs -o size={size} tmpfs {folder} 2>/dev/null"):
        pytest.skip("only root may mount the small disk that this fills")
    try:
        yield folder
    finally:
        os.system(f"umount -l {folder}")


def fill(disk: Path) -> Path:
    """Leave no room on a disk, until the returned file is removed."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 1024)
        except OSError:
            return ballast


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The server's: a small one where this is root, so that it can be filled."""
    folder = tmp_path_factory.mktemp("server")
    if os.geteuid() != 0:
        yield folder
    else:
        with small_disk(folder, "20m"):
            yield folder


@pytest.fixture(scope="module")
def server(disk: Path) -> Iterator[Server]:
    server = Server(disk)
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


class Run:
    """A run folder of tests/tracked.py, with an experiment of its own."""

    def __init__(self, folder: Path, uri: str, **sections: Any) -> None:
        self.uri, self.experiment, self.folder = uri, folder.name, folder / "run"
        tracking = {"uri": uri, "experiment": folder.name, **sections.pop("tracking", {})}
        self.config = write_config(folder, Path("none"), tracking=tracking, **sections)
        self.found: dict[str, float] = {}

    def launch(self, steps: int, *overrides: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.tracked", str(self.config), str(steps), str(STEP), *overrides]
        variables = {"OMP_NUM_THREADS": "1", **variables}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment(**variables), start_new_session=True, **pipe)

    def wait(self, process: subprocess.Popen[str]) -> str:
        """The output of a run that ends well, having spent little in tracking and at the end."""
        finished = finish([process])
        assert finished.codes == [0], finished.output
        (found,) = [json.loads(line) for line in finished.output.splitlines() if line.startswith('{"median"')]
        assert found["median"] < SHARE
        assert found["end"] < END_LIMIT
        return finished.output

    def do(self, steps: int, *overrides: str, **variables: str) -> str:
        return self.wait(self.launch(steps, *overrides, **variables))

    def sync(self, *options: str, **variables: str) -> Finished:
        return start([sys.executable, "-m", "mica_ds", "sync", str(self.folder), *options], **variables)

    def lines(self) -> list[dict[str, Any]]:
        return [line for line in Reader(self.folder).read() if line]

    def wait_for(self, step: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            if line.strip() == str(step):
                return
        raise AssertionError("it has ended before")

    def runs(self, uri: str) -> list[Any]:
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(self.experiment)
        return list(client.search_runs([experiment.experiment_id])) if experiment else []


def number(value: float) -> str:
    """A metric's value as MLflow keeps it; as text, so that NaN is equal to NaN."""
    return repr(math.copysign(LARGEST, value) if math.isinf(value) else float(value))


def assert_same(run: Run, uri: str, status: str = "FINISHED") -> Any:
    """The store holds one run, and of it just what the journal does; returns it."""
    (found,) = run.runs(uri)
    client, lines = mlflow.MlflowClient(uri), run.lines()
    assert found.info.status == status
    noted = [
        (key, line["step"], number(value), line["time"])
        for line in lines
        if line["kind"] == "metrics"
        for key, value in line["values"].items()
    ]
    history = [m for key in found.data.metrics for m in client.get_metric_history(found.info.run_id, key)]
    assert Counter((m.key, m.step, number(m.value), m.timestamp) for m in history) == Counter(noted)
    for kind, there in (("params", found.data.params), ("tags", found.data.tags)):
        values = {key: str(value) for line in lines if line["kind"] == kind for key, value in line["values"].items()}
        assert values
        assert there.items() >= values.items()
    artifacts = {line["under"] or Path(line["path"]).name for line in lines if line["kind"] == "artifact"}
    assert {artifact.path for artifact in client.list_artifacts(found.info.run_id)} == artifacts
    return found


def assert_sent(run: Run, uri: str, status: str = "FINISHED", **variables: str) -> Any:
    synced = run.sync(**variables)
    assert synced.codes == [0], synced.output
    assert f"has all {len(run.lines())} of" in synced.output
    return assert_same(run, uri, status)


def test_a_healthy_server_and_another_store(proxy: Proxy, server: Server, tmp_path: Path) -> None:
    run = Run(tmp_path, proxy.uri, tracking={"register_as": "manuals", "parent": "0123456789abcdef"})
    output = run.do(30)
    assert "warning" not in output
    found = assert_same(run, server.uri)
    assert found.data.params["adapter.r"] == "4"
    assert found.data.tags["attempt.1.world_size"] == "1"
    assert found.data.tags["mlflow.parentRunId"] == "0123456789abcdef"
    assert found.info.start_time == run.lines()[0]["time"]
    (version,) = mlflow.MlflowClient(server.uri).search_model_versions("name = 'manuals'")
    assert version.run_id == found.info.run_id
    other = f"sqlite:///{tmp_path}/other/mlflow.db"
    for _ in range(2):
        synced = run.sync("--uri", other)
        assert synced.codes == [0], synced.output
        assert_same(run, other)
    (run.folder / "sync.json").unlink()  # all is sent again
    assert_sent(run, server.uri)


def test_killed_in_the_middle_and_back_later(server: Server, tmp_path: Path) -> None:
    run = Run(tmp_path, server.uri)
    process = run.launch(80)
    run.wait_for(40, process)
    assert run.runs(server.uri)  # it was sent at once
    server.kill()
    output = run.wait(process)
    assert "lines are not sent" in output
    server.start()
    assert_sent(run, server.uri)


@pytest.fixture(scope="module")
def outages(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Run, str]]]:
    """Runs side by side whose servers fail from the start or the middle to the end, with their outputs, by the fault.

    The delay is 2 s for a patience of 4 s, in the place of 30 s for the usual 60 s.
    """
    (down,) = free_ports(1)
    folders = {fault: tmp_path_factory.mktemp(fault) for fault in ("down", "error", "hang", "delay")}
    proxies = {fault: Proxy(server.port) for fault in folders if fault != "down"}
    runs = {
        fault: Run(folder, proxies[fault].uri if fault in proxies else f"http://127.0.0.1:{down}")
        for fault, folder in folders.items()
    }
    processes = {fault: run.launch(100, MLFLOW_HTTP_REQUEST_TIMEOUT="4") for fault, run in runs.items()}
    for fault, proxy in proxies.items():
        runs[fault].wait_for(60, processes[fault])
        proxy.mode, proxy.delay = fault, 2.0
    outputs = {fault: runs[fault].wait(processes[fault]) for fault in runs}
    for proxy in proxies.values():
        proxy.mode = "pass"
    yield {fault: (run, outputs[fault]) for fault, run in runs.items()}
    for proxy in proxies.values():
        proxy.close()


def test_a_server_that_never_comes_back(outages: dict[str, tuple[Run, str]]) -> None:
    run, output = outages["down"]
    assert output.count("cannot be reached; the run goes on") == 1
    synced = run.sync()
    assert synced.codes == [2]
    assert synced.output.count("error: ") == 1
    assert f"has not taken {len(run.lines())} of {len(run.lines())} lines" in synced.output
    assert "Traceback" not in synced.output


@pytest.mark.parametrize("fault", ["down", "error", "hang", "delay"])
def test_what_an_outage_held_back_is_sent_later(
    fault: str, outages: dict[str, tuple[Run, str]], server: Server
) -> None:
    run, output = outages[fault]
    assert f"lines are not sent to {run.uri} yet; `mica-ds sync {run.folder}` sends them" in output
    back = Proxy(server.port, int(run.uri.rpartition(":")[2])) if fault == "down" else None
    assert_sent(run, server.uri)
    if back:
        back.close()


def test_errors_that_pass_need_no_sync(proxy: Proxy, server: Server, tmp_path: Path) -> None:
    run = Run(tmp_path, proxy.uri)
    proxy.mode = "error"
    process = run.launch(200)
    wait_until(lambda: bool(proxy.requests), tmp_path)
    proxy.mode = "pass"
    wait_until(lambda: bool(run.runs(server.uri)), tmp_path)
    assert process.poll() is None
    run.wait(process)
    assert_same(run, server.uri)


@pytest.mark.parametrize(("mode", "made"), [("swallow", 1), ("late", 2)])
def test_a_creation_that_timed_out_leaves_one_run(
    mode: str, made: int, proxy: Proxy, server: Server, tmp_path: Path
) -> None:
    proxy.mode, proxy.on, proxy.delay = mode, "runs/create", 7.0
    run = Run(tmp_path, proxy.uri)
    process = run.launch(300, MLFLOW_HTTP_REQUEST_TIMEOUT="1")
    wait_until(lambda: any("runs/create" in path for path in proxy.requests), tmp_path)
    proxy.on = "nowhere"  # the next attempt succeeds
    wait_until(lambda: len(run.runs(server.uri)) == made, tmp_path)
    assert process.poll() is None
    run.wait(process)
    assert_same(run, server.uri)


def test_the_servers_disk_is_full(disk: Path, server: Server, tmp_path: Path) -> None:
    if not disk.is_mount():
        pytest.skip("only root may mount the small disk that this fills")
    run = Run(tmp_path, server.uri)
    ballast = fill(disk)
    try:
        output = run.do(30)
    finally:
        ballast.unlink()
    assert "lines are not sent" in output
    assert_sent(run, server.uri)


@pytest.mark.parametrize("stays", [False, True])
def test_the_journals_disk_is_full(stays: bool, server: Server, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        run = Run(tmp_path, server.uri)
        process = run.launch(200, f"output_dir={disk}/run")
        run.folder = disk / "run"
        run.wait_for(20, process)
        ballast = fill(disk)
        run.wait_for(180, process)
        assert len(run.lines()) < 100
        if stays:
            output = run.wait(process)
            assert "lines could not be written to the journal, and are lost" in output
            ballast.unlink()
            assert_sent(run, server.uri, "KILLED")
        else:
            ballast.unlink()
            output = run.wait(process)
            assert [line["step"] for line in run.lines() if line["kind"] == "metrics"] == list(range(200))
            assert_same(run, server.uri)


def test_kill_9_and_what_comes_after(server: Server, tmp_path: Path) -> None:
    run = Run(tmp_path, server.uri)
    process = run.launch(1000)
    run.wait_for(30, process)
    process.kill()
    killed = finish([process])  # its sender goes on for a moment
    assert killed.codes == [-signal.SIGKILL]
    found = assert_same(run, server.uri, "KILLED")
    with (run.folder / "journal.jsonl").open("a") as file:
        file.write('{"kind": "metrics", "time": 17')  # a write that the kill has cut
    run.do(30, "train.learning_rate=0.5")
    again = assert_same(run, server.uri)
    assert again.info.run_id == found.info.run_id
    assert again.data.params["train.learning_rate"] == found.data.params["train.learning_rate"] == "0.01"
    assert again.data.tags["attempt.2.train.learning_rate"] == "0.5"
    assert again.data.tags["attempt.2.world_size"] == "1"
    run.do(10, "resume=never")
    assert {r.info.status for r in run.runs(server.uri)} == {"FINISHED"}
    assert len(run.runs(server.uri)) == 2


@pytest.mark.dist
def test_a_training_that_is_killed_and_goes_on_with_one_rank(
    proxy: Proxy, server: Server, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    run = Run(tmp_path, proxy.uri)
    train = {"per_device_train_batch_size": 2, "max_steps": 30, "save_steps": 5, "learning_rate": 1e-2}
    write_config(tmp_path, tiny_model("llama"), train=train, tracking={"uri": proxy.uri, "experiment": run.experiment})
    proxy.mode = "error"
    ranks = launch_ranks(2, ["train", str(run.config)])
    wait_until(lambda: (run.folder / "checkpoints/step-000005").exists(), tmp_path, 120)
    for rank in ranks:
        rank.kill()
    finish(ranks)
    assert run.runs(server.uri) == []
    proxy.mode = "pass"
    resumed = start_ranks(1, ["train", str(run.config), "train.learning_rate=1e-3"])
    assert resumed.codes == [0], resumed.output
    assert "lines are not sent" not in resumed.output
    found = assert_same(run, server.uri)
    assert found.data.params["train.learning_rate"] == "0.01"
    tags = {"attempt.1.world_size": "2", "attempt.2.world_size": "1", "attempt.2.train.learning_rate": "0.001"}
    assert found.data.tags.items() >= tags.items()
    steps = {line["step"] for line in run.lines() if "loss" in line.get("values", {})}
    assert steps == set(range(1, 31))


def test_a_sender_that_was_killed_too(server: Server, tmp_path: Path) -> None:
    run = Run(tmp_path, server.uri)
    process = run.launch(1000)
    run.wait_for(30, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in map(int, children):
        os.kill(child, signal.SIGKILL)
    refused = subprocess.run(
        [sys.executable, "-m", "tests.tracked", str(run.config), "1", "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert "belongs to a run that still goes on" in refused.stderr
    assert run.sync().codes == [0]
    assert {found.info.status for found in run.runs(server.uri)} == {"RUNNING"}
    process.kill()
    finish([process])
    assert_sent(run, server.uri, "KILLED")


def test_one_sender_at_a_time(proxy: Proxy, server: Server, tmp_path: Path) -> None:
    run = Run(tmp_path, proxy.uri)
    process = run.launch(40)
    run.wait_for(30, process)
    refused = run.sync()
    assert refused.codes == [2]
    assert "is being sent by another process" in refused.output
    run.wait(process)
    assert_same(run, server.uri)


@pytest.mark.parametrize("kind", ["Basic", "Bearer"])
def test_secrets_stay_in_the_environment(kind: str, proxy: Proxy, server: Server, tmp_path: Path) -> None:
    secret = "Torvane1907"
    if kind == "Basic":
        variables = {"MLFLOW_TRACKING_USERNAME": "edda", "MLFLOW_TRACKING_PASSWORD": secret}
        proxy.authorization = f"Basic {base64.b64encode(f'edda:{secret}'.encode()).decode()}"
    else:
        variables = {"MLFLOW_TRACKING_TOKEN": secret}
        proxy.authorization = f"Bearer {secret}"
    run = Run(tmp_path, proxy.uri)
    output = run.do(10, **variables)
    assert_same(run, server.uri)
    (run.folder / "sync.json").unlink()
    proxy.authorization = "another"
    refused = run.sync(**variables)
    assert refused.codes == [2]
    assert "401" in refused.output
    kept = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(secret in text for text in [output, refused.output, *kept])


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://edda:Torvane1907@tracker:5000", "MLFLOW_TRACKING_PASSWORD"),
        ("https://Torvane1907@tracker", "MLFLOW_TRACKING_TOKEN"),
        ("postgresql+psycopg2://edda:Torvane1907@db/mlflow", "~/.pgpass"),
        ("mysql://db/mlflow?password=Torvane1907", "take it out"),
        ("edda:Torvane1907@tracker", "no store that MLflow knows"),
        ("runs/mlflow.db", "runs/mlflow.db is no store that MLflow knows"),
        ("sqlite://", "names no file"),
        ("ftp://tracker", "ftp://tracker is no store that MLflow knows"),
        ("http://[::1", "no valid address"),
    ],
)
def test_a_uri_that_cannot_be_meant_is_refused(uri: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        check_uri(uri)
    assert "Torvane1907" not in str(refused.value)


def test_usual_uris_are_taken(tmp_path: Path) -> None:
    for uri in ("sqlite:///runs/mlflow.db", "http://tracker:5000", "databricks", "postgresql://edda@db/mlflow"):
        check_uri(uri)
    check_folder(f"sqlite:///{tmp_path}/new/folder/mlflow.db")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is no folder"):
        check_folder(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_a_locked_store_is_sent_to_later(tmp_path: Path) -> None:
    run = Run(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        output = run.do(10)
    assert "lines are not sent" in output
    assert_sent(run, run.uri)


def test_a_journal_keeps_what_is_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(name="run")
    for step in range(3):
        journal.write("metrics", step=step, values={"loss": 1.0})
    with pytest.raises(BlockingIOError):
        Journal(tmp_path)
    journal.close()
    file = tmp_path / "journal.jsonl"
    whole = file.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        file.write_bytes(whole[:-cut])
        mended = Journal(tmp_path)
        mended.close()
        assert (mended.run, mended.lines, mended.status) == (journal.run, 3, None)
    assert file.read_bytes() == whole[: whole.rindex(b"\n", 0, -1) + 1]
    with file.open("ab") as damaged:
        damaged.write(b"\0\0\0\n[1]\n")
    again = Journal(tmp_path)
    again.write("metrics", step=3, values={"loss": math.nan})
    again.close()
    lines = list(Reader(tmp_path).read())
    assert [line and line["kind"] for line in lines] == ["run", "metrics", "metrics", None, None, "metrics"]
    times = [line["time"] for line in lines if line]
    assert times == sorted(set(times))
