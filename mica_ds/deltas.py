"""What the files of a merged model hold: the base's bytes, with (alpha / r) B A added to what the adapter is on."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mica_ds.adapter import factor_name, stored_targets
from mica_ds.checkpoint import tensor_files
from mica_ds.config import Config
from mica_ds.errors import UserError
from mica_ds.files import file_hash
from mica_ds.fingerprint import label, mixed_sum
from mica_ds.model import DTYPES, load_skeleton
from mica_ds.pieces import PIECE, Piece, cut, read
from mica_ds.shelf import STATE
from mica_ds.weights import StoredTensor, open_checkpoint, stored_tensor

MANIFEST = "merge.json"
# Elements that are added to at a time: in fp32 they stay in a core's cache, six times as fast as a whole piece.
_BLOCK = 1 << 19
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}


@dataclass(frozen=True)
class _Delta:
    """What is added to one stored matrix."""

    A: StoredTensor
    B: StoredTensor
    is_transposed: bool
    scale: float

    def add_to(self, W_MN: torch.Tensor, first: int) -> None:
        """Add to these rows of the stored matrix, in place; the first of them is row `first`. Local."""
        A_RI, B_OR = _whole(self.A), _whole(self.B)
        left_MR, right_RN = (A_RI.T, B_OR.T) if self.is_transposed else (B_OR, A_RI)
        for start in range(0, len(W_MN), step := max(1, _BLOCK // W_MN.shape[1])):
            W_PN = W_MN[start : start + step]
            exact_PN = W_PN.to(torch.float32, copy=True)
            left_PR = left_MR[first + start : first + start + len(W_PN)]
            W_PN.copy_(exact_PN.addmm_(left_PR, right_RN, alpha=self.scale))


class Merge:
    """What is merged with what: the same on all ranks. Local; reads the headers of the files. Raises: UserError."""

    def __init__(self, config: Config, checkpoint: Path) -> None:
        self.base, self.checkpoint = config.model.path, checkpoint
        self._dtype = DTYPES[config.model.dtype]
        stored = open_checkpoint(self.base)
        skeleton = load_skeleton(config.model)
        self._names: dict[tuple[str, str], str] = {}
        self.labels: dict[str, str] = {}
        for name, parameter in skeleton.named_parameters():
            tensor = stored_tensor(name, stored, skeleton.base_model_prefix, tuple(parameter.shape))
            self._names[tensor.file.name, tensor.key] = name
            self.labels[name] = label(name, tuple(parameter.shape), self._dtype)
        self._deltas = _deltas(config, checkpoint, skeleton, stored)
        self.files = sorted({tensor.file.name for tensor in stored.values()})
        self.pieces = [piece for file in self.files for piece in cut(self.base / file)]
        for piece in self.pieces:
            for rows in piece.rows:
                if rows.region and (piece.file, rows.region.key) in self._names and rows.region.dtype not in _STORED:
                    raise UserError(
                        f"model.path: {rows.region.key} in {self.base / piece.file} is stored as {rows.region.dtype}, "
                        f"to which nothing can be added: merge into the model in one of {', '.join(_STORED)}"
                    )
        self.size = sum(piece.size for piece in self.pieces)

    @property
    def others(self) -> list[Path]:
        """What belongs to the model besides its weights: config, tokenizer, licence."""
        return [
            file
            for file in sorted(self.base.iterdir())
            if file.is_file()
            and file.suffix not in _OTHER_WEIGHTS
            and (not file.name.endswith(".index.json") or file.name == "model.safetensors.index.json")
            and file.name not in (MANIFEST, ".gitattributes")
        ]

    @property
    def origin(self) -> dict[str, Any]:
        """What a merged model, or half of one, must agree with to be this one."""
        stats = {file.name: file.stat() for file in (*(self.base / name for name in self.files), *self.others)}
        return {
            "base": str(self.base.absolute()),
            "base_files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "checkpoint": str(self.checkpoint.absolute()),
            "checkpoint_sha256": file_hash(self.checkpoint / STATE),  # it holds the hashes of its other files
            "piece": PIECE,
        }

    def merged(self, piece: Piece) -> tuple[bytearray, dict[str, int]]:
        """A piece with what is added to it, and for each parameter in it its share of the base's fingerprint. Local."""
        data, sums = read(self.base, piece), {}
        for rows in piece.rows:
            place = (piece.file, rows.region.key) if rows.region else None
            if place not in self._names or rows.region is None:
                continue
            dtype = _STORED[rows.region.dtype]
            count = (rows.stop - rows.start) // dtype.itemsize
            values = torch.frombuffer(data, dtype=dtype, count=count, offset=rows.start - piece.start)
            first = (rows.start - rows.region.start) // dtype.itemsize
            sums[self._names[place]] = int(mixed_sum(values.to(self._dtype), first))
            if place in self._deltas:
                columns = rows.region.shape[1]
                self._deltas[place].add_to(values.view(-1, columns), first // columns)
        return data, sums


def _deltas(
    config: Config, checkpoint: Path, skeleton: PreTrainedModel, stored: dict[str, StoredTensor]
) -> dict[tuple[str, str], _Delta]:
    """What is added, by file and key of the stored matrix."""
    factors = open_checkpoint(checkpoint, tensor_files(checkpoint))
    scale = config.adapter.alpha / config.adapter.r
    uses = [id(parameter) for _, parameter in skeleton.named_parameters(remove_duplicate=False)]
    found = {}
    for target in stored_targets(skeleton, config.adapter, stored):
        name, module = target.matrix.name, skeleton.get_submodule(target.matrix.name)
        if uses.count(id(module.weight)) > 1:
            raise UserError(
                f"adapter.targets: {name} shares its weight with another module, which would change with it in a "
                "merged model: use the adapter as it is"
            )
        A, B = (factors[factor_name(name, module, factor)] for factor in "AB")
        found[target.tensor.file.name, target.tensor.key] = _Delta(A, B, target.matrix.is_transposed, scale)
    return found


def _whole(tensor: StoredTensor) -> torch.Tensor:
    return tensor.read(0, math.prod(tensor.shape)).view(tensor.shape)
