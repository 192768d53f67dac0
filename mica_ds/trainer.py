"""transformers' Trainer with our checkpoints, tracking and evaluation."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import deepspeed_init

from mica_ds import comm, signals
from mica_ds.best import is_out_of_patience, ranked_steps
from mica_ds.checkpoint import adapter_norms, restore_optimizer, restore_random_state, save_checkpoint
from mica_ds.config import Config
from mica_ds.data import Sequences
from mica_ds.errors import UserError
from mica_ds.evaluate import Evaluator
from mica_ds.loss import tile_loss
from mica_ds.memory import trim
from mica_ds.meter import Meter
from mica_ds.packing import check_separation
from mica_ds.parallelism import collator, share_batches, token_loss
from mica_ds.scores import Scores, is_scored, write_rows
from mica_ds.shelf import read_state, writing
from mica_ds.tracking import Tracker


class RunCallback(TrainerCallback):
    """Evaluates before the first step and when it is due, logs to the tracker, times the steps, and heeds signals."""

    def __init__(
        self,
        trainer: Trainer,
        evaluator: Evaluator,
        tracker: Tracker,
        meter: Meter,
        config: Config,
        facts: dict[str, Any],
    ) -> None:
        self._trainer, self._evaluator, self._tracker, self._meter = trainer, evaluator, tracker, meter
        self._config = config
        self._facts = {"train_seconds": 0.0, "skipped_steps": 0, **facts}
        self._skipped_in_a_row = 0
        self._random_state_of: Path | None = None
        self.is_preempted = False
        """Whether the run has stopped at a signal, with a checkpoint."""
        self.scores: tuple[int, Scores] | None = None
        """The last evaluation, and its step."""

    def resume(self, checkpoint: Path) -> None:
        """Go on with what an earlier start has found. Local, before training."""
        self._facts = read_state(checkpoint)["run"]
        self._meter.tokens = self._facts["tokens"]
        self._random_state_of = checkpoint

    def facts(self) -> dict[str, Any]:
        """What the run has found over all its starts: the base model's scores, seconds, skipped steps. Local."""
        seconds = self._facts["train_seconds"] + time.perf_counter() - self._started
        return {**self._facts, "train_seconds": seconds, "tokens": self._meter.tokens}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trim()
        check_separation(self._trainer.model_wrapped, self._config)
        if "before" not in self._facts:
            # The engine exists now, and an adapter adds nothing yet: this scores the base model.
            self._score(state, control)
            assert self.scores
            self._facts["before"] = self.scores[1].as_dict()
        elif self._is_due(state) and not is_scored(state.log_history, state.global_step):
            # A signal came first. Where this was the last of evaluate.patience, transformers stops after one more step.
            self._score(state, control)
        signals.defer(True)
        self._started = time.perf_counter()

    def _is_due(self, state: TrainerState) -> bool:
        """The last step is, too: which was the best shall be known from its checkpoint."""
        every, step = self._config.evaluate.every, state.global_step
        return every > 0 and (step % every == 0 or step == state.max_steps)

    def _score(self, state: TrainerState, control: TrainerControl) -> None:
        step, scores = state.global_step, self._evaluator.score(self._trainer.model_wrapped)
        self._tracker.metrics(scores.found(), step)
        state.log_history.append({**scores.found(), "step": step})
        self.scores = step, scores
        with comm.failing_together():
            if comm.is_main():
                with writing(self._config.output_dir):
                    write_rows(scores.rows, self._config.output_dir, f"step-{step:06d}" if step else "before")
        control.should_save |= self.ranked(state)[:1] == [step]
        if step < state.max_steps and is_out_of_patience(state.log_history, self._config.evaluate):
            control.should_training_stop = True
            comm.say(
                f"evaluation: the last {self._config.evaluate.patience} were no better than the best: training stops"
            )

    def ranked(self, state: TrainerState) -> list[int]:
        """The evaluated steps, the best first, where the best one is exported. Local."""
        if self._config.checkpoint.export != "best":
            return []
        return ranked_steps(state.log_history, self._config.evaluate)

    # Random states belong where they were saved: before an epoch's data loader draws its seed, or after it.
    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if float(state.epoch).is_integer():
            self._restore_random_state()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._restore_random_state()
        comm.at(f"step {state.global_step + 1}")
        self._meter.begin_step()

    def _restore_random_state(self) -> None:
        if self._random_state_of:
            restore_random_state(self._random_state_of)
            self._random_state_of = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._meter.end_step()
        self._count_skipped(state.global_step)
        self.is_preempted = comm.sum_(torch.tensor([float(signals.received())])).item() > 0
        if self._is_due(state) and not self.is_preempted:
            started = time.perf_counter()
            self._score(state, control)
            self._started += time.perf_counter() - started  # it is not training
        control.should_training_stop |= self.is_preempted
        control.should_save |= control.should_training_stop
        control.should_log |= control.should_save

    def _count_skipped(self, step: int) -> None:
        # DeepSpeed (0.19.8) leaves out the update where the norm of all ranks' gradients is not finite, in any dtype.
        if not self._trainer.accelerator.optimizer_step_was_skipped:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        self._facts["skipped_steps"] += 1
        self._tracker.metrics({"skipped_steps": self._facts["skipped_steps"]}, step=step)
        comm.say(f"warning: step {step} is skipped: its loss or gradient is not finite")
        if self._skipped_in_a_row == self._config.checkpoint.max_skipped:
            error = UserError(
                f"{self._skipped_in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not "
                "finite: lower train.learning_rate, or set resume to an older checkpoint"
            )
            error.agreed = True
            raise error

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.is_preempted:
            signals.defer(False)
        comm.at("")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:  # transformers' closing entry has none, and figures of this start alone
            perplexity = math.exp(min(logs["loss"], 700))
            self._tracker.metrics({**logs, "perplexity": perplexity, **self._meter.read()}, step=state.global_step)
            # transformers (5.23) subtracts the sum from itself, and after one NaN every later loss would be NaN.
            self._trainer._tr_loss.zero_()


class MicaTrainer(Trainer):
    """Writes and reads our checkpoints instead of DeepSpeed's, which hold the frozen base but not the frozen B.

    Both methods are private, but no callback can replace them (transformers 5.23).
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
        self._offloads_activations = config.model.offload_activations
        self._keep, self._origin, self._frozen, self._tracker = config.checkpoint.keep, origin, frozen, tracker
        if self.args.parallelism_config:
            self.loss_is_scaled_for_ga = True  # see `compute_loss`
        self.saved: Path | None = None
        """The last checkpoint."""
        self._saved_step = 0
        self._meter = Meter(cast(nn.Module, self.model), config.data.sequence_length)
        self.run = RunCallback(self, evaluator, tracker, self._meter, config, facts)
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
        if not self.args.parallelism_config:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, labels=inputs["shift_labels"], num_items_in_batch=num_items_in_batch)
        return token_loss(outputs.loss)

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
        if self.args.parallelism_config:
            share_batches(train_dataloader, self.args.parallelism_config.sp_size)
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
    if not tile_loss(model):
        comm.say("loss: the logits of a micro-batch are made whole, since the output head trains or bends them")
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


def inference_engine(model: nn.Module, args: TrainingArguments) -> nn.Module:
    """A DeepSpeed engine for forwards only: under ZeRO-3 it is what gathers the weights. Collective."""
    trainer = Trainer(model=model, args=args)
    deepspeed_init(trainer, num_training_steps=0, inference=True)
    return trainer.accelerator.prepare(model)
