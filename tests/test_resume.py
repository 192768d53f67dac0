"""Which checkpoint of a run folder is meant, and what a run leaves where the disk fails: without a training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mica_ds.cache import write_manifest
from mica_ds.config import Config, load_config
from mica_ds.errors import UserError
from mica_ds.files import file_hash
from mica_ds.record import discard_after, save_probe
from mica_ds.resume import chosen_checkpoint, is_complete, is_own, landmarks, restarted
from mica_ds.scores import MEASURES
from mica_ds.shelf import write_state
from mica_ds.tracking import Tracker


@pytest.fixture
def config(tiny_config: Callable[..., Path]) -> Config:
    """Of a run whose best step is exported."""
    return load_config(tiny_config(), ["checkpoint.export=best", "evaluate.every=2"])


def put(config: Config, step: int, history: list[dict[str, float]]) -> Path:
    """A checkpoint without tensors."""
    checkpoint = config.output_dir / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    log = checkpoint / "trainer_state.json"
    log.write_text(json.dumps({"log_history": history}))
    write_state(checkpoint, {"step": step, "files": {log.name: file_hash(log)}})
    return checkpoint


@pytest.mark.parametrize(("after", "best"), [(None, 2), (0.4, 2), (0.8, 4)])
def test_the_best_step_may_be_the_last_one_scored_after_a_signal(
    after: float | None, best: int, config: Config, alone: None
) -> None:
    """The log of its checkpoint cannot hold what was found of it later; the summary does."""
    history = [{"step": 0, "knowledge": 0.2}, {"step": 2, "knowledge": 0.5}]
    for step in (2, 4):
        put(config, step, history)
    if after is not None:
        scores = dict.fromkeys((f"{measure}_after" for measure in MEASURES), None) | {"knowledge_after": after}
        summary = {"steps": 4, "exported_step": 4 if after > 0.5 else 2, **scores}
        (config.output_dir / "summary.json").write_text(json.dumps(summary))
    found = chosen_checkpoint(config)
    assert found
    assert found.name == f"step-{best:06d}"


def test_a_finished_run_without_checkpoints_is_not_taken_for_the_base_model(config: Config, alone: None) -> None:
    assert chosen_checkpoint(config) is None
    config.output_dir.mkdir()
    (config.output_dir / "summary.json").touch()
    with pytest.raises(UserError, match=r"run is finished, but its checkpoints are gone: .*run/adapter alone"):
        chosen_checkpoint(config)


@pytest.mark.usefixtures("alone")
def test_a_run_is_complete_with_its_summary_and_export_alone(config: Config) -> None:
    adapter, summary = config.output_dir / "adapter", config.output_dir / "summary.json"
    adapter.mkdir(parents=True)
    summary.write_text('{"steps": 4}')
    assert not is_complete(config, 4)
    (adapter / "adapter_model.safetensors").touch()
    assert is_complete(config, 4)
    for damaged in ('{"ste', "null"):
        summary.write_text(damaged)
        assert not is_complete(config, 4)


@pytest.mark.usefixtures("alone")
def test_another_run_in_the_folder_is_noticed(config: Config) -> None:
    put(config, 4, [])
    before, folder = landmarks(config.output_dir), config.output_dir

    def check() -> None:
        if landmarks(folder) != before:
            raise UserError("another run")

    with Tracker(folder, config.tracking, {}, check=check):
        pass
    journal = (folder / "journal.jsonl").read_bytes()
    for change in (lambda: put(config, 6, []), lambda: (folder / "summary.json").touch()):
        change()
        with pytest.raises(UserError, match="another run"):
            Tracker(folder, config.tracking, {}, check=check)
        before = landmarks(folder)
    assert (folder / "journal.jsonl").read_bytes() == journal


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_of_another_course_is_told_from_the_run_folders_own(config: Config, tmp_path: Path) -> None:
    own = put(config, 4, [])
    copy = Path(shutil.copytree(own, tmp_path / "copy"))
    assert is_own(own, config)
    assert is_own(copy, config)
    assert is_own(None, config)
    write_state(copy, {"step": 4, "files": {"model-00001.safetensors": "another"}})
    assert not is_own(copy, config)
    write_state(copy, {"step": 6, "files": {}})
    assert not is_own(copy, config)


@pytest.mark.parametrize(
    ("asked", "job", "restarts", "checkpoints", "expected"),
    [
        ("never", "17", "1", 0, "auto"),
        ("never", "17", None, 1, "never"),  # begun, but the same command is given again by hand
        ("never", "16", "1", 1, "never"),  # the requeued job had not come to dropping the other's
        ("PATH", "17", "1", 1, "auto"),
        ("PATH", "17", "1", 0, "PATH"),
        ("PATH", "16", "1", 1, "PATH"),
    ],
)
def test_what_a_job_was_told_holds_until_it_has_begun(
    asked: str,
    job: str,
    restarts: str | None,
    checkpoints: int,
    expected: str,
    config: Config,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config.output_dir.mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", job)
    for step in range(checkpoints):
        put(config, step, [])
    discard_after(checkpoints, config)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    found = restarted(config.model_copy(update={"resume": Path("PATH") if asked == "PATH" else asked}))
    assert str(found.resume) == expected


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path, alone: None) -> None:
    class Model(nn.Linear):
        def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:  # type: ignore[override]
            return SimpleNamespace(logits=input_ids)

    save_probe(Model(1, 1), [1, 2], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["probe.safetensors"]
    with pytest.raises(UserError, match="gone cannot be written"):
        save_probe(Model(1, 1), [1, 2], tmp_path / "gone")
    with pytest.raises(UserError, match=r"manifest.json cannot be written"):
        write_manifest(tmp_path / "gone" / "manifest.json", {"matrices": []})
