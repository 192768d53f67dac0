"""transformers' Trainer with our checkpoints, tracking and evaluation."""

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.integrations.deepspeed import deepspeed_init

from mica_ds import comm
from mica_ds.checkpoint import save_checkpoint
from mica_ds.config import Config, read_deepspeed
from mica_ds.errors import UserError
from mica_ds.evaluate import Evaluator, Scores
from mica_ds.tracking import Tracker


def accumulation_steps(config: Config) -> int:
    """Micro-batches that each rank adds up for one step of the global batch. Local, after `comm.start`.

    Raises: UserError where the ranks cannot divide the global batch.
    """
    micro, ranks = _arguments(config)["per_device_train_batch_size"], comm.world_size()
    steps, rest = divmod(config.data.global_batch, micro * ranks)
    if rest or not steps:
        raise UserError(
            f"data.global_batch={config.data.global_batch} is not divisible by "
            f"{ranks} ranks × train.per_device_train_batch_size={micro}"
        )
    return steps


def training_arguments(config: Config, accumulation: int = 1) -> TrainingArguments:
    """transformers' arguments, with those that follow from the rest of the config. Local, after `comm.start`.

    Must be alive before the model is built: zero.Init takes its settings from here.
    Raises: UserError where transformers refuses a value, or DeepSpeed's offload lacks its compiler.
    """
    deepspeed = read_deepspeed(config)
    if "offload_optimizer" in deepspeed["zero_optimization"]:
        comm.require_compiler()
    try:
        return TrainingArguments(
            **_arguments(config),
            output_dir=str(config.output_dir / "checkpoints"),
            gradient_accumulation_steps=accumulation,
            deepspeed=deepspeed,
            bf16=config.model.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            label_names=["labels"],
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"train: transformers refuses these arguments: {' '.join(str(error).split())}") from None


def _arguments(config: Config) -> dict[str, Any]:
    """The config's `train:` over our own defaults."""
    return {
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "lr_scheduler_type": "cosine",
        **config.train,
    }


class MicaTrainer(Trainer):
    """Writes our checkpoints instead of DeepSpeed's, which hold the frozen base but not the frozen B.

    `_save_checkpoint` is private, but no callback can replace it (transformers 5.23).
    """

    def __init__(self, *args: Any, origin: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._origin = origin

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        save_checkpoint(self.model, Path(str(self.args.output_dir)), self.state.global_step, self._origin)


class RunCallback(TrainerCallback):
    """Evaluates before the first step, logs to the tracker, and times the steps alone."""

    def __init__(self, trainer: Trainer, evaluator: Evaluator, tracker: Tracker) -> None:
        self._trainer, self._evaluator, self._tracker = trainer, evaluator, tracker
        self.before = Scores(None, None)
        self.seconds = 0.0
        """Wall time of the steps, without evaluation."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # The engine exists now, and an adapter adds nothing yet: this scores the base model.
        self.before = self._evaluator.score(self._trainer.model_wrapped)
        self._started = time.perf_counter()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        comm.at(f"step {state.global_step + 1}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        comm.at("")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._tracker.metrics(logs or {}, step=state.global_step)


def build_trainer(
    model: nn.Module,
    args: TrainingArguments,
    dataset: Dataset,
    evaluator: Evaluator,
    tracker: Tracker,
    origin: dict[str, Any],
) -> tuple[Trainer, RunCallback]:
    """The Trainer for a model with its adapter, and the callback that holds what the run found. Local.

    `origin` goes into the checkpoints.
    """
    trainer = MicaTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=default_data_collator,
        origin=origin,
    )
    callback = RunCallback(trainer, evaluator, tracker)
    trainer.add_callback(callback)
    return trainer, callback


def inference_engine(model: nn.Module, args: TrainingArguments) -> nn.Module:
    """A DeepSpeed engine for forwards only: under ZeRO-3 it is what gathers the weights. Collective."""
    trainer = Trainer(model=model, args=args)
    deepspeed_init(trainer, num_training_steps=0, inference=True)
    return trainer.accelerator.prepare(model)
