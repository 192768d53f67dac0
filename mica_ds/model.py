"""The base model, partitioned from the start: each rank reads only its own slices of the checkpoint.

transformers lets rank 0 read the whole checkpoint and broadcast it (5.23.0): 140 GB for 70B.
Here rank p reads 1/P of the bytes, in parallel with the others, and no weight is sent at all.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.generic import ContextManagers

from mica_ds import comm
from mica_ds.config import ModelSettings
from mica_ds.errors import UserError
from mica_ds.shards import fill_partition, full_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(settings: ModelSettings, weights: list[Path] | None = None) -> PreTrainedModel:
    """Build a causal language model under ZeRO-3 and fill its partitions from safetensors. Collective.

    `weights` are files that hold other values for all its parameters, such as those of a full fine-tuning.

    transformers' DeepSpeed settings must be alive (a TrainingArguments with `deepspeed`): zero.Init reads them.
    Raises: UserError where the checkpoint is missing, truncated or incomplete, or holds NaN or Inf.
    """
    with comm.failing_together():
        config = _load_config(settings.path)
        sources = _open(weights or _checkpoint_files(settings.path))
    dtype = DTYPES[settings.dtype]
    # What `from_pretrained` enters: zero.Init, no weight initialisation, RoPE buffers in their own dtype.
    with ContextManagers(PreTrainedModel.get_init_context(dtype, False, False, None)):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    found = {name: _find(name, sources, model.base_model_prefix) for name in parameters}
    stored = {name: tensor for name, tensor in found.items() if tensor is not None}
    missing = sorted(parameters.keys() - stored.keys())
    with comm.failing_together():
        if missing:
            raise UserError(
                f"model.path: {settings.path} lacks {missing[0]}: it is incomplete, "
                "or stores the weights in another shape (mixtures of experts do), which is not supported"
            )
        for name, tensor in stored.items():
            shape, expected = tuple(tensor.get_shape()), full_shape(parameters[name])
            if shape != expected:
                raise UserError(f"{settings.path}: {name} has shape {shape}, but config.json asks for {expected}")
    not_finite: list[str] = []
    for name, tensor in stored.items():
        fill_partition(parameters[name], functools.partial(_read_finite, tensor, name, not_finite))
    with comm.failing_together():
        if not_finite:
            raise UserError(
                f"model.path: {not_finite[0]} in {settings.path} holds NaN or Inf; copy the checkpoint again"
            )
    for name, buffer in model.named_buffers():
        if name in sources:
            buffer.copy_(sources[name].get_tensor(name))
    return model


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. Local. Raises: UserError where there is none."""
    if not settings.path.is_dir():
        raise UserError(f"model.path: {settings.path} is not a folder with a transformers checkpoint")
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {settings.path} holds no usable tokenizer: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer in {settings.path} has no eos_token to end documents with")
    return tokenizer


def _load_config(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise UserError(f"model.path: {path} holds no transformers checkpoint (config.json is missing)")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path}/config.json is not usable: {_first_line(error)}") from None


def _checkpoint_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return [path / "model.safetensors"]
    try:
        return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"model.path: {index} is truncated or damaged; copy it again") from None


def _open(files: list[Path]) -> dict[str, Any]:
    """The open safetensors file of each stored tensor. Opening checks each file's length against its header."""
    sources: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"model.path: {file} is missing; copy the checkpoint again")
        try:
            opened = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"model.path: {file} is truncated or damaged ({_first_line(error)}); copy it again"
            ) from None
        sources.update(dict.fromkeys(opened.keys(), opened))
    return sources


def _find(name: str, sources: dict[str, Any], prefix: str) -> Any | None:
    """The stored slice of a parameter; checkpoints of the bare decoder lack the base model's prefix."""
    candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((sources[key].get_slice(key) for key in candidates if key in sources), None)


def _read_finite(stored: Any, name: str, not_finite: list[str], start: int, stop: int) -> torch.Tensor:
    values = _read_flat(stored, start, stop)
    if not values.isfinite().all():
        not_finite.append(name)
    return values


def _read_flat(stored: Any, start: int, stop: int) -> torch.Tensor:
    """Elements start to stop of a flattened stored tensor, reading only the rows that they touch."""
    shape = stored.get_shape()
    row = 1
    for size in shape[1:]:
        row *= size
    first = start // row
    rows = stored[first : -(-stop // row)]
    return rows.reshape(-1)[start - first * row : stop - first * row]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters, partitioned or not. Local."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
