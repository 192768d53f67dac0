"""The main job itself, with fewer steps: launch/train.sh on the demonstration's config and the real model."""

import json
import math
import os
import signal
import socket
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from safetensors.torch import load_file

from mica_ds.settings import flatten

from ..conftest import ROOT, Finished, finish, launch_ranks, start
from ..slurm import wait_until
from .test_basis import assert_bases_match, manifest

pytestmark = [pytest.mark.dist, pytest.mark.exclusive]

STEPS = 12


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("main")
    places = [f"output_dir={folder}/run", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    return [f"train.max_steps={STEPS}", *places, "tracking.register_as=handbook"]


@pytest.fixture(scope="module")
def job(smollm2: Path, overrides: list[str]) -> Finished:
    """Runs once, for all the tests below."""
    return start(["bash", "launch/train.sh", "configs/demonstration.yaml", *overrides], NUM_RANKS="2")


@pytest.fixture(scope="module")
def run(job: Finished, overrides: list[str]) -> Path:
    assert job.codes == [0], job.output
    return Path(overrides[1].removeprefix("output_dir="))


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_every_basis_is_the_minor_subspace_of_the_stock_weight(run: Path, smollm2: Path) -> None:
    assert_bases_match(run, load_file(smollm2 / "model.safetensors"))
    found = manifest(run)
    assert len(found["matrices"]) == 210
    assert {record["owner"] for record in found["matrices"]} == {0, 1}
    seconds = [sum(r["seconds"] for r in found["matrices"] if r["owner"] == owner) for owner in (0, 1)]
    assert max(seconds) < found["seconds"] + 1  # each owner solved its own alone


def test_the_adapter_is_complete_and_b_comes_from_the_cache(run: Path) -> None:
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert sum("lora_A" in name for name in adapter) == sum("lora_B" in name for name in adapter) == 210
    for name, tensor in adapter.items():
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if "lora_B" in name:
            assert tensor.equal(load_file(run / "basis" / f"{module}.safetensors")[module])
        else:
            assert tensor.abs().max() > 0
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == "mica"


def test_a_checkpoint_is_no_larger_than_what_it_must_hold(run: Path) -> None:
    checkpoint = run / "checkpoints" / f"step-{STEPS:06d}"
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["files"].keys() | {"state.json"} == {file.name for file in checkpoint.iterdir()}
    assert state["run"]["basis_fingerprint"] == manifest(run)["fingerprint"]
    cache = ROOT / yaml.safe_load((run / "config.yaml").read_text())["data"]["cache"]
    assert (cache / "scores" / f"{state['run']['before']}.json").is_file()  # what can be scored again is not held
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    factors = load_file(run / "adapter" / "adapter_model.safetensors")
    needed = sum(
        factor.nbytes * (3 if "lora_A" in name else 1) for name, factor in factors.items()
    )  # A, its moments, B
    assert needed < size <= 1.1 * needed


def test_plain_peft_reloads_it_to_the_same_logits(run: Path) -> None:
    reloaded = start([sys.executable, "launch/reload_adapter.py", str(run)])
    assert reloaded.codes == [0], reloaded.output


def test_it_learns_and_forgets_little(summary: dict[str, Any], run: Path) -> None:
    losses = _metric(run, "loss")
    assert len(losses) == STEPS
    assert sum(losses[-3:]) / 3 < 0.9 * sum(losses[:3]) / 3
    assert summary["retention_after"] < 1.3 * summary["retention_before"]
    assert 0.15 < summary["knowledge_before"] < 0.35  # chance is 25 %: the base model cannot know the handbook


def test_the_summary_holds_every_figure(summary: dict[str, Any]) -> None:
    assert summary["trainable_parameters"] / summary["lora_trainable_parameters"] == pytest.approx(0.49, abs=0.01)
    assert summary["world_size"] == len(summary["peak_rss_bytes"]) == len(summary["loading_rss_bytes"]) == 2
    assert summary["steps"] == STEPS
    for key in ("basis_seconds", "train_seconds", "tokens_per_second", "final_loss"):
        assert summary[key] > 0


def test_mlflow_holds_the_run(run: Path, summary: dict[str, Any]) -> None:
    client, found = _mlflow(run)
    assert found.info.status == "FINISHED"
    resolved = flatten(yaml.safe_load((run / "config.yaml").read_text()))
    assert resolved["adapter.r"] == 16
    assert found.data.params == {key: str(value) for key, value in resolved.items()}
    assert found.data.metrics["knowledge_after"] == summary["knowledge_after"]
    assert found.data.metrics["retention_before"] == summary["retention_before"]
    costs = {
        "data_wait_seconds",
        "checkpoint_seconds",
        "basis_seconds",
        "basis_slowest_rank_seconds",
        "host_peak_bytes",
    }
    norms = {f"norm_A/{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")}
    assert found.data.metrics.keys() >= {"learning_rate", "grad_norm", *costs, *norms}
    top = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    files = {"config.yaml", "data.json", "zero3-offload-cpu.json", "environment.txt", "summary.json", "report.html"}
    assert top == files | {"loss.png", "scores.png", "spectrum.png", "basis", "adapter"}
    fingerprint, tags = manifest(run)["fingerprint"], found.data.tags
    assert tags["fingerprint.basis"] == fingerprint != tags["fingerprint.model"]
    assert tags["attempt.1.version.torch"] == version("torch")  # which a build for CUDA reports without its label
    commit = start(["git", "rev-parse", "HEAD"])
    assert tags.get("attempt.1.git.commit") == (commit.output.strip() if commit.codes == [0] else None)
    kept = f"adapter/step-{STEPS:06d}"
    for folder, file in ((kept, "adapter_model.safetensors"), ("basis", "manifest.json")):
        assert f"{folder}/{file}" in {artifact.path for artifact in client.list_artifacts(found.info.run_id, folder)}
    (registered,) = client.search_model_versions("name = 'handbook'")
    assert (registered.run_id, registered.source) == (found.info.run_id, f"{found.info.artifact_uri}/{kept}")


def test_every_step_is_measured_over_all_ranks(run: Path, summary: dict[str, Any]) -> None:
    host = socket.gethostname()
    for key in ("step_seconds", "tokens_per_second", "tflops_per_rank", f"system/{host}/cpu_utilization_percentage"):
        values = _metric(run, key)[:STEPS]
        assert len(values) == STEPS
        assert min(values) > 0
    assert max(_metric(run, "host_peak_bytes")) <= max(summary["peak_rss_bytes"])
    assert set(_metric(run, "host_peak_rank")) <= {0, 1}
    assert _metric(run, "tokens")[STEPS - 1] <= STEPS * 8 * 128
    assert _metric(run, "perplexity") == pytest.approx([math.exp(loss) for loss in _metric(run, "loss")])
    assert _metric(run, "knowledge") == [summary["knowledge_before"], summary["knowledge_after"]]
    checkpoint = run / "checkpoints" / f"step-{STEPS:06d}"
    assert _metric(run, "checkpoint_bytes")[-1] == sum(file.stat().st_size for file in checkpoint.iterdir())
    trained = load_file(checkpoint / "model-00001.safetensors")
    norm = sum(float(tensor.square().sum()) for name, tensor in trained.items() if "q_proj" in name) ** 0.5
    assert _metric(run, "norm_A/q_proj")[-1] == pytest.approx(norm)
    assert _metric(run, "basis_slowest_rank")[0] in (0, 1)


def test_progress_is_shown_by_rank_0_alone(job: Finished, run: Path) -> None:
    for line in (
        "bases: 210 matrices, r = 16, 210 solved",
        "knowledge (accuracy)",
        "mlflow server --backend-store-uri",
    ):
        assert job.output.count(line) == 1
    for bar in ("bases: 210/210 matrices 100%", "evaluation: 100%", f"{STEPS}/{STEPS}"):
        assert bar in job.output


def test_a_signal_ends_it_within_a_minute_with_a_checkpoint(run: Path, overrides: list[str]) -> None:
    """The last test here: it goes on in the same run folder."""
    log = run.parent / "signalled.log"
    more = [f"train.max_steps={10 * STEPS}", *overrides[1:]]
    with log.open("w") as output:
        ranks = launch_ranks(2, ["train", str(ROOT / "configs/demonstration.yaml"), *more], output=output)
    while "{'loss'" not in log.read_text() and all(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)
    stopped = finish(ranks)
    assert stopped.codes == [os.EX_TEMPFAIL] * 2, log.read_text()
    assert stopped.seconds < 60
    newest = max((run / "checkpoints").iterdir())
    assert int(newest.name.removeprefix("step-")) > STEPS
    assert f"{newest} holds all" in log.read_text()
    wait_until(lambda: _mlflow(run)[1].info.status == "KILLED", run.parent, 120)  # the sender goes on by itself


def _mlflow(run: Path) -> tuple[mlflow.MlflowClient, mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("demonstration")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def _metric(run: Path, key: str) -> list[float]:
    client, found = _mlflow(run)
    return [entry.value for entry in client.get_metric_history(found.info.run_id, key)]
