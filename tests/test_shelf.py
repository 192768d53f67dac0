"""Folders of checkpoints: what rotation leaves, and what is cleared away at a start."""

import json
from pathlib import Path

import pytest

from mica_ds.errors import UserError
from mica_ds.shelf import check_origin, find_checkpoint, remove_checkpoints, rotate, write_state


def put(folder: Path, step: int, loss: float | None = None) -> Path:
    checkpoint = folder / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"loss": loss, "origin": {"adapter.r": 4}}))
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(checkpoint.name for checkpoint in folder.iterdir())


def test_the_newest_stay_and_the_best(tmp_path: Path) -> None:
    for step, loss in [(5, 3.0), (10, 1.0), (15, None), (20, 2.0), (1_000_000, 2.5)]:
        put(tmp_path, step, loss)
    rotate(tmp_path, keep=2, ranked=[])
    assert names(tmp_path) == ["step-000010", "step-000020", "step-1000000"]


def test_the_best_is_the_first_of_a_ranking_that_is_there(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        put(tmp_path, step, loss=float(step))
    rotate(tmp_path, keep=1, ranked=[12, 10, 15])
    assert names(tmp_path) == ["step-000010", "step-000020"]


def test_a_damaged_one_is_not_the_best(tmp_path: Path) -> None:
    (put(tmp_path, 5, 0.0) / "state.json").write_text("{")
    put(tmp_path, 10, 1.0)
    put(tmp_path, 15, 2.0)
    rotate(tmp_path, keep=1, ranked=[])
    assert names(tmp_path) == ["step-000010", "step-000015"]


def test_a_start_removes_later_steps_and_leftovers(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        put(tmp_path, step)
    (tmp_path / "step-000020.partial").mkdir()
    (tmp_path / ".probe-host-7").touch()
    remove_checkpoints(tmp_path, after=10)
    assert names(tmp_path) == [".probe-host-7", "step-000005", "step-000010"]
    remove_checkpoints(tmp_path, after=-1)
    assert names(tmp_path) == [".probe-host-7"]


def test_damaged_ones_are_kept_aside_and_of_a_link_the_link_alone_goes(tmp_path: Path) -> None:
    for step in (5, 10):
        put(tmp_path, step)
    archive = tmp_path / "archive"
    (tmp_path / "step-000010").rename(archive)
    (tmp_path / "step-000010").symlink_to(archive)
    (tmp_path / "step-000005.damaged").mkdir()
    (tmp_path / "step-000005.partial").symlink_to(archive)
    remove_checkpoints(tmp_path, after=5)
    assert names(tmp_path) == ["archive", "step-000005", "step-000005.damaged"]
    assert (archive / "state.json").exists()
    remove_checkpoints(tmp_path, after=-1, are_damaged=True)
    assert names(tmp_path) == ["archive", "step-000005.damaged"]
    assert (tmp_path / "step-000005.damaged" / "state.json").exists()


@pytest.mark.usefixtures("alone")
def test_what_is_hidden_in_a_checkpoint_is_no_fault_but_another_name_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_state(put(tmp_path, 5), {"step": 5, "files": {}})
    (tmp_path / "step-000005" / ".nfs0000000000000001").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "step-000005"
    (tmp_path / "step-000005").rename(tmp_path / "step-5")
    with pytest.raises(UserError, match="none of the checkpoints"):
        find_checkpoint(tmp_path)
    assert "step-5 is misnamed, of its step it would be step-000005\n" in capsys.readouterr().out


def test_states_that_hold_something_else_are_not_the_best(tmp_path: Path) -> None:
    (put(tmp_path, 5) / "state.json").write_text("null")
    for step in (10, 15):
        put(tmp_path, step, loss=float(step))
    rotate(tmp_path, keep=1, ranked=[])
    assert names(tmp_path) == ["step-000010", "step-000015"]


def test_another_origin_is_named(tmp_path: Path) -> None:
    checkpoint = put(tmp_path, 5)
    check_origin(checkpoint, {"adapter.r": 4})
    with pytest.raises(UserError, match=r"step-000005 was trained with adapter.r=4, but now it is 8"):
        check_origin(checkpoint, {"adapter.r": 8})
