"""The jobs that the repository ships, on a real SLURM: whatever interrupts them, they end as if nothing had."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from mica_ds.journal import Reader

from ..conftest import LAUNCH_LIMIT, ROOT, environment, start, start_ranks, write_config
from ..slurm import Cluster, wait_until

pytestmark = [pytest.mark.dist, pytest.mark.slurm]

STEPS = 40
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# A site without GPUs.
FACTS = "CPU_JOB=(--nodes=2 --ntasks-per-node=1)\nCONTAINER=()\n"


class Site:
    """A cluster, the folder of one test's runs, and what the jobs of the test leave in the repository."""

    def __init__(self, slurm: Cluster, folder: Path, model: Path) -> None:
        self.slurm, self.folder, self.jobs = slurm, folder, list[str]()
        # Steps take long enough for all to happen before the last.
        train = {"per_device_train_batch_size": 2, "max_steps": STEPS, "save_steps": 4, "learning_rate": 1e-2}
        self.config = write_config(folder, model, train=train)
        (folder / "cluster.env").write_text(FACTS)
        self.variables = {"CLUSTER_ENV": str(folder / "cluster.env"), "OMP_NUM_THREADS": "1"}
        self.variables["SBATCH_OUTPUT"] = f"{folder}/job-%j.log"
        self.run = folder / "run"

    def submit(self, *options: str, verb: str = "train", settings: tuple[str, ...] = ()) -> str:
        """Submit a job for a verb on both nodes; returns its number."""
        command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", *options, f"slurm/{verb}.sbatch"]
        job = self.slurm.run(*command, str(self.config), *settings, **self.variables)
        assert job.isdigit(), job
        self.jobs.append(job)
        return job

    def show(self, job: str) -> dict[str, str]:
        shown = self.slurm.run("scontrol", "--oneliner", "show", "job", job)
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Wait until a job is in one of these states, or over; returns all about it."""
        # Not sbatch --wait, which looks ever more rarely (22.05: after 2, 6, 12, 20, 30 seconds).
        wait_until(lambda: self.state(job) in (states or ENDED), self.folder, LAUNCH_LIMIT)
        return self.show(job)

    def wait_for_step(self, step: int) -> None:
        """Wait for the checkpoint of a step."""
        wait_until((self.run / f"checkpoints/step-{step:06d}").exists, self.folder, LAUNCH_LIMIT)

    def newest(self) -> str:
        """The newest checkpoint."""
        return max((found.name for found in self.run.glob("checkpoints/step-*")), default="")

    def wait_for_restart(self, job: str, restarts: int) -> None:
        """Wait until a job trains again after so many restarts."""

        def is_running() -> bool:
            about = self.show(job)
            return (about["JobState"], about["Restarts"]) == ("RUNNING", str(restarts))

        wait_until(is_running, self.folder, LAUNCH_LIMIT)
        newest = self.newest()
        wait_until(lambda: self.newest() > newest, self.folder, LAUNCH_LIMIT)

    def outputs(self) -> dict[str, str]:
        folders = [ROOT / "runs/slurm" / job for job in self.jobs]
        logs = [*self.folder.glob("job-*.log"), *(log for folder in folders for log in folder.glob("*"))]
        return {f"{log.parent.name}/{log.name}": log.read_text(errors="replace") for log in logs}

    def summary(self) -> dict[str, Any]:
        return json.loads((self.run / "summary.json").read_text())

    def tracked(self) -> list[Any]:
        client = mlflow.MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])

    def close(self) -> None:
        for job in self.jobs:
            self.slurm.run("scancel", job)
            shutil.rmtree(ROOT / "runs/slurm" / job, ignore_errors=True)

    def assert_ends_as(self, job: str, loss: float, restarts: int = 1, steps: int = STEPS) -> None:
        """It ends well after so many restarts, with this loss and one MLflow run, of which each start is an attempt."""
        about = self.wait(job)
        assert (about["JobState"], about["Restarts"]) == ("COMPLETED", str(restarts)), self.outputs()
        summary = self.summary()
        assert (summary["world_size"], summary["steps"]) == (2, steps)
        assert summary["final_loss"] == pytest.approx(loss, rel=1e-5)
        (run,) = self.tracked()
        assert run.info.status == "FINISHED"
        attempts = {key.split(".")[1]: value for key, value in run.data.tags.items() if key.endswith("slurm.job_id")}
        assert attempts == {str(attempt): job for attempt in range(1, restarts + 2)}
        assert {run.data.tags[f"attempt.{attempt}.slurm.job_nodelist"] for attempt in attempts} == {"n[1-2]"}


@pytest.fixture(scope="module")
def make_site(slurm: Cluster, tiny_model: Callable[[str], Path]) -> Iterator[Callable[[Path], Site]]:
    if not (ROOT / ".venv").is_dir():
        pytest.skip("run `bash launch/setup.sh` first: the job runs .venv's Python")
    sites: list[Site] = []

    def make(folder: Path) -> Site:
        sites.append(Site(slurm, folder, tiny_model("llama")))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


@pytest.fixture
def site(make_site: Callable[[Path], Site], tmp_path: Path) -> Site:
    return make_site(tmp_path)


@pytest.fixture(scope="module")
def loss(make_site: Callable[[Path], Site], tmp_path_factory: pytest.TempPathFactory) -> float:
    """Of a run that nothing interrupts."""
    site = make_site(tmp_path_factory.mktemp("undisturbed"))
    finished = start_ranks(2, ["train", str(site.config)], OMP_NUM_THREADS="1")
    assert finished.codes == [0, 0], finished.output
    return site.summary()["final_loss"]


def test_a_pipeline_with_an_interrupted_training(site: Site, loss: float) -> None:
    options = ["--nodes=2", "--ntasks-per-node=1", "--format=merged"]
    command = ["bash", "slurm/pipeline.sh", *options, str(site.config)]
    lines = [line.split(": job ") for line in site.slurm.run(*command, **site.variables).splitlines()]
    assert [verb for verb, _ in lines] == ["basis", "train", "evaluate", "export"], lines
    site.jobs += [job for _, job in lines]
    site.wait_for_step(8)
    site.slurm.run("scancel", "--signal=USR1", site.jobs[1])  # as --signal does: to the ranks, not to the script
    site.assert_ends_as(site.jobs[1], loss)
    assert [site.wait(job)["JobState"] for job in site.jobs] == ["COMPLETED"] * 4, site.outputs()
    assert "14 matrices, r = 4, 14 solved" in (log := "".join(site.outputs().values()))
    assert "14 matrices, r = 4, all from the cache" in log
    assert json.loads((site.run / "evaluation.json").read_text())["checkpoint"] == f"step-{STEPS:06d}"
    assert json.loads((site.run / "merged/merge.json").read_text())["checkpoint"].endswith(f"step-{STEPS:06d}")


def test_a_job_that_is_requeued_preempted_and_loses_a_node(site: Site, loss: float) -> None:
    slurm, job = site.slurm, site.submit()
    site.wait_for_step(4)
    slurm.run("scontrol", "requeue", job)
    site.wait_for_restart(job, 1)
    options = ["--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 2"]
    urgent = slurm.run("sbatch", "--parsable", *options)
    assert site.wait(urgent)["JobState"] == "COMPLETED"
    site.wait_for_restart(job, 2)
    slurm.lose_node("n2")
    site.wait(job, "PENDING")
    slurm.start_node("n2")
    site.assert_ends_as(job, loss, restarts=3)


def test_the_doctor_as_a_job(site: Site) -> None:
    # As some sites ask for: no more of this environment than the job needs.
    job = site.submit(f"--export={','.join(site.variables)},HF_HUB_OFFLINE", verb="doctor")
    found = site.wait(job)
    outputs = site.outputs()
    assert found["JobState"] == "COMPLETED", outputs
    assert "".join(outputs.values()).count(" good ") == 12, outputs
    host = socket.gethostname().split(".")[0]  # both nodes'
    assert outputs.keys() == {f"{site.folder.name}/job-{job}.log", f"{job}/0-{host}.log", f"{job}/1-{host}.log"}


@pytest.mark.exclusive  # SLURM gives a job 10 s after the signal
def test_a_cancelled_job(site: Site) -> None:
    job = site.submit()
    site.wait_for_step(4)
    site.slurm.run("scancel", job)
    wait_until(lambda: [run.info.status for run in site.tracked()] == ["KILLED"], site.folder)
    about = site.wait(job)
    assert (about["JobState"], about["Restarts"]) == ("CANCELLED", "0"), site.outputs()


def test_a_refused_pipeline(site: Site) -> None:
    command = ["bash", "slurm/pipeline.sh", "--nodes=2", "--partition=none", str(site.config)]
    output = site.slurm.run(*command, **site.variables)
    assert output.count("error: sbatch refused the job for train") == 1, output
    site.jobs.append(output.split("basis: job ")[1].split()[0])
    assert site.wait(site.jobs[0])["JobState"] == "CANCELLED"


def test_an_array_that_would_share_a_folder(site: Site) -> None:
    job = site.submit("--array=0", settings=("train.seed=%a",))
    assert site.wait(job)["JobState"] == "FAILED"
    (output,) = site.outputs().values()
    assert output.startswith("error: the jobs of an array would share a run folder")
    assert not site.run.exists()


@pytest.mark.slow
def test_a_job_that_loses_the_node_of_its_script(site: Site, loss: float) -> None:
    """SLURM itself requeues it, and perhaps once more, should it start before the node is up again."""
    job = site.submit()
    site.wait_for_step(4)
    site.slurm.lose_node("n1")
    site.wait(job, "PENDING")
    site.slurm.start_node("n1")
    assert site.wait(job)["JobState"] == "COMPLETED", site.outputs()
    assert site.summary()["final_loss"] == pytest.approx(loss, rel=1e-5)
    (run,) = site.tracked()
    assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_a_study_whose_runs_are_jobs(site: Site) -> None:
    """Told to end, it cancels them; started again, it goes on where they were."""
    folder, file = site.folder / "study", site.folder / "study.yaml"
    settings = {
        "base": str(site.config),
        "arms": {"lora": {"adapter.method": "lora"}, "mica": {"adapter.method": "mica"}},
        "learning_rates": [1e-2],
        "pick": 1,
        "seeds": [2],
        "max_forgetting": 1e6,
        "subject": "mica",
        "reference": "lora",
        "parallel": 2,
        "launch": ["bash", "slurm/wait.sh", "--nodes=1", "--ntasks-per-node=1"],
        "output_dir": str(folder),
    }
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "mica_ds", "study", str(file)]
    variables = {**site.slurm.variables, **site.variables}

    def jobs() -> list[str]:
        return [log.read_text().split()[1].rstrip(";") for log in sorted(folder.glob("*/lr-*/seed-*/study.log"))]

    def trained() -> int:
        return len({path.parent for path in folder.glob("*/lr-*/seed-*/checkpoints/step-*")})

    first = subprocess.Popen(command, cwd=ROOT, env=environment(**variables))
    try:
        wait_until(lambda: trained() == 2, site.folder, LAUNCH_LIMIT)  # side by side
    finally:
        first.terminate()
        site.jobs += jobs()
    assert first.wait(60) == os.EX_TEMPFAIL
    assert [site.state(job) for job in jobs()] == ["CANCELLED"] * 2
    second = start(command, **variables)
    site.jobs += jobs()
    assert second.codes == [0], second.output
    assert len((folder / "results.jsonl").read_text().splitlines()) == 4
    starts = [
        [line["kind"] for line in Reader(run.parent).read() if line]
        for run in folder.glob("*/lr-*/seed-*/summary.json")
    ]
    assert sorted(kinds.count("start") for kinds in starts) == [1, 1, 2, 2]


@pytest.mark.slow
def test_a_job_that_meets_its_time_limit(site: Site, make_site: Callable[[Path], Site], tmp_path: Path) -> None:
    # SLURM may send the signal a minute before it is asked to: here between one and two minutes after each start.
    longer, steps = ("train.max_steps=1500",), 1500
    (tmp_path / "undisturbed").mkdir()
    undisturbed = make_site(tmp_path / "undisturbed")
    undisturbed.wait(undisturbed.submit(settings=longer))
    job = site.submit("--time=3", "--signal=USR1@60", settings=longer)
    about = site.wait(job)
    assert int(about["Restarts"]) > 0
    site.assert_ends_as(job, undisturbed.summary()["final_loss"], int(about["Restarts"]), steps)


def test_an_array_of_studies(site: Site, loss: float) -> None:
    command = ["sbatch", "--parsable", "--array=0-1", "--nodes=1", "--ntasks-per-node=1", "--exclusive=user"]
    output = f"output_dir={site.folder}/study-%a"
    array = site.slurm.run(*command, "slurm/train.sbatch", str(site.config), output, "train.seed=%a", **site.variables)
    parts = [f"{array}_{part}" for part in range(2)]
    wait_until(lambda: [site.state(part) for part in parts] == ["RUNNING"] * 2, site.folder)  # side by side
    site.jobs += [site.show(part)["JobId"] for part in parts]
    last = site.folder / "study-1/checkpoints/step-000004"
    wait_until(last.exists, site.folder, LAUNCH_LIMIT)
    site.slurm.run("scancel", "--signal=USR1", parts[1])
    wait_until(lambda: [site.state(part) for part in parts] == ["COMPLETED"] * 2, site.folder, LAUNCH_LIMIT)
    found = [(about["JobState"], about["Restarts"]) for about in map(site.show, parts)]
    assert found == [("COMPLETED", "0"), ("COMPLETED", "1")], site.outputs()
    seeds = [json.loads((site.folder / f"study-{part}/summary.json").read_text()) for part in range(2)]
    assert seeds[0]["final_loss"] != seeds[1]["final_loss"]
