"""A stored checkpoint: safetensors files, read by slices, without a model."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mica_ds.errors import UserError

_FLOATS = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    """As the format names it: F32, BF16, F16, …"""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements start to stop of the flattened tensor, 1-D, as stored; reads only the rows that they touch. Local.

        The file is mapped for this read alone: pages of a map that stays would count as this process's memory.
        """
        row = math.prod(self.shape[1:])
        first = start // row
        with safe_open(self.file, framework="pt") as opened:
            rows = opened.get_slice(self.key)[first : -(-stop // row)]
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def whole(self) -> torch.Tensor:
        """All of it in its shape, as stored. Local."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.key)


@dataclass(frozen=True)
class Region:
    """Where a tensor lies in a safetensors file, in bytes from the file's beginning."""

    key: str
    dtype: str
    """As `StoredTensor` has it."""
    shape: tuple[int, ...]
    start: int
    stop: int


def read_layout(file: Path) -> list[Region]:
    """The tensors of a safetensors file in the order in which they lie there, without gaps, after its header. Local."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    regions = [
        Region(key, entry["dtype"], tuple(entry["shape"]), *(8 + length + offset for offset in entry["data_offsets"]))
        for key, entry in header.items()
    ]
    return sorted(regions, key=lambda region: (region.start, region.stop))


def open_checkpoint(path: Path, files: list[Path] | None = None) -> dict[str, StoredTensor]:
    """The tensors of a transformers checkpoint (or of the given files) by name. Local.

    Opening checks each file's length against its header. Raises: UserError where a file is missing or truncated, or
    there is none with a tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files or _checkpoint_files(path):
        if not file.is_file():
            raise UserError(f"model.path: {file} is missing; copy the checkpoint again")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    stored = opened.get_slice(key)
                    tensors[key] = StoredTensor(file, key, tuple(stored.get_shape()), stored.get_dtype())
        except (SafetensorError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"model.path: {file} is truncated or damaged ({reason}); copy it again") from None
    if not tensors:
        raise UserError(f"model.path: the checkpoint in {path} holds no tensor; copy it again")
    return tensors


def stored_tensor(
    name: str, tensors: dict[str, StoredTensor], prefix: str, shape: tuple[int, ...], is_float: bool = True
) -> StoredTensor:
    """The stored tensor of a parameter or buffer; checkpoints of the bare decoder lack the base model's prefix. Local.

    Raises: UserError where the checkpoint lacks it, or stores it in another shape or as other numbers.
    """
    candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    found = next((tensors[key] for key in candidates if key in tensors), None)
    folder = next(iter(tensors.values())).file.parent
    if found is None:
        raise UserError(
            f"model.path: {folder} lacks {name}: it is incomplete, "
            "or stores the weights in another shape (mixtures of experts do), which is not supported"
        )
    if found.shape != shape:
        raise UserError(f"{folder}: {name} has shape {found.shape}, but config.json asks for {shape}")
    if is_float and found.dtype not in _FLOATS:
        raise UserError(
            f"model.path: {folder} stores {name} as {found.dtype}: quantised weights are not supported, take the model "
            f"in one of {', '.join(_FLOATS)}"
        )
    return found


def _checkpoint_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return [path / "model.safetensors"]
    try:
        return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"model.path: {index} is truncated or damaged; copy it again") from None
