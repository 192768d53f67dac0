"""All that training has changed, on disk: whole, hashed, in safetensors and JSON, independent of the number of ranks.

`step-N/` holds the trainable parameters and Adam's moments in fp32 (`model-*`, `exp_avg-*` and `exp_avg_sq-*`),
MiCA's frozen B or a whole model's buffers (`frozen`), each rank's random states (`random.json`), transformers'
`trainer_state.json`, and in `state.json` the rest: steps, scheduler, what the checkpoint belongs to, and the SHA-256 of
every file.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from mica_ds import comm
from mica_ds.errors import UserError
from mica_ds.files import file_hash, sync
from mica_ds.optimizer import MASTER, MOMENTS, fill_states, gather_states, optimizer_step
from mica_ds.shards import fill_partition
from mica_ds.shelf import checkpoint_folder, read_state, rotate, write_state
from mica_ds.weights import open_checkpoint

_RANDOM, _FROZEN = "random.json", "frozen.safetensors"
_FILE_SIZE = 1_600_000_000  # bytes; a file and its two of moments are in rank 0's memory together


def save_checkpoint(
    folder: Path,
    engine: Any,
    frozen: dict[str, torch.Tensor],
    progress: TrainerState,
    about: dict[str, Any],
    keep: int,
    ranked: list[int],
) -> Path:
    """Write a checkpoint of a model that trains under ZeRO-3, then remove those that are not to be kept. Collective.

    Rank 0 gathers some 5 GB at a time, or one tensor that is larger, and writes under another name that becomes the
    real one when all is on the disk: a checkpoint is whole or absent.

    Args:
        folder: where checkpoints lie side by side.
        engine: DeepSpeed's.
        frozen: the tensors that the trained ones mean nothing without; rank 0's count.
        progress: written to `trainer_state.json`.
        about: goes into `state.json`; `loss` may decide which checkpoint is the best, `origin` what may go on from it.
        keep: the newest so many stay, and the best.
        ranked: the steps of which the first with a checkpoint has the best; without any, the loss decides.

    Raises: UserError where the disk is full or fails; what was there before stays.
    """
    target, partial = checkpoint_folder(folder, progress.global_step)
    randoms = comm.gather(_random_state())
    failed = _write_states(engine, partial)
    with comm.failing_together():
        if comm.is_main():
            try:
                if failed:
                    raise failed
                if frozen:
                    save_file(frozen, partial / _FROZEN)
                if hasattr(engine.module, "peft_config"):
                    engine.module.peft_config["default"].save_pretrained(partial)
                (partial / _RANDOM).write_text(json.dumps(randoms))
                progress.save_to_json(str(partial / TRAINER_STATE_NAME))
                hashes = {file.name: _sync_and_hash(file) for file in sorted(partial.iterdir())}
                steps = {"step": progress.global_step, "optimizer_step": optimizer_step(engine)}
                write_state(partial, {**steps, **about, "files": hashes})
                sync(partial)
                os.replace(partial, target)
                sync(folder)
            except (OSError, SafetensorError) as failure:
                shutil.rmtree(partial, ignore_errors=True)
                raise UserError(
                    f"checkpoint {target} cannot be written ({failure}): make room or mend the disk, and start again "
                    "to go on from the checkpoint before it"
                ) from None
            try:
                rotate(folder, keep, ranked)
            except OSError as failure:
                comm.say(f"warning: an old checkpoint cannot be removed: {failure}")
    return target


def _write_states(engine: Any, folder: Path) -> Exception | None:
    """Write masters and moments on rank 0, a file's worth at a time, and return there what has failed. Collective."""
    failed: Exception | None = None
    names, number = _stored_names(engine), 0
    held: dict[str, dict[str, torch.Tensor]] = {key: {} for key in (MASTER, *MOMENTS)}

    def write() -> None:
        nonlocal failed, number
        number += 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for key, tensors in held.items():
                save_file(tensors, folder / f"{key}-{number:05d}.safetensors")
        except (OSError, SafetensorError) as raised:  # go on: the other ranks are still sending
            failed = failed or raised
        for tensors in held.values():
            tensors.clear()

    for parameter, states in gather_states(engine):
        if comm.is_main():
            size = states[MASTER].nbytes + sum(tensor.nbytes for tensor in held[MASTER].values())
            if held[MASTER] and size > _FILE_SIZE:
                write()
            for key, tensor in states.items():
                held[key][names[id(parameter)]] = tensor
    if comm.is_main():
        write()
    return failed


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


def load_trained(engine: Any, checkpoint: Path) -> None:
    """Give the engine a checkpoint's trained parameters for forwards alone; each rank reads its own slices. Local.

    The optimizer keeps its masters, with which the next step would overwrite them.
    """
    stored, names = open_checkpoint(checkpoint, trained_files(checkpoint)), _stored_names(engine)
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.partition()  # one that ZeRO-3 keeps whole would not hear of it
            fill_partition(parameter, stored[names[id(parameter)]].read)


def restore_random_state(checkpoint: Path) -> None:
    """Continue the random numbers of this rank; on more ranks than were saved, those of another. Local."""
    saved = json.loads((checkpoint / _RANDOM).read_text())
    state = saved[comm.rank() % len(saved)]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(_from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _random_state() -> dict[str, Any]:
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy, "torch": _to_hex(torch.get_rng_state())}
    return {**state, "cuda": _to_hex(torch.cuda.get_rng_state())} if torch.cuda.is_available() else state


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(state: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)


def read_history(checkpoint: Path) -> list[dict[str, float]]:
    """What the run had logged up to a checkpoint, over all its starts. Local."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).log_history


def trained_files(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's trained parameters, by their names in the model. Local."""
    return _files_of(checkpoint, MASTER)


def tensor_files(checkpoint: Path) -> list[Path]:
    """The files that hold all tensors of a checkpoint, trained or frozen, by their names in the model. Local."""
    return [*trained_files(checkpoint), *checkpoint.glob(_FROZEN)]


def adapter_norms(checkpoint: Path) -> dict[str, float]:
    """The Frobenius norms of an adapter's A, over all layers, by target: `norm_A/q_proj`. Local."""
    squares: dict[str, float] = {}
    for file in trained_files(checkpoint):
        with safe_open(file, "pt") as tensors:
            for name in tensors.offset_keys():
                module, is_factor, _ = name.rpartition(".lora_A")
                if is_factor:
                    key = f"norm_A/{module.rpartition('.')[2]}"
                    squares[key] = squares.get(key, 0.0) + float(tensors.get_tensor(name).square().sum())
    return {key: value**0.5 for key, value in squares.items()}


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All trained and frozen tensors of a checkpoint. Local."""
    trained = {name: tensor for file in trained_files(checkpoint) for name, tensor in load_file(file).items()}
    return trained | read_frozen(checkpoint)


def read_frozen(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The frozen tensors of a checkpoint alone; none where all there is was trained. Local."""
    return load_file(checkpoint / _FROZEN) if (checkpoint / _FROZEN).exists() else {}


def _stored_names(engine: Any) -> dict[int, str]:
    # peft's name for its only adapter does not belong in a file.
    return {
        id(parameter): name.replace(".default.", ".").removesuffix(".default")
        for name, parameter in engine.module.named_parameters()
    }


def _files_of(checkpoint: Path, key: str) -> list[Path]:
    return sorted(checkpoint.glob(f"{key}-*.safetensors"))


def _sync_and_hash(file: Path) -> str:
    sync(file)
    return file_hash(file)
