"""What training has changed, on disk: the trainable parameters in fp32, whole, independent of the number of ranks."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from mica_ds import comm
from mica_ds.errors import UserError
from mica_ds.shards import full_shape

_STATE = "state.json"


def save_checkpoint(model: Any, folder: Path, step: int, origin: dict[str, Any]) -> Path:
    """Write the trainable parameters of a model that trains under ZeRO-3 to `folder`/step-N. Collective.

    They are gathered one file's worth at a time (5 GB at most), and written by rank 0 under another name that becomes
    the real one at the end: a checkpoint is whole or absent. `origin` says what it belongs to: see `check_origin`.
    """
    target = folder / f"step-{step:06d}"
    partial = folder / f"{target.name}.partial"
    if comm.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    # peft's name for its only adapter does not belong in a file.
    trainable = {
        name.replace(".default.", ".").removesuffix(".default"): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    sizes = {name: torch.empty(full_shape(p), dtype=torch.float32, device="meta") for name, p in trainable.items()}
    for file, names in split_torch_state_dict_into_shards(sizes).filename_to_tensors.items():
        tensors = {name: safe_get_full_fp32_param(trainable[name]) for name in names}
        if comm.is_main():
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                partial / file,
            )
    if comm.is_main():
        if hasattr(model, "peft_config"):
            model.peft_config["default"].save_pretrained(partial)
        (partial / _STATE).write_text(json.dumps({"step": step, "origin": origin}))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    comm.barrier()
    return target


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, None where there is none. Local."""
    return max((state.parent for state in folder.glob(f"step-*[0-9]/{_STATE}")), default=None)


def check_origin(checkpoint: Path, origin: dict[str, Any]) -> None:
    """Refuse a checkpoint of another method, rank or basis: its A means nothing beside another B. Local.

    Raises: UserError.
    """
    found = json.loads((checkpoint / _STATE).read_text())["origin"]
    for key, value in origin.items():
        if found.get(key) != value:
            raise UserError(f"{checkpoint} was trained with {key} {found.get(key)}, but the run folder now has {value}")


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of an earlier run in the same folder. Local, on one rank."""
    for checkpoint in folder.glob("step-*"):
        shutil.rmtree(checkpoint)


def tensor_files(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's parameters, by their names in the model. Local."""
    return sorted(checkpoint.glob("*.safetensors"))


def read_tensors(checkpoint: Path) -> dict[str, Any]:
    """All parameters of a checkpoint, fp32. Local."""
    return {name: tensor for file in tensor_files(checkpoint) for name, tensor in load_file(file).items()}
