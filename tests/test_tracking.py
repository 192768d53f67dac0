"""Tracking against a real `mlflow server` that breaks down: nothing waits for it, and nothing is lost or kept twice."""

import base64
import errno
import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
from typer.testing import CliRunner

from mica_ds import sender
from mica_ds.cli import app
from mica_ds.config import load_config
from mica_ds.delivery import Delivery
from mica_ds.errors import UserError
from mica_ds.journal import SILENCE, Journal, Reader, mend, refuse_elsewhere
from mica_ds.stores import check_folder, check_uri, without_secrets

from .conftest import ROOT, Finished, environment, finish, free_ports, start, start_ranks, write_config
from .servers import Proxy, Server
from .slurm import wait_until

pytestmark = pytest.mark.exclusive  # after its run a sender has 10 s

MICA_DS = [sys.executable, "-m", "mica_ds"]
STEP = 0.05  # seconds
END_LIMIT = 30  # seconds: 10 for the sender, and what a busy machine adds; a request that hangs takes 60
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
        """The output of a run that ends well and soon, and has waited for no server: it has asked none."""
        finished = finish([process])
        assert finished.codes == [0], finished.output
        (found,) = [json.loads(line) for line in finished.output.splitlines() if line.startswith('{"median"')]
        assert found["id"] == [line["id"] for line in self.lines() if line["kind"] == "run"][-1]
        assert found["connected"] == []
        assert not found["imported"]
        assert found["end"] < END_LIMIT
        return finished.output

    def end(self, process: subprocess.Popen[str]) -> str:
        """The same, after no more steps."""
        (self.config.parent / "enough").touch()
        return self.wait(process)

    def do(self, steps: int, *overrides: str, **variables: str) -> str:
        return self.wait(self.launch(steps, *overrides, **variables))

    def sync(self, *options: str, **variables: str) -> Finished:
        return start([*MICA_DS, "sync", str(self.folder), *options], **variables)

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
    artifacts = {
        Path(line["under"] or Path(line["path"]).name).parts[0] for line in lines if line["kind"] == "artifact"
    }
    assert {artifact.path for artifact in client.list_artifacts(found.info.run_id)} == artifacts
    return found


def assert_sent(run: Run, uri: str, status: str = "FINISHED", **variables: str) -> Any:
    synced = run.sync(**variables)
    assert synced.codes == [0], synced.output
    assert f"has all {len(run.lines())} of" in synced.output
    return assert_same(run, uri, status)


@pytest.fixture
def sync(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`mica-ds sync` in this process, tried once; returns its error, or nothing."""
    monkeypatch.setattr(sender, "_prepare", lambda: None)
    monkeypatch.setattr(sender, "_SYNC_PAUSES", [0])

    def run(folder: Path, uri: str | None = None) -> str:
        try:
            sender.sync(folder, uri)
        except UserError as error:
            return str(error)
        return ""

    return run


def test_a_healthy_server_and_another_store(
    sync: Callable[..., str], proxy: Proxy, server: Server, tmp_path: Path
) -> None:
    run = Run(tmp_path, proxy.uri, tracking={"register_as": "manuals"})
    output = run.do(30)
    assert "warning" not in output
    found = assert_same(run, server.uri)
    assert found.data.params["adapter.r"] == "4"
    assert found.data.tags["attempt.1.world_size"] == "1"
    assert found.info.start_time == run.lines()[0]["time"]
    (version,) = mlflow.MlflowClient(server.uri).search_model_versions("name = 'manuals'")
    assert version.run_id == found.info.run_id
    other = f"sqlite:///{tmp_path}/other/mlflow.db"
    synced = run.sync("--uri", other)
    assert synced.codes == [0], synced.output
    assert_same(run, other)
    (run.folder / "sync.json").unlink()  # all is sent again
    for uri in (other, server.uri):
        assert sync(run.folder, uri) == ""
        assert_same(run, uri)


def test_killed_in_the_middle_and_back_later(server: Server, tmp_path: Path) -> None:
    run = Run(tmp_path, server.uri)
    process = run.launch(2000)
    wait_until(lambda: bool(run.runs(server.uri)), tmp_path)  # it is sent at once
    server.kill()
    run.wait_for(100, process)
    output = run.end(process)
    assert "lines are not sent" in output
    server.start()
    assert_sent(run, server.uri)


@pytest.fixture(scope="module")
def outages(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Run, str]]]:
    """Runs side by side whose servers fail from the start or the middle to the end, with their outputs, by the fault.

    The delay is 2 s for a patience of 4 s, in the place of 30 s for the usual 60 s, which takes minutes.
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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_latency_of_30_seconds_with_the_usual_patience(
    proxy: Proxy, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for it during the run and at its end; what is left is sent through it."""
    monkeypatch.setattr("tests.conftest.LAUNCH_LIMIT", 1200)  # `sync` makes some twenty requests, of 30 s each
    run = Run(tmp_path, proxy.uri)
    process = run.launch(2000)
    run.wait_for(40, process)
    proxy.mode, proxy.delay = "delay", 30.0
    run.wait_for(1000, process)  # 48 s more
    output = run.end(process)
    assert "lines are not sent" in output
    assert "cannot be reached" not in output
    assert_sent(run, server.uri)


def test_errors_that_pass_need_no_sync(proxy: Proxy, server: Server, tmp_path: Path) -> None:
    run = Run(tmp_path, proxy.uri)
    proxy.mode = "error"
    process = run.launch(2000)
    wait_until(lambda: bool(proxy.requests), tmp_path)
    proxy.mode = "pass"
    wait_until(lambda: bool(run.runs(server.uri)), tmp_path)
    assert process.poll() is None
    run.end(process)
    assert_same(run, server.uri)


@pytest.mark.parametrize(("mode", "made"), [("swallow", 1), ("late", 2)])
def test_a_creation_that_timed_out_leaves_one_run(
    mode: str, made: int, proxy: Proxy, server: Server, tmp_path: Path
) -> None:
    proxy.mode, proxy.on, proxy.delay = mode, "runs/create", 7.0
    run = Run(tmp_path, proxy.uri)
    process = run.launch(2000, MLFLOW_HTTP_REQUEST_TIMEOUT="1")
    wait_until(lambda: any("runs/create" in path for path in proxy.requests), tmp_path)
    proxy.on = "nowhere"  # the next attempt succeeds
    wait_until(lambda: len(run.runs(server.uri)) == made, tmp_path)
    assert process.poll() is None
    run.end(process)
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


def test_the_journals_disk_is_full(server: Server, tmp_path: Path) -> None:
    """For a while, and then to the end and beyond."""
    with small_disk(tmp_path / "disk", "128k") as disk:
        run = Run(tmp_path, server.uri)
        process = run.launch(2000, f"output_dir={disk}/run")
        run.folder = disk / "run"
        run.wait_for(5, process)
        ballast = fill(disk)
        run.wait_for(80, process)
        assert len(run.lines()) < 80
        ballast.unlink()
        run.wait_for(82, process)
        assert len(run.lines()) > 80
        ballast = fill(disk)
        run.wait_for(220, process)
        output = run.end(process)
        assert f"lines found no room in {run.folder}: {server.uri} has them, and no other store will" in output
        assert "not sent" not in output
        written = [line["step"] for line in run.lines() if line["kind"] == "metrics"]
        assert written == list(range(len(written)))
        assert 82 < len(written) < 220
        ballast.unlink()
        for _ in range(2):
            (found,) = run.runs(server.uri)
            assert found.info.status == "FINISHED"
            history = mlflow.MlflowClient(server.uri).get_metric_history(found.info.run_id, "learning_rate")
            assert sorted(metric.step for metric in history) == list(range(len(history)))
            assert len(history) > 220
            synced = run.sync()
            assert synced.codes == [0], synced.output


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


def launch_on_hosts(arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Start two ranks, each alone on a machine by its name."""
    if os.geteuid() != 0:
        pytest.skip("only root may give a process another host name")
    (port,) = free_ports(1)
    group = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            ["unshare", "--uts", "sh", "-c", f'hostname n{rank + 1}; exec "$@"', "sh", *MICA_DS, *arguments],
            cwd=ROOT,
            env=environment(**group, RANK=str(rank)),
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.dist
def test_a_training_that_is_killed_and_goes_on_with_one_rank(
    proxy: Proxy, server: Server, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    run = Run(tmp_path, proxy.uri)
    train = {"per_device_train_batch_size": 2, "max_steps": 30, "save_steps": 5, "learning_rate": 1e-2}
    write_config(tmp_path, tiny_model("llama"), train=train, tracking={"uri": proxy.uri, "experiment": run.experiment})
    proxy.mode = "error"
    ranks = launch_on_hosts(["train", str(run.config)])
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
    tags["attempt.1.hosts"] = "n1, n2"
    assert found.data.tags.items() >= tags.items()
    steps = {line["step"] for line in run.lines() if "loss" in line.get("values", {})}
    assert steps == set(range(1, 31))
    loads = [line["values"] for line in run.lines() if "system/n1/cpu_utilization_percentage" in line.get("values", {})]
    assert len(loads) >= 5
    assert all(load["system/n2/system_memory_usage_megabytes"] > 0 for load in loads)


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


SECRET = "Torvane1907Brunholt"
IN_HTTP = base64.b64encode(f"edda:{SECRET}".encode()).decode()


def assert_kept(run: Run, *outputs: str) -> None:
    """The secret stands in no output, and in no file of the run."""
    kept = [file.read_text() for file in run.config.parent.rglob("*") if file.is_file()]
    assert not any(secret in text for text in [*outputs, *kept] for secret in (SECRET, IN_HTTP))


def test_basic_authentication(
    sync: Callable[..., str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(tmp_path_factory.mktemp("users"), "edda", SECRET)
    try:
        run = Run(tmp_path, server.uri)
        write_journal(run.folder, run.experiment, server.uri, "FINISHED")
        said = sync(run.folder)
        assert "has not taken 7 of 7 lines (" in said
        assert "You are not authenticated" in said
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "edda")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", f"{SECRET}?")
        refused = sync(run.folder)
        assert "You are not authenticated" in refused
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        assert sync(run.folder) == ""
        (found,) = run.runs(server.uri)
        assert (found.info.status, found.data.metrics, found.data.params) == (
            "FINISHED",
            {"loss": 1},
            {"adapter.r": "4"},
        )
        assert_kept(run, refused)
    finally:
        server.kill()


def test_a_bearer_token_and_a_server_that_repeats_it(
    sync: Callable[..., str], proxy: Proxy, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.authorization = f"Bearer {SECRET}"
    run = Run(tmp_path, proxy.uri)
    output = run.do(10, MLFLOW_TRACKING_TOKEN=SECRET)
    assert_same(run, server.uri)
    (run.folder / "sync.json").unlink()
    proxy.authorization = "another"
    refused = run.sync(MLFLOW_TRACKING_TOKEN=SECRET)
    assert refused.codes == [2]
    assert refused.output.count("error: ") == 1
    assert "who is Bearer …?" in refused.output
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", f"{SECRET}\n{SECRET}")  # requests repeats what no header may hold
    malformed = sync(run.folder)
    assert "header" in malformed
    assert_kept(run, output, refused.output, malformed)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("no http://edda:Torvane1907Brunholt@tracker/x", "no http://tracker/x"),
        (f"Authorization: Basic {IN_HTTP}", "Authorization: Basic …"),
        ("b'Torvane1907Brunholt\\nline'", "b'…'"),
        ("key is key-0815", "key is …"),
        ("false is no secret, nor is port 5000", "false is no secret, nor is port 5000"),
    ],
)
def test_what_others_say_is_shown_without_secrets(said: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"TRACKING_USERNAME": "edda", "TRACKING_PASSWORD": SECRET, "TRACKING_TOKEN": f"{SECRET}\nline"}
    for key, value in variables.items():
        monkeypatch.setenv(f"MLFLOW_{key}", value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key-0815")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert without_secrets(said) == shown


def test_nor_with_those_of_the_file_that_mlflow_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    said = f"{SECRET} is wrong: Authorization: Basic {IN_HTTP}"
    assert without_secrets(said) == said
    (tmp_path / ".mlflow").mkdir()
    file = tmp_path / ".mlflow/credentials"
    file.write_text(f"[mlflow]\nmlflow_tracking_username = edda\nmlflow_tracking_password = {SECRET}\n")
    assert without_secrets(said) == "… is wrong: Authorization: Basic …"
    file.write_text("no sections\n")
    assert without_secrets(said) == said


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=http://edda:Torvane1907@tracker",
        "tracking=http://edda:Torvane1907@tracker",
        "tracking.uri.password=Torvane1907",
        "tracking.password=Torvane1907",
        'tracking.uri=["http://Torvane1907@tracker"',
        "data.corpus=[https://edda:Torvane1907@files/manuals]",
        "model.path=https://Torvane1907@hub/model",
        "evaluate.questions=s3://bucket/questions.jsonl?token=Torvane1907",
        "train.hub_token=Torvane1907",
        "train.run_name=https://edda:Torvane1907@[tracker",
        "train.run_name=env MLFLOW_TRACKING_TOKEN=Torvane1907",
    ],
)
def test_a_config_with_a_secret_is_refused_without_it(override: str, tmp_path: Path) -> None:
    file = write_config(tmp_path, Path("none"))
    with pytest.raises(UserError) as refused:
        load_config(file, [override])
    assert "Torvane1907" not in str(refused.value)
    assert override.partition("=")[0].split(".")[0] in str(refused.value)


def test_a_secret_in_a_damaged_file_is_not_repeated(tmp_path: Path) -> None:
    file = write_config(tmp_path, Path("none"), deepspeed=str(tmp_path / "deepspeed.json"))
    settings = {"zero_optimization": {"stage": 3}, "comet": {"api_key": SECRET}}
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"comet\.api_key") as refused:
        load_config(file)
    assert SECRET not in str(refused.value)
    file.write_text(f'tracking: {{uri: "http://edda:{SECRET}@tracker}}\n')
    with pytest.raises(UserError, match="not valid YAML: found unexpected end of stream, line 2, column 1") as refused:
        load_config(file)
    assert SECRET not in str(refused.value)


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
        ("sqlite:///what?/mlflow.db", "holds a question mark"),
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


def test_stores_that_cannot_be_written_are_sent_to_later(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One is locked; another has become read-only when its run is started again."""
    locked = Run(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as database, ExitStack() as stack:
        database.execute("BEGIN EXCLUSIVE")
        processes = {locked: locked.launch(10)}
        disk = stack.enter_context(small_disk(tmp_path / "disk", "20m"))
        os.system(f"mount -o remount,ro {disk}")
        fixed = Run(tmp_path_factory.mktemp("fixed"), f"sqlite:///{disk}/mlflow.db")
        with pytest.raises(UserError, match=f"the folder {disk} cannot be written"):
            check_folder(fixed.uri)  # as at the first start of a run
        write_journal(fixed.folder, fixed.experiment, fixed.uri, "FINISHED")
        processes[fixed] = fixed.launch(10)
        outputs = {run: run.wait(process) for run, process in processes.items()}
        assert all("lines are not sent" in output for output in outputs.values())
        assert f"warning: tracking.uri: the folder {disk} cannot be written" in outputs[fixed]
        database.rollback()
        os.system(f"mount -o remount,rw {disk}")
        with ThreadPoolExecutor() as pool:
            for synced in pool.map(Run.sync, outputs):
                assert synced.codes == [0], synced.output
        for run in outputs:
            assert_same(run, run.uri)


def test_what_cannot_be_sent_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/journal.jsonl").touch()
    write_journal(tmp_path / "headless", "refused", "sqlite:///none", "FINISHED")
    headless = tmp_path / "headless/journal.jsonl"
    headless.write_bytes(b"\0" + headless.read_bytes())
    write_journal(tmp_path / "run", "refused", "sqlite:///none", "FINISHED")
    for arguments, said in (
        ([tmp_path / "nowhere"], "nowhere/journal.jsonl cannot be read: No such file or directory"),
        ([tmp_path / "empty"], "empty: the journal holds no run"),
        ([tmp_path / "headless"], "headless: the journal holds no run, or its first line is damaged"),
        ([tmp_path / "run", "--uri", "http://edda:Torvane1907@tracker"], "holds a secret"),
        ([tmp_path / "run", "--uri", "tracker"], "tracker is no store that MLflow knows"),
    ):
        refused = CliRunner().invoke(app, ["sync", *map(str, arguments)])
        assert refused.exit_code == 2
        assert refused.output.startswith("error: ")
        assert said in refused.output
        assert refused.output.count("\n") == 1
        assert "Torvane1907" not in refused.output


def test_runs_that_end_together_share_a_new_store(tmp_path: Path) -> None:
    """One is killed while it makes it."""
    store, runs = f"sqlite:///{tmp_path}/new/mlflow.db", list[Run]()
    for number in range(3):
        (folder := tmp_path / str(number)).mkdir()
        runs.append(Run(folder, store))
        write_journal(runs[-1].folder, runs[-1].experiment, store, "FINISHED")
    killed = subprocess.Popen([sys.executable, "-m", "mica_ds", "sync", runs[0].folder], env=environment())
    wait_until(lambda: any((tmp_path / "new").glob("mlflow.db.*.partial")), 60)
    killed.kill()
    killed.wait()
    with ThreadPoolExecutor() as pool:
        for synced in pool.map(Run.sync, runs):
            assert synced.codes == [0], synced.output
    assert [len(run.runs(store)) for run in runs] == [1, 1, 1]
    assert not list((tmp_path / "new").glob("*.partial"))


def write_journal(
    folder: Path, experiment: str, uri: str, status: str | None = None, parent: str | None = None
) -> Journal:
    """A run folder with a short run; with no status it goes on, until the journal is closed."""
    folder.mkdir(exist_ok=True)
    journal = Journal(folder)
    journal.begin(name=folder.name, experiment=experiment, parent=parent)
    journal.write("params", values={"adapter.r": 4})
    journal.start(uri)
    for step in range(3):
        journal.write("metrics", step=step, values={"loss": 1.0})
    if status:
        journal.end(status)
        journal.close()
    return journal


def test_a_journal_keeps_what_is_whole_wherever_it_is_cut(tmp_path: Path) -> None:
    journal = write_journal(tmp_path, "cut", "sqlite:///none")
    with pytest.raises(BlockingIOError):
        Journal(tmp_path)
    journal.end("FAILED")
    journal.close()
    file = tmp_path / "journal.jsonl"
    whole, lines = file.read_bytes(), list(Reader(tmp_path).read())
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        mended = Journal(tmp_path)
        kept = whole[:cut].count(b"\n")
        assert mended.lines == kept
        assert mended.status == (None if 0 < kept < len(lines) else "FAILED" if kept else "none yet")
        mended.write("metrics", step=9, values={"loss": math.nan})
        mended.close()
        found = list(Reader(tmp_path).read())
        assert found[:-1] == lines[:kept]
        assert (found[-1] or {})["step"] == 9
        times = [line["time"] for line in found if line]
        assert times == sorted(set(times))
    with file.open("ab") as damaged:
        damaged.write(b"\0\0\0\n[1]\n")
    again = Journal(tmp_path)
    again.write("end", status="KILLED")
    again.close()
    assert [line and line["kind"] for line in Reader(tmp_path).read()][-4:] == ["metrics", None, None, "end"]
    assert [file.name for file in tmp_path.iterdir()] == ["journal.jsonl"]


def losses(run: Run, uri: str) -> list[int]:
    """The steps whose losses the store has, in order."""
    (found,) = run.runs(uri)
    return sorted(metric.step for metric in mlflow.MlflowClient(uri).get_metric_history(found.info.run_id, "loss"))


def test_what_takes_the_place_of_lines_that_were_sent(sync: Callable[..., str], server: Server, tmp_path: Path) -> None:
    """As when a file system is repaired, or an old copy put back: the store gets the new lines, and keeps the old."""
    run = Run(tmp_path, server.uri)
    write_journal(run.folder, run.experiment, server.uri, "FINISHED")
    assert sync(run.folder) == ""
    file = run.folder / "journal.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-3]) + b"\0\0\n")
    journal = Journal(run.folder)
    for step in range(7, 10):
        journal.write("metrics", step=step, values={"loss": 1.0})
    journal.close()
    said = sender.sync(run.folder, None)
    assert said.endswith(f"has all 9 of {run.folder}, but for 1 that are damaged")
    assert losses(run, server.uri) == [0, 1, 2, 7, 8, 9]
    assert {found.info.status for found in run.runs(server.uri)} == {"KILLED"}


def test_an_artifact_that_is_not_taken_holds_up_no_number(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    run = Run(tmp_path, server.uri)
    journal, said = write_journal(run.folder, run.experiment, server.uri), list[str]()
    journal.write("tags", values={"made": "here"})
    journal.write("artifact", path=str(tmp_path / "nowhere"), under=None)
    journal.write("artifact", path=str(run.config), under=None)
    delivery = Delivery(run.folder, server.uri, said.append)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_artifact", refuse)  # by the store, not by the file
        for step in (3, 4):
            journal.write("metrics", step=step, values={"loss": 1.0})
            with pytest.raises(PermissionError):
                delivery.send()
            assert losses(run, server.uri) == list(range(step + 1))
    journal.end("FINISHED")
    journal.close()
    delivery.finish()
    assert said == [f"{tmp_path}/nowhere is not sent: {tmp_path}/nowhere cannot be read"]
    (found,) = run.runs(server.uri)
    assert found.info.status == "FINISHED"
    artifacts = mlflow.MlflowClient(server.uri).list_artifacts(found.info.run_id)
    assert [artifact.path for artifact in artifacts] == [run.config.name]


def test_a_run_on_another_machine_is_left_alone(tmp_path: Path) -> None:
    journal = write_journal(tmp_path, "elsewhere", f"sqlite:///{tmp_path}/none.db")
    refuse_elsewhere(tmp_path)  # here its lock says that it goes on
    mend(tmp_path)
    assert journal.status is None
    journal.close()
    file = tmp_path / "journal.jsonl"
    there = file.read_text().replace(Path("/proc/sys/kernel/random/boot_id").read_text().strip(), "another")
    file.write_text(there.replace(socket.gethostname(), "n7"))  # a machine whose locks are not seen here
    with pytest.raises(UserError, match=r"was alive on n7 \d+ s ago.*try again in \d+ s"):
        sender.sync(tmp_path, None)
    assert file.read_text().count("\n") == 6
    silent_since = time.time() - SILENCE - 1
    os.utime(file, (silent_since, silent_since))
    refuse_elsewhere(tmp_path)
    mend(tmp_path)
    assert '"status": "KILLED"' in file.read_text()
    refuse_elsewhere(tmp_path)


def test_a_sender_shows_that_its_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_journal(tmp_path, "life", "sqlite:///none", "FINISHED")
    monkeypatch.setattr(sender, "SILENCE", 0.1)
    os.utime(tmp_path / "journal.jsonl", (0, 0))
    is_over = threading.Event()
    showing = threading.Thread(target=sender._show_life, args=[is_over, tmp_path])
    showing.start()
    wait_until(lambda: Reader(tmp_path).age() < 60, tmp_path)
    is_over.set()
    showing.join()


def test_children_show_under_their_parent_whichever_is_sent_first(server: Server, tmp_path: Path) -> None:
    parent = write_journal(tmp_path / "study", tmp_path.name, server.uri, "FINISHED").run
    for name in ("early", "late"):
        write_journal(tmp_path / name, tmp_path.name, server.uri, "FINISHED", parent)
    for name in ("early", "study", "late"):
        Delivery(tmp_path / name, server.uri, print).finish()
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(tmp_path.name)
    assert experiment
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.data.tags.get("mlflow.parentRunId") for name, run in found.items()} == {
        "study": None,
        "early": found["study"].info.run_id,
        "late": found["study"].info.run_id,
    }
