"""A folder of checkpoints: which are whole, which one to go on from, and which stay."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mica_ds import comm
from mica_ds.errors import UserError
from mica_ds.files import file_hash, sync

STATE = "state.json"
ARCHITECTURE = "model.path (SHA-256 of its config.json)"
_PARTIAL, _DAMAGED = ".partial", ".damaged"
_KINDS = (".safetensors", ".json")  # of a checkpoint's files: transformers would unpickle some others


def checkpoint_folder(folder: Path, step: int) -> tuple[Path, Path]:
    """Where the checkpoint of a step goes, and where it is until it is whole. Local."""
    target = folder / f"step-{step:06d}"
    return target, target.with_name(target.name + _PARTIAL)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was told about a checkpoint, and its steps. Local. Raises: UserError where it is gone."""
    try:
        return _read_state(checkpoint)
    except FileNotFoundError:
        raise UserError(f"{checkpoint} was removed meanwhile, by a run that goes on there: start again") from None


def _read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text())


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write state.json with a hash of itself; it holds those of the other files. Local."""
    (checkpoint / STATE).write_text(json.dumps({**state, "sha256": _digest(state)}, indent=1))
    sync(checkpoint / STATE)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def find_checkpoint(folder: Path, chosen: Path | None = None) -> Path | None:
    """The chosen checkpoint, or else the newest undamaged one in the folder; None where there is none. Collective.

    Rank 0 reads it whole and compares the hashes. Raises: UserError where the chosen one is damaged or missing, none of
    several is whole, or the disk fails.
    """
    found = None
    with comm.failing_together():
        if comm.is_main() and chosen:
            if fault := _fault(chosen):
                raise UserError(f"resume: {fault}")
            found = chosen
        elif comm.is_main():
            found = _first_whole(checkpoints_in(folder)[::-1], "the checkpoint before it")
            if found is None and checkpoints_in(folder):
                raise UserError(f"none of the checkpoints in {folder} is whole; resume=never begins again without them")
    return comm.gather(found)[0]


def find_best(folder: Path, ranked: list[int]) -> Path | None:
    """The undamaged checkpoint of the first of these steps that has one; None where none has. Collective."""
    found = None
    with comm.failing_together():
        if comm.is_main():
            stored = {step_of(checkpoint): checkpoint for checkpoint in checkpoints_in(folder)}
            found = _first_whole([stored[step] for step in ranked if step in stored], "the next best one")
    return comm.gather(found)[0]


def _first_whole(checkpoints: list[Path], instead: str) -> Path | None:
    for checkpoint in checkpoints:
        if not (fault := _fault(checkpoint)):
            return checkpoint
        comm.say(f"warning: {fault}" + (f"; {instead} is used" if checkpoint != checkpoints[-1] else ""))
    return None


def check_origin(checkpoint: Path, origin: dict[str, Any]) -> None:
    """Refuse a checkpoint that was made with other settings or weights than these, by their keys. Local.

    Raises: UserError.
    """
    found = read_state(checkpoint)["origin"]
    for key, value in origin.items():
        if found.get(key) == value or (key == ARCHITECTURE and key not in found):  # of an earlier version
            continue
        name, is_digest, of = key.partition(" (SHA-256 of ")
        differs = f"was trained with {key}={found.get(key)}, but now it is {value}"
        if is_digest:
            differs = f"was trained with something else as {name}, to go by {of.removesuffix(')')}"
        raise UserError(f"{checkpoint} {differs}: set it back, or train afresh with resume=never")


def remove_checkpoints(folder: Path, after: int, are_damaged: bool = False) -> None:
    """Remove the checkpoints of later steps, and what an interrupted writer has left. Local, on one rank.

    Those that `are_damaged` are kept under another name, for a person to look at.
    """
    for partial in folder.glob(f"step-*{_PARTIAL}"):
        _delete(partial)
    for checkpoint in checkpoints_in(folder):
        if step_of(checkpoint) > after and are_damaged:
            aside = checkpoint.with_name(checkpoint.name + _DAMAGED)
            if os.path.lexists(aside):
                _delete(aside)
            os.replace(checkpoint, aside)
        elif step_of(checkpoint) > after:
            _remove(checkpoint)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first. Local."""
    return sorted((c for c in folder.glob("step-*") if re.fullmatch("step-[0-9]+", c.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells. Local."""
    return int(checkpoint.name.removeprefix("step-"))


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None where every file is as it was written."""
    try:
        state = _read_state(checkpoint)
        if state.pop("sha256") != _digest(state):
            return f"{checkpoint / STATE} is damaged"
        own = checkpoint_folder(checkpoint.parent, state["step"])[0].name
        if checkpoint.name.startswith("step-") and checkpoint.name != own:
            return f"{checkpoint} is misnamed, of its step it would be {own}"
        # Hidden ones are other programs': NFS keeps there what was removed while it was open.
        names = {file.name for file in checkpoint.iterdir() if not file.name.startswith(".")}
        if strangers := {name for name in names if name not in (STATE, *state["files"]) or not name.endswith(_KINDS)}:
            return f"{checkpoint / min(strangers)} does not belong to a checkpoint"
        for name, expected in state["files"].items():
            if file_hash(checkpoint / name) != expected:
                return f"{checkpoint / name} is damaged"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{checkpoint} is incomplete or no checkpoint: {error.filename} cannot be read ({error.strerror})"
    except OSError as error:  # it may be whole: nothing is concluded from a disk that fails
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): mend the disk, and start again") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{checkpoint / STATE} is damaged"
    return None


def rotate(folder: Path, keep: int, ranked: list[int]) -> None:
    """Remove all checkpoints but the newest so many and the best. Local, on one rank.

    The best is that of the first of the `ranked` steps which has one, or else the one with the lowest loss.
    """
    checkpoints = checkpoints_in(folder)
    stored = {step_of(checkpoint): checkpoint for checkpoint in checkpoints}
    best = next((stored[step] for step in ranked if step in stored), None) or min(checkpoints, key=_loss)
    for checkpoint in checkpoints[:-keep]:
        if checkpoint != best:
            _remove(checkpoint)


def _loss(checkpoint: Path) -> float:
    try:
        loss = _read_state(checkpoint)["loss"]
    except (OSError, ValueError, KeyError, TypeError):
        loss = None
    return loss if isinstance(loss, int | float) else float("inf")


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, under a name that nobody takes for one while it goes."""
    partial = checkpoint.with_name(checkpoint.name + _PARTIAL)
    if os.path.lexists(partial):  # left by an earlier time, which the new name would fail over
        _delete(partial)
    os.replace(checkpoint, partial)
    _delete(partial)


def _delete(folder: Path) -> None:
    """Remove a folder, or of a link to one the link alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def put_in_place(partial: Path, target: Path) -> None:
    """Give a folder that is whole its name, instead of what had it before. Local, on one rank."""
    for path in (*partial.iterdir(), partial):
        sync(path)
    old = target.with_name(f"{target.name}.old{_PARTIAL}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)  # never half of one under its name
    os.replace(partial, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise a UserError where the disk is full or fails. Local."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be written ({error}): make room or mend the disk, and start again to go on"
        ) from None
