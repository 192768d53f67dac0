"""The base model, partitioned from the start: each rank reads only its own slices of the checkpoint.

transformers lets rank 0 read the whole checkpoint and broadcast it (5.23.0): 140 GB for 70B.
Here rank p reads 1/P of the bytes, in parallel with the others, and no weight is sent at all.
"""

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
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
from mica_ds.shards import fill_partition, full_shape, full_size
from mica_ds.weights import StoredTensor, open_checkpoint, stored_tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(settings: ModelSettings, weights: list[Path] | None = None) -> PreTrainedModel:
    """Build a causal language model under ZeRO-3 and fill its partitions from safetensors. Collective.

    `weights` are files that hold other values for all its parameters, such as those of a full fine-tuning, and its
    buffers.

    transformers' DeepSpeed settings must be alive (a TrainingArguments with `deepspeed`): zero.Init reads them.
    Raises: UserError where the checkpoint is missing, truncated or incomplete, or holds NaN or Inf.
    """
    with comm.failing_together():
        config = read_model_config(settings.path)
        sources = open_checkpoint(settings.path, weights)
    dtype = DTYPES[settings.dtype]
    attention = None if settings.attention == "auto" else settings.attention
    # What `from_pretrained` enters: zero.Init, no weight initialisation, RoPE buffers in their own dtype.
    try:
        with ContextManagers(PreTrainedModel.get_init_context(dtype, False, False, None)):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except (ImportError, ValueError) as error:
        if attention is None:
            raise
        raise UserError(f"model.attention={attention}: {_reason(error)}") from None
    model.tie_weights()
    parameters = dict(model.named_parameters())
    with comm.failing_together():
        stored = {
            name: stored_tensor(name, sources, model.base_model_prefix, full_shape(parameter))
            for name, parameter in parameters.items()
        }
        # An earlier version's checkpoints of a full fine-tuning have none; they are the base's.
        has_buffers = persistent_buffers(model).keys() <= sources.keys() or not weights
        buffers = stored_buffers(model, sources if has_buffers else open_checkpoint(settings.path))
    not_finite: list[str] = []
    for name, tensor in stored.items():
        fill_partition(parameters[name], functools.partial(_read_finite, tensor, name, not_finite))
    with comm.failing_together():
        if not_finite:
            raise UserError(
                f"model.path: {not_finite[0]} in {settings.path} holds NaN or Inf; copy the checkpoint again"
            )
    for name, buffer in persistent_buffers(model).items():
        buffer.copy_(buffers[name].whole())
    return model


def stored_buffers(model: PreTrainedModel, sources: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Where the buffers of a model lie, by their names. Local. Raises: UserError where the checkpoint lacks one."""
    return {
        name: stored_tensor(name, sources, model.base_model_prefix, tuple(buffer.shape), buffer.is_floating_point())
        for name, buffer in persistent_buffers(model).items()
    }


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds beside parameters, such as the correction of a router. Local."""
    stored = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def load_skeleton(settings: ModelSettings) -> PreTrainedModel:
    """The model without weights, on the meta device: its modules, names and shapes. Local.

    Raises: UserError where no model can be made of its config.json.
    """
    config = read_model_config(settings.path)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # whatever a module says of sizes or names that it cannot be made of
        raise _unusable(settings.path, error) from None


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. Local. Raises: UserError where there is none."""
    if not settings.path.is_dir():
        raise UserError(f"model.path: {settings.path} is not a folder with a transformers checkpoint")
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.path, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # of its own files, and of config.json
        raise UserError(f"model.path: {settings.path} holds no usable tokenizer: {_reason(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer in {settings.path} has no eos_token to end documents with")
    return tokenizer


def read_model_config(path: Path) -> Any:
    """The checkpoint's transformers config. Local. Raises: UserError where there is none, or of no language model."""
    if not (path / "config.json").is_file():
        raise UserError(f"model.path: {path} holds no transformers checkpoint (config.json is missing)")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # transformers checks and counts with what it finds there in many ways
        raise _unusable(path, error) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"model.path: {path} holds a {config.model_type} model, which is no causal language model")
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    makes_its_own_loss = "loss_function" not in inspect.unwrap(kind.forward).__code__.co_names
    if makes_its_own_loss:
        raise UserError(f"model.path: {path} holds a {config.model_type} model, which is not trained by its next token")
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"model.path: {path} holds quantised weights, which are not supported: take the unquantised model"
        )
    if getattr(config, "z_loss_coefficient", 0):  # Bamba's, of the whole logits
        raise UserError(f"model.path: {path}/config.json adds a z-loss; set its z_loss_coefficient to 0")
    return config


def _read_finite(stored: StoredTensor, name: str, not_finite: list[str], start: int, stop: int) -> torch.Tensor:
    values = stored.read(start, stop)
    if len(values) and not torch.stack(values.aminmax()).isfinite().all():  # NaN is both; and no copy is made
        not_finite.append(name)
    return values


def _unusable(path: Path, error: Exception) -> UserError:
    return UserError(f"model.path: {path}/config.json is not usable: {_reason(error)}")


def _reason(error: Exception) -> str:
    """The first line of what a library says, and the next where that is a heading."""
    lines = str(error).strip().split("\n")
    reason = " ".join(" ".join(lines[: 2 if lines[0].endswith(":") else 1]).split())
    is_a_sentence = isinstance(error, ImportError | OSError | ValueError)
    return reason if is_a_sentence else f"{type(error).__name__}: {reason}"


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters, partitioned or not. Local."""
    return sum(full_size(p) for p in model.parameters() if p.requires_grad)
