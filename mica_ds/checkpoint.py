"""All that training has changed, on disk: whole, hashed, in safetensors and JSON, independent of the number of ranks.

`step-N/` holds the trainable parameters and Adam's moments in fp32 (`model-*`, `exp_avg-*` and `exp_avg_sq-*`),
MiCA's frozen B (`frozen`), each rank's random states (`random.json`), transformers' `trainer_state.json`, and in
`state.json` the rest: steps, scheduler, what the checkpoint belongs to, and the SHA-256 of every other file.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from mica_ds import comm
from mica_ds.errors import UserError
from mica_ds.optimizer import MASTER, MOMENTS, fill_states, gather_states, optimizer_step
from mica_ds.weights import open_checkpoint

_STATE, _RANDOM, _FROZEN = "state.json", "random.json", "frozen.safetensors"
_PARTIAL = ".partial"
_FILE_SIZE = 1_600_000_000  # bytes; a file and its two of moments are in rank 0's memory together


def save_checkpoint(
    folder: Path,
    engine: Any,
    frozen: dict[str, torch.Tensor],
    progress: TrainerState,
    about: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint of a model that trains under ZeRO-3, then remove those that are not to be kept. Collective.

    Rank 0 gathers some 5 GB at a time and writes under another name that becomes the real one when all is on the disk:
    a checkpoint is whole or absent.

    Args:
        folder: where checkpoints lie side by side.
        engine: DeepSpeed's.
        frozen: the fp32 tensors that the trained ones mean nothing without; rank 0's count.
        progress: written to `trainer_state.json`.
        about: goes into `state.json`; `loss` decides which checkpoint is the best, `origin` what may go on from it.
        keep: the newest so many stay, and the best.

    Raises: UserError where the disk is full or fails; what was there before stays.
    """
    target = folder / f"step-{progress.global_step:06d}"
    partial = target.with_name(target.name + _PARTIAL)
    error: Exception | None = None
    randoms = comm.gather(_random_state())
    if comm.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as raised:
            error = raised
    files = _Files(partial)
    names = _stored_names(engine)
    for parameter, states in gather_states(engine):
        if comm.is_main() and error is None:
            try:
                files.add(names[id(parameter)], states)
            except (OSError, SafetensorError) as raised:  # go on: the other ranks are still sending
                error = raised
    with comm.failing_together():
        if comm.is_main():
            try:
                if error:
                    raise error
                files.write()
                if frozen:
                    save_file(frozen, partial / _FROZEN)
                if hasattr(engine.module, "peft_config"):
                    engine.module.peft_config["default"].save_pretrained(partial)
                (partial / _RANDOM).write_text(json.dumps(randoms))
                progress.save_to_json(str(partial / TRAINER_STATE_NAME))
                hashes = {file.name: _sync_and_hash(file) for file in sorted(partial.iterdir())}
                steps = {"step": progress.global_step, "optimizer_step": optimizer_step(engine)}
                (partial / _STATE).write_text(json.dumps({**steps, **about, "files": hashes}, indent=1))
                _sync_and_hash(partial / _STATE)
                os.replace(partial, target)
                _sync_folder(folder)
                _rotate(folder, keep)
            except (OSError, SafetensorError) as failure:
                shutil.rmtree(partial, ignore_errors=True)
                raise UserError(
                    f"checkpoint {target} cannot be written ({failure}): make room or mend the disk, and start again "
                    "to go on from the checkpoint before it"
                ) from None
    return target


class _Files:
    """Rank 0's tensors on their way to the disk, a file's worth at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._clear()

    def _clear(self) -> None:
        self._tensors: dict[str, dict[str, torch.Tensor]] = {key: {} for key in (MASTER, *MOMENTS)}
        self._size = 0

    def add(self, name: str, states: dict[str, torch.Tensor]) -> None:
        size = states[MASTER].nbytes
        if self._size and self._size + size > _FILE_SIZE:
            self.write()
        for key, tensor in states.items():
            self._tensors[key][name] = tensor
        self._size += size

    def write(self) -> None:
        self._number += 1
        for key, tensors in self._tensors.items():
            save_file(tensors, self._folder / f"{key}-{self._number:05d}.safetensors")
        self._clear()


def restore_optimizer(engine: Any, checkpoint: Path) -> None:
    """Give the engine a checkpoint's masters, moments and steps; each rank reads its own slices. Local.

    The model must hold the checkpoint's parameters already, since before DeepSpeed has taken it over: what is written
    to it later, the next step undoes (0.19.8).
    """
    names = _stored_names(engine)
    stored = {key: open_checkpoint(checkpoint, _files_of(checkpoint, key)) for key in (MASTER, *MOMENTS)}

    def read(parameter: Any, key: str, start: int, stop: int) -> torch.Tensor:
        return stored[key][names[id(parameter)]].read(start, stop)

    fill_states(engine, read_state(checkpoint)["optimizer_step"], read)


def restore_random_state(checkpoint: Path) -> None:
    """Continue the random numbers of this rank; on more ranks than were saved, those of another. Local."""
    saved = json.loads((checkpoint / _RANDOM).read_text())
    state = saved[comm.rank() % len(saved)]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def _random_state() -> dict[str, Any]:
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state().tolist()}
    return {**state, "cuda": torch.cuda.get_rng_state().tolist()} if torch.cuda.is_available() else state


def find_checkpoint(folder: Path, chosen: Path | None = None) -> Path | None:
    """The chosen checkpoint, or else the newest undamaged one in the folder; None where there is none. Collective.

    Rank 0 reads it whole and compares the hashes. Raises: UserError where the chosen one is damaged or missing.
    """
    found = None
    with comm.failing_together():
        if comm.is_main() and chosen:
            if fault := _fault(chosen):
                raise UserError(f"resume: {fault}")
            found = chosen
        elif comm.is_main():
            for checkpoint in reversed(_all(folder)):
                if not (fault := _fault(checkpoint)):
                    found = checkpoint
                    break
                comm.say(f"warning: {fault}; the checkpoint before it is used, if there is one")
    return comm.gather(found)[0]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was told about a checkpoint, and its steps. Local."""
    return json.loads((checkpoint / _STATE).read_text())


def read_history(checkpoint: Path) -> list[dict[str, float]]:
    """What the run had logged up to a checkpoint, over all its starts. Local."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).log_history


def check_origin(checkpoint: Path, origin: dict[str, Any]) -> None:
    """Refuse a checkpoint that was made with other settings or weights than these, by their keys. Local.

    Raises: UserError.
    """
    found = read_state(checkpoint)["origin"]
    for key, value in origin.items():
        if found.get(key) != value:
            raise UserError(
                f"{checkpoint} was trained with {key}={found.get(key)}, but now it is {value}: "
                "set it back, or train afresh with resume=never"
            )


def remove_checkpoints(folder: Path, after: int) -> None:
    """Remove the checkpoints of later steps, and what an interrupted writer has left. Local, on one rank."""
    for partial in folder.glob(f"*{_PARTIAL}"):
        shutil.rmtree(partial)
    for checkpoint in _all(folder):
        if _step(checkpoint) > after:
            _remove(checkpoint)


def tensor_files(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's trained parameters, by their names in the model. Local."""
    return _files_of(checkpoint, MASTER)


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All trained and frozen tensors of a checkpoint, fp32. Local."""
    trained = {name: tensor for file in tensor_files(checkpoint) for name, tensor in load_file(file).items()}
    return trained | read_frozen(checkpoint)


def read_frozen(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The frozen tensors of a checkpoint alone, fp32; none where all that an adapter has was trained. Local."""
    return load_file(checkpoint / _FROZEN) if (checkpoint / _FROZEN).exists() else {}


def _stored_names(engine: Any) -> dict[int, str]:
    # peft's name for its only adapter does not belong in a file.
    return {
        id(parameter): name.replace(".default.", ".").removesuffix(".default")
        for name, parameter in engine.module.named_parameters()
    }


def _files_of(checkpoint: Path, key: str) -> list[Path]:
    return sorted(checkpoint.glob(f"{key}-*.safetensors"))


def _all(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    return sorted((c for c in folder.glob("step-*") if c.name.removeprefix("step-").isdigit()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None where every file is as it was written."""
    try:
        for name, expected in read_state(checkpoint)["files"].items():
            with (checkpoint / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return f"{checkpoint / name} is damaged"
    except OSError as error:
        return f"{checkpoint} is incomplete or no checkpoint: {error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{checkpoint / _STATE} is damaged"
    return None


def _rotate(folder: Path, keep: int) -> None:
    checkpoints = _all(folder)
    best = min(checkpoints, key=_loss)
    for checkpoint in checkpoints[:-keep]:
        if checkpoint != best:
            _remove(checkpoint)


def _loss(checkpoint: Path) -> float:
    try:
        loss = read_state(checkpoint)["loss"]
    except (OSError, ValueError, KeyError):
        loss = None
    return float("inf") if loss is None else loss


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, under a name that nobody takes for one while it goes."""
    partial = checkpoint.with_name(checkpoint.name + _PARTIAL)
    os.replace(checkpoint, partial)
    shutil.rmtree(partial)


def _sync_and_hash(file: Path) -> str:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
