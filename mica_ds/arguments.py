"""transformers' `TrainingArguments` of a config, and the steps that follow from it."""

import functools
import math
import socket
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler

from mica_ds import comm, process
from mica_ds.config import Config, read_deepspeed, recomputes_activations
from mica_ds.data import Sequences
from mica_ds.errors import UserError
from mica_ds.files import lock_at_once
from mica_ds.parallelism import parallelism
from mica_ds.upstream import check_zero


def accumulation_steps(config: Config, ranks: int) -> int:
    """Micro-batches that each rank adds up for one step of the global batch. Local.

    Raises: UserError where the ranks cannot divide the global batch.
    """
    micro = _arguments(config)["per_device_train_batch_size"]
    if micro < 1:
        raise UserError(f"train.per_device_train_batch_size={micro}: a micro-batch has a sequence at least")
    steps, rest = divmod(config.data.global_batch, micro * ranks)
    if rest or not steps:
        raise UserError(
            f"data.global_batch={config.data.global_batch} is not divisible by "
            f"{ranks} ranks × train.per_device_train_batch_size={micro}"
        )
    # Ranks that share sequences take together what each would take alone.
    return steps * config.data.sequence_parallel


def total_steps(args: TrainingArguments, dataset: Sequences, global_batch: int) -> int:
    """The steps of the whole run, as the Trainer counts them. Local."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * (len(dataset) // global_batch))


def training_arguments(config: Config, accumulation: int = 1) -> TrainingArguments:
    """transformers' arguments, with those that follow from the rest of the config. Local, after `comm.start`.

    Must be alive before the model is built: zero.Init takes its settings from here.
    Raises: UserError where transformers or torch refuses a value, DeepSpeed's offload lacks its compiler, or its folder
    on NVMe cannot be written or is another run's.
    """
    if config.model.offload_activations and not recomputes_activations(config):
        raise UserError(
            "model.offload_activations needs train.activation_checkpointing=true: it offloads what that saves"
        )
    check_zero(config.deepspeed)
    deepspeed = read_deepspeed(config)
    zero = deepspeed["zero_optimization"]
    offloads = [zero.get(key, {}) for key in ("offload_optimizer", "offload_param")]
    folders = {Path(offload["nvme_path"]).resolve() for offload in offloads if offload.get("device") == "nvme"}
    if "offload_optimizer" in zero or folders:
        process.require_compiler(for_nvme=bool(folders))
    for folder in folders:
        _claim(folder)
    try:
        arguments = TrainingArguments(
            **_arguments(config),
            output_dir=str(config.output_dir / "checkpoints"),
            gradient_accumulation_steps=accumulation,
            deepspeed=deepspeed,
            parallelism_config=parallelism(config),
            bf16=config.model.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            label_names=["labels"],
        )
        _try(arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"train: transformers refuses these arguments: {' '.join(str(error).split())}") from None
    if arguments.max_steps < 1 and arguments.num_train_epochs <= 0:
        raise UserError(
            f"train.num_train_epochs={arguments.num_train_epochs:g} makes no step: set more, or train.max_steps"
        )
    return arguments


@functools.cache
def _claim(folder: Path) -> IO[bytes]:
    """Lock this rank's part of an `nvme_path` for as long as the process lives: DeepSpeed (0.19.8) empties it first."""
    try:
        lock = (folder / f"rank{comm.rank()}.lock").open("wb")
    except OSError as error:
        raise UserError(f"nvme_path: {folder} is no folder that can be written: {error.strerror}") from None
    if not lock_at_once(lock.fileno()):
        raise UserError(
            f"nvme_path: another run has its weights in {folder} on {socket.gethostname()}; give each its own, by a "
            "DeepSpeed JSON of its own, or wait for that one's end"
        )
    return lock


def _try(arguments: TrainingArguments) -> None:
    """Make an optimizer and a scheduler of these, as would happen only once the model and its bases are there."""
    optimizer = torch.optim.AdamW(
        [nn.Parameter(torch.zeros(1))],
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
    )
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(1),
        num_training_steps=1,
        scheduler_specific_kwargs=cast(dict[str, Any] | None, arguments.lr_scheduler_kwargs),  # a text was parsed
    )


def _arguments(config: Config) -> dict[str, Any]:
    """The config's `train:` over our own defaults."""
    return {
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 0.05,  # of all steps: what a crash loses at most
        "logging_nan_inf_filter": False,  # with it a loss that is not finite is logged as the mean of those before
        "lr_scheduler_type": "cosine",
        **config.train,
    }
