"""`mica-ds` runs alike under every launcher and alone."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from mica_ds.cli import app

from ..conftest import LAUNCH_LIMIT, ROOT, Finished, environment, free_ports, start
from ..remote import hosts, obstacle
from ..slurm import wait_until
from .test_basis import manifest

pytestmark = pytest.mark.dist

LAUNCHERS = {
    "alone": "mica-ds",
    "deepspeed": "deepspeed --no_local_rank --num_accelerators 2 --master_port {port} --module mica_ds",
    "torchrun": "torchrun --nproc-per-node 2 --master-port {port} -m mica_ds",
    # accelerate (1.15.0) starts one process with --cpu, whatever --num_processes says; --multi_gpu needs no GPUs.
    "accelerate": "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    " --dynamo_backend no --main_process_port {port} --module mica_ds",
    "srun": "srun --nodes=2 --ntasks=2 python -m mica_ds",
}
PURPOSES = {"": app.info.help, **{verb.callback.__name__: verb.callback.__doc__ for verb in app.registered_commands}}
Launch = Callable[..., Finished]


def under(*launchers: str) -> pytest.MarkDecorator:
    """One test a launcher; those under srun need SLURM."""
    marks = {"srun": pytest.mark.slurm}
    return pytest.mark.parametrize("launcher", [pytest.param(name, marks=marks.get(name, ())) for name in launchers])


@pytest.fixture
def launch(request: pytest.FixtureRequest) -> Launch:
    """Runs `mica-ds` under a launcher."""

    def run(launcher: str, *arguments: str) -> Finished:
        [port] = free_ports(1)
        variables: dict[str, str] = {}
        if launcher == "srun":
            variables = {"MASTER_ADDR": "n1", "MASTER_PORT": str(port), **request.getfixturevalue("slurm").variables}
        finished = start([*LAUNCHERS[launcher].format(port=port).split(), *arguments], **variables)
        assert not [*Path("/dev/shm").glob(f"*_{port}_*")]  # DeepSpeed's buffers
        return finished

    return run


@under(*LAUNCHERS)
def test_bases_under(launcher: str, launch: Launch, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    finished = launch(launcher, "basis", str(tiny_config()))
    assert finished.codes == [0], finished.output
    assert finished.output.count("14 matrices, r = 4, 14 solved") == 1  # rank 0 alone speaks
    assert manifest(tmp_path / "run")["world_size"] == (1 if launcher == "alone" else 2)


@under("deepspeed", "srun")
def test_failing_ranks_fail_the_launcher(launcher: str, launch: Launch, tiny_config: Callable[..., Path]) -> None:
    finished = launch(launcher, "basis", str(tiny_config()), "adapter.rang=3")
    assert finished.codes != [0]
    assert finished.output.count("unknown key adapter.rang") == 1, finished.output


@pytest.mark.parametrize("verb", PURPOSES)
def test_help_names_the_purpose(verb: str) -> None:
    shown = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert shown.exit_code == 0, shown.output
    assert PURPOSES[verb] in " ".join(shown.output.split())


def test_the_installed_program_has_all_verbs() -> None:
    finished = start(["mica-ds", "--help"])
    assert finished.codes == [0], finished.output
    assert all(f" {verb} " in finished.output for verb in PURPOSES if verb)


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if reason := obstacle():
        pytest.skip(reason)
    with hosts(tmp_path_factory.mktemp("hosts")) as variables:
        yield variables


@pytest.mark.parametrize("script", ["torchrun", "multinode"])
def test_a_script_trains(
    script: str, tiny_config: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not (ROOT / ".venv").is_dir():
        pytest.skip("run `bash launch/setup.sh` first: the scripts run .venv's Python")
    (tmp_path / "hosts").write_text("# two nodes\n\nn1 slots=1\nn2 slots=1\n")
    variables: dict[str, str] = {}
    if script == "multinode":
        variables = {"HOSTFILE": str(tmp_path / "hosts"), **request.getfixturevalue("remote")}
    port = str(free_ports(1)[0])
    finished = start(["bash", f"launch/{script}.sh", str(tiny_config()), "adapter.r=3"], MASTER_PORT=port, **variables)
    assert finished.codes == [0], finished.output
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, 4)
    assert manifest(tmp_path / "run")["r"] == 3  # settings pass through


def test_a_signal_to_the_script_reaches_the_ranks(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    command = ["bash", "launch/train.sh", str(tiny_config(train={"max_steps": 10_000, "save_steps": 5_000}))]
    with log.open("w") as output:
        variables = environment(MASTER_PORT=str(free_ports(1)[0]), NUM_RANKS="2")
        script = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_until(lambda: "{'loss'" in log.read_text(), tmp_path, LAUNCH_LIMIT)
        (inner,) = psutil.Process(script.pid).children()[0].children()
        for rank in inner.children():  # a terminal's interrupt would reach them
            ignored = Path(f"/proc/{rank.pid}/status").read_text().split("SigIgn:")[1].split()[0]
            assert not int(ignored, 16) & 1 << signal.SIGINT - 1
        script.send_signal(signal.SIGUSR1)
        assert script.wait(60) == os.EX_TEMPFAIL, log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
    (saved,) = (run / "checkpoints").iterdir()
    assert f"stopped by a signal: {saved} holds all" in log.read_text()


@pytest.mark.slow
def test_torchrun_trains_on_two_nodes(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """Both are this machine."""
    if not (ROOT / ".venv").is_dir():
        pytest.skip("run `bash launch/setup.sh` first: the scripts run .venv's Python")
    command = ["bash", "launch/torchrun.sh", str(tiny_config())]
    port = str(free_ports(1)[0])
    variables = {"NUM_NODES": "2", "NUM_RANKS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ThreadPoolExecutor() as pool:
        nodes = [pool.submit(start, command, NODE_RANK=str(node), **variables) for node in range(2)]
    assert [node.result().codes for node in nodes] == [[0], [0]], [node.result().output for node in nodes]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, 4)


@pytest.mark.parametrize(
    ("command", "variables", "reason"),
    [
        ("train.sh", {}, "no config; bash launch/train.sh CONFIG [key=value ...]"),
        ("torchrun.sh my.yaml", {"NUM_NODES": "2"}, "NUM_NODES=2 needs NODE_RANK"),
        ("torchrun.sh my.yaml", {"NUM_NODES": "2", "NODE_RANK": "1"}, "NUM_NODES=2 needs NODE_RANK"),
        ("multinode.sh my.yaml", {}, "no HOSTFILE; write a line for each node"),
        ("multinode.sh my.yaml", {"HOSTFILE": "nowhere"}, "HOSTFILE=nowhere is not a file"),
    ],
)
def test_a_script_says_what_it_needs(command: str, variables: dict[str, str], reason: str) -> None:
    if not (ROOT / ".venv").is_dir():
        pytest.skip("run `bash launch/setup.sh` first: the scripts run .venv's Python")
    refused = start(["bash", *f"launch/{command}".split()], **variables)
    assert refused.codes == [2]
    assert refused.output.startswith(f"error: {reason}")
    assert refused.output.count("\n") == 1


def test_a_secret_stands_on_no_nodes_command_line(tmp_path: Path) -> None:
    if not (ROOT / ".venv").is_dir():
        pytest.skip("run `bash launch/setup.sh` first: the scripts run .venv's Python")
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    (tmp_path / "bin").mkdir()
    for name, text in (("ssh", "exit 0"), ("pdsh", f'echo "$*" >{tmp_path}/asked')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}/bin:{environment()['PATH']}", "HOSTFILE": str(tmp_path / "hosts")}
    variables |= {"MLFLOW_TRACKING_USERNAME": "edda", "MLFLOW_TRACKING_PASSWORD": "Torvane1907"}
    finished = start(["bash", "launch/multinode.sh", "my.yaml"], **variables, VERB="doctor")
    assert finished.codes == [0], finished.output
    asked = (tmp_path / "asked").read_text()
    assert asked.endswith(" mica_ds doctor my.yaml\n")
    assert "MLFLOW_TRACKING_USERNAME=edda" in asked  # this much DeepSpeed takes
    assert "warning: MLFLOW_TRACKING_PASSWORD stays here" in finished.output
    assert "Torvane1907" not in asked + finished.output


@pytest.mark.parametrize(
    ("hostfile", "reason"),
    [("n1 slots=1\nn9 slots=1\n", "n9 does not answer"), ("n1\n", "gives no ranks"), ("# n1 slots=1\n", "no node")],
)
def test_a_wrong_hostfile_is_refused(hostfile: str, reason: str, remote: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(hostfile)
    finished = start(["bash", "launch/multinode.sh", "any.yaml"], HOSTFILE=str(tmp_path / "hosts"), **remote)
    assert finished.codes == [2]
    assert reason in finished.output
    assert finished.output.startswith("error: ")
    assert finished.output.count("\n") == 1
