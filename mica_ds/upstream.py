"""What a config hands on to transformers and DeepSpeed, and what of that is refused."""

import json
import typing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mica_ds.errors import UserError
from mica_ds.settings import complaint, nearest

# TrainingArguments that follow from our own keys; a second way to set them would let the two disagree.
_DERIVED = {
    "output_dir": "output_dir",
    "deepspeed": "deepspeed",
    "gradient_accumulation_steps": "data.global_batch",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "report_to": "tracking",
    "use_cpu": "the machine",
    "label_names": "the model",
    "parallelism_config": "data.sequence_parallel",
}

# Those that would be accepted and then do nothing here, fail late, or change which samples a step sees.
_FIXED_ORDER = "the order of the samples follows from train.seed, on any number of ranks"
_EVALUATION = "what is scored, and when, is set under `evaluate`"
_BEST = "set checkpoint.export=best instead"
_MAPPED = "samples are read from mapped memory, which needs no workers"
_HUB = "nothing is sent to a hub"
_UNSUPPORTED = {
    "eval_strategy": "set evaluate.every instead",
    "eval_on_start": "what `evaluate` names is always scored before training",
    "eval_steps": "set evaluate.every instead",
    "per_device_eval_batch_size": "set evaluate.batch_tokens instead",
    **dict.fromkeys(("eval_delay", "eval_accumulation_steps", "eval_do_concat_batches"), _EVALUATION),
    **dict.fromkeys(("eval_use_gather_object", "batch_eval_metrics", "include_for_metrics"), _EVALUATION),
    **dict.fromkeys(("prediction_loss_only", "do_train", "do_eval", "do_predict"), _EVALUATION),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "set model.dtype instead"),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    **dict.fromkeys(("fsdp", "fsdp_config"), "DeepSpeed shards the model"),
    "save_on_each_node": "checkpoints lie in one folder, which all nodes share",
    "run_name": "a run is named by its output_dir",
    "resume_from_checkpoint": "set resume instead",
    "save_total_limit": "set checkpoint.keep instead",
    "save_only_model": "a checkpoint is always complete",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 always make a checkpoint",
    **dict.fromkeys(("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"), _MAPPED),
    "ignore_data_skip": "a resumed run goes on at the next sample",
    "hub_token": f"{_HUB}, and a token would be kept in the run folder",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push"), _HUB),
    "label_smoothing_factor": "the loss is that of the labels alone",
    "average_tokens_across_devices": "the loss is always the mean over the predicted tokens of all ranks",
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules"), "the JSON of `deepspeed` names the optimizer"),
    "auto_find_batch_size": "set train.per_device_train_batch_size",
    "train_sampling_strategy": _FIXED_ORDER,
    "accelerator_config": _FIXED_ORDER,
    # transformers (5.23) looks at restarting positions only where nothing is cached, `_preprocess_mask_arguments`.
    "use_cache": "training needs no cache, and with one packed documents see each other",
}

# Values of the DeepSpeed JSON that transformers fills in. What is absent it leaves out, for DeepSpeed's own defaults.
_FOLLOWING = (
    *(f"optimizer.params.{name}" for name in ("lr", "betas", "eps", "weight_decay")),
    *("gradient_clipping", "bf16.enabled"),
    *("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"),
)


def check_training_arguments(path: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Check names and types against transformers' dataclass, whose own constructor checks neither. Local.

    Returns the arguments with values of the right types. Raises: UserError that names the key.
    """
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    known = [name for name in TrainingArguments.__dataclass_fields__ if name not in _DERIVED]
    checked = {}
    for key, value in arguments.items():
        if key in _DERIVED:
            raise UserError(f"{path}: train.{key} follows from {_DERIVED[key]}; set that instead")
        if key in _UNSUPPORTED:
            raise UserError(f"{path}: train.{key} is not supported: {_UNSUPPORTED[key]}")
        if key not in known:
            raise UserError(f"{path}: unknown key train.{key}{nearest(key, known, ['train'])}")
        try:
            checked[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            raise UserError(f"{path}: {complaint(f'train.{key}', error)}") from None
    if checked.get("save_strategy") == "best":
        raise UserError(f"{path}: train.save_strategy=best is not supported: {_BEST}")
    return checked


def check_deepspeed(path: Path) -> None:
    """Refuse a DeepSpeed JSON that a run cannot go by, or that says other than its config. Local. Raises: UserError."""
    try:
        settings = json.loads(path.read_text())
        zero = settings["zero_optimization"]
        stage = zero["stage"]
    except OSError as error:
        raise UserError(f"deepspeed: {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"deepspeed: {path} is not JSON with zero_optimization.stage") from None
    if stage != 3:
        raise UserError(f"deepspeed: {path} asks for ZeRO stage {stage}; mica_ds works on the shards of stage 3")
    places = ((settings, "comet"), (settings, "optimizer"), (zero, "offload_param"), (zero, "offload_optimizer"))
    for place, section in places:
        if not isinstance(place.get(section, {}), dict):
            raise UserError(f"deepspeed: {path}: {section} is no section with keys and values; leave it out for none")
    for section in ("offload_param", "offload_optimizer"):
        offload = zero.get(section, {})
        folder = offload.get("nvme_path")
        if offload.get("device") == "nvme" and not (folder and isinstance(folder, str)):
            raise UserError(f"deepspeed: {path}: {section} goes to nvme and needs its nvme_path")
    if "api_key" in settings.get("comet", {}):
        raise UserError(f"deepspeed: {path} holds comet.api_key, which MLflow would get with the file: take it out")
    if "scheduler" in settings:
        raise UserError(f"deepspeed: {path} has a scheduler; set train.lr_scheduler_type instead")
    if settings.get("optimizer", {}).get("type") not in ("Adam", "AdamW"):
        raise UserError(f"deepspeed: {path} has no optimizer of type Adam or AdamW, whose moments a checkpoint holds")
    for key in _FOLLOWING:
        place = settings
        for section in key.split("."):
            place = place.get(section) if isinstance(place, dict) else None
        if place != "auto":
            raise UserError(f'deepspeed: {path} must have "auto" for {key}, which follows from the config')


def check_zero(path: Path) -> None:
    """Refuse what DeepSpeed does not know under `zero_optimization`. Local, once it is loaded. Raises: UserError."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**json.loads(path.read_text())["zero_optimization"])
    except ValidationError as error:
        key = ".".join(["zero_optimization", *map(str, error.errors()[0]["loc"])])
        raise UserError(f"deepspeed: {path}: {complaint(key, error)}") from None
