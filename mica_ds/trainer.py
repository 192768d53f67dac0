"""transformers' Trainer with our checkpoints, and with the loss of sequences that ranks share."""

import contextlib
import math
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_init
from transformers.utils.import_utils import is_liger_kernel_available

from mica_ds import comm
from mica_ds.adapter import target_modules
from mica_ds.callback import RunCallback, heed_signals
from mica_ds.checkpoint import adapter_norms, restore_optimizer, save_checkpoint
from mica_ds.config import Config
from mica_ds.data import Sequences
from mica_ds.errors import UserError
from mica_ds.evaluate import Evaluator
from mica_ds.fingerprint import WEIGHTS
from mica_ds.loss import TILE_ON_CPU, TILE_ON_GPU, tile_loss
from mica_ds.meter import Meter
from mica_ds.model import load_skeleton
from mica_ds.parallelism import collator, mask_evaluation, share_batches, token_loss
from mica_ds.shelf import read_state
from mica_ds.tracking import Tracker


class MicaTrainer(Trainer):
    """Writes and reads our checkpoints instead of DeepSpeed's, which hold the frozen base but not the frozen B.

    Besides, it times the wait for data, counts the tokens of sequences that ranks share, and makes the loss their mean.
    The private methods are those that no callback can replace (transformers 5.23).
    """

    def __init__(
        self,
        *args: Any,
        evaluator: Evaluator,
        tracker: Tracker,
        config: Config,
        origin: dict[str, Any],
        frozen: dict[str, torch.Tensor],
        facts: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._config, self._offloads_activations = config, config.model.offload_activations
        self._keep, self._origin, self._frozen, self._tracker = config.checkpoint.keep, origin, frozen, tracker
        if self.args.parallelism_config:
            self.loss_is_scaled_for_ga = True  # see `compute_loss`
        self.saved: Path | None = None
        """The last checkpoint."""
        self._saved_step = 0
        self._meter = Meter(cast(nn.Module, self.model), config.data.sequence_length)
        self.run = RunCallback(self, evaluator, tracker, self._meter, config, origin[WEIGHTS], facts)
        self.add_callback(self.run)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        with self._meter.waiting_for_data():
            samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.parallelism_config:  # then transformers does not count, and weighs each micro-batch alike (5.23)
            items = comm.sum_(sum(sample["shift_labels"].ne(-100).sum().cpu() for sample in samples)).to(device)
        self._meter.expect(int(items or 0))  # none where an epoch has ended
        return samples, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss alone: the outputs would be for transformers' own evaluation, which never runs."""
        if self.args.parallelism_config:
            outputs = model(**inputs, labels=inputs["shift_labels"], num_items_in_batch=num_items_in_batch)
            loss = token_loss(outputs.loss)
        else:
            loss = cast(torch.Tensor, super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch))
        # An infinite loss may have finite gradients. NaN ones are what DeepSpeed knows a step by that is to be skipped.
        return loss * (1 + 0 * loss.detach())

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        if self._offloads_activations:  # what is saved outside of checkpointed layers: their inputs
            stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()))
        return stack

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.state.global_step == self._saved_step:
            return  # an epoch's last step may ask twice
        assert self.lr_scheduler
        about = {
            "origin": self._origin,
            "loss": _mean_loss(self.state.log_history, self._saved_step),
            "scheduler": self.lr_scheduler.state_dict(),
            "run": self.run.facts(),
        }
        folder = Path(str(self.args.output_dir))
        started = time.perf_counter()
        ranked = self.run.ranked(self.state)
        self.saved = save_checkpoint(folder, self.model_wrapped, self._frozen, self.state, about, self._keep, ranked)
        self._saved_step = self.state.global_step
        if comm.is_main():
            size = sum(file.stat().st_size for file in self.saved.iterdir())
            costs = {"checkpoint_seconds": time.perf_counter() - started, "checkpoint_bytes": size}
            self._tracker.metrics({**costs, **adapter_norms(self.saved)}, self._saved_step)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # Without the checkpoint's name: DeepSpeed would look for its own files in it, and raise.
        engine, _ = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine.step = self._heed_signals_before(engine.step)
        if self.args.parallelism_config:
            share_batches(train_dataloader, self.args.parallelism_config.sp_size)
            mask_evaluation(self._config)
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            self._saved_step = self.state.global_step
            self.run.resume(checkpoint)
            self.state.compute_steps(self.args, max_steps)  # what was loaded holds the earlier start's
            restore_optimizer(self.model_wrapped, checkpoint)
            # accelerate's wrapper steps only when DeepSpeed does (1.15): the scheduler itself.
            scheduler = cast(Any, self.lr_scheduler).scheduler
            # Its place alone: a learning rate that was changed since is meant.
            scheduler.last_epoch = read_state(checkpoint)["scheduler"]["last_epoch"] - 1
            scheduler.step()  # sets the optimizer's learning rate, by this start's number of steps
            # The sampler of several ranks would not hear of the epoch through the loader that skips (accelerate 1.15).
            train_dataloader.set_epoch(int(self.state.epoch))
        return engine, train_dataloader  # not the one that DeepSpeed wraps around it: see `share_batches`

    def _heed_signals_before(self, update: Callable[..., None]) -> Callable[..., None]:
        """An engine's update that begins with signals: in it the ranks meet for the last time in a step."""

        def heeding(*args: Any, **kwargs: Any) -> None:
            heed_signals(self.state.global_step + 1)
            update(*args, **kwargs)

        return heeding


def _mean_loss(history: list[dict[str, float]], after: int) -> float | None:
    """The mean training loss of the steps after one, from the finite ones of what was logged."""
    total, steps, previous = 0.0, 0, after
    for entry in history:
        if "loss" in entry and entry["step"] > after:
            length, previous = int(entry["step"]) - previous, int(entry["step"])
            if math.isfinite(entry["loss"]):
                total, steps = total + length * entry["loss"], steps + length
    return total / steps if steps else None


def build_trainer(
    config: Config,
    model: nn.Module,
    args: TrainingArguments,
    dataset: Sequences,
    evaluator: Evaluator,
    tracker: Tracker,
    origin: dict[str, Any],
    frozen: dict[str, torch.Tensor],
    facts: dict[str, Any],
) -> MicaTrainer:
    """The Trainer for a model with its adapter. Local.

    `origin`, the `frozen` tensors (rank 0's) and the `facts` of the run's beginning go into its checkpoints; a run that
    goes on takes the facts from the checkpoint instead.
    """
    if not args.use_liger_kernel:
        tile_loss(model, TILE_ON_GPU if torch.cuda.is_available() else TILE_ON_CPU)
    return MicaTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collator(config),
        evaluator=evaluator,
        tracker=tracker,
        config=config,
        origin=origin,
        frozen=frozen,
        facts=facts,
    )


def check_liger(config: Config) -> None:
    """Refuse `train.use_liger_kernel` where it would fail, or make another loss. Local. Raises: UserError."""
    if not config.train.get("use_liger_kernel"):
        return
    if not is_liger_kernel_available() or find_spec("triton") is None:
        raise UserError("train.use_liger_kernel: install liger-kernel (see the README), beside a torch with Triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("train.use_liger_kernel: Liger's kernels need a GPU")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # 0.8.5

    model, fused = load_skeleton(config.model), "fused_linear_cross_entropy"
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    known = signature(apply).parameters if apply else {}
    if fused not in known or not known[fused].default:
        raise UserError(f"train.use_liger_kernel: Liger has no fused loss for {model.config.model_type} models")
    if not (config.train.get("liger_kernel_config") or {}).get(fused, True):
        raise UserError(f"train.liger_kernel_config: without {fused} the logits would be whole")
    adapted = target_modules(model, config.adapter).values() if config.adapter.method != "full" else []
    if model.get_output_embeddings() in adapted:
        raise UserError("train.use_liger_kernel: Liger leaves out the output head's adapter; see adapter.targets")


def inference_engine(config: Config, model: nn.Module, args: TrainingArguments) -> nn.Module:
    """A DeepSpeed engine for forwards only: under ZeRO-3 it is what gathers the weights. Collective."""
    trainer = Trainer(model=model, args=args)
    deepspeed_init(trainer, num_training_steps=0, inference=True)
    engine = trainer.accelerator.prepare(model)
    mask_evaluation(config)
    return engine
