"""What is done around the steps of training: evaluation, log entries, timing, and what a signal asks for."""

import copy
import math
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mica_ds import comm, signals
from mica_ds.best import is_out_of_patience, ranked_steps
from mica_ds.checkpoint import restore_random_state
from mica_ds.config import Config
from mica_ds.errors import UserError
from mica_ds.evaluate import Evaluator
from mica_ds.memory import trim
from mica_ds.meter import Meter
from mica_ds.packing import check_separation
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
        weights: str,
        facts: dict[str, Any],
    ) -> None:
        """`weights` is the fingerprint of the base model's."""
        self._trainer, self._evaluator, self._tracker, self._meter = trainer, evaluator, tracker, meter
        self._config, self._weights = config, weights
        self._facts = {"train_seconds": 0.0, "skipped_steps": 0, **facts}
        self._skipped_in_a_row = 0
        self._is_out_of_patience = False
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
        """What the run has found over all its starts: seconds, skipped steps, the base's scores or their key. Local."""
        seconds = self._facts["train_seconds"] + time.perf_counter() - self._started
        return {**self._facts, "train_seconds": seconds, "tokens": self._meter.tokens}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trim()
        check_separation(self._trainer.model_wrapped, self._config)
        if "before" not in self._facts:  # the engine exists now
            engine, evaluator = self._trainer.model_wrapped, self._evaluator
            key = evaluator.base_key(engine, self._weights)
            before = evaluator.score_base(engine, self._weights, self._config.data.cache)
            # No later start of a full fine-tuning can score the base again.
            self._facts["before"] = before.as_dict() if self._config.adapter.method == "full" else key
            self._note(before, state, control)
        elif self._is_due(state) and not is_scored(state.log_history, state.global_step):
            # A signal came first. Where this was the last of evaluate.patience, training stops after one more step.
            self._note(self._evaluator.score(self._trainer.model_wrapped), state, control)
        _forget_order(self._trainer.model_wrapped)
        signals.defer(True)
        self._started = time.perf_counter()

    def _is_due(self, state: TrainerState) -> bool:
        """The last step is, too: which was the best shall be known from its checkpoint."""
        every, step = self._config.evaluate.every, state.global_step
        return every > 0 and (step % every == 0 or step == state.max_steps)

    def _note(self, scores: Scores, state: TrainerState, control: TrainerControl) -> None:
        """Record an evaluation of the current step, and do what it asks for."""
        step = state.global_step
        self._tracker.metrics(scores.found(), step)
        state.log_history.append({**scores.found(), "step": step})
        self.scores = step, scores
        with comm.failing_together():
            if comm.is_main():
                with writing(self._config.output_dir):
                    write_rows(scores.rows, self._config.output_dir, f"step-{step:06d}" if step else "before")
        control.should_save |= self.ranked(state)[:1] == [step]
        if step < state.max_steps and is_out_of_patience(state.log_history, self._config.evaluate):
            self._is_out_of_patience = True  # for the end of a step: within one, transformers would leave it half done
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
        self.is_preempted = _is_to_stop(state.global_step)
        if self._is_due(state) and not self.is_preempted:
            started = time.perf_counter()
            scores = self._evaluator.score(self._trainer.model_wrapped)
            heed_signals(state.global_step)
            self._note(scores, state, control)
            self._started += time.perf_counter() - started  # it is not training
            self.is_preempted = _is_to_stop(state.global_step)
        control.should_training_stop |= self.is_preempted or self._is_out_of_patience
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
            raise UserError(
                f"{self._skipped_in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not "
                "finite: lower train.learning_rate, or set resume to an older checkpoint",
                agreed=True,
            )

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


def _forget_order(engine: Any) -> None:
    """Have DeepSpeed learn anew the order of modules, which so far was that of forwards alone.

    It keeps for good what it has let go of after each module at each place in that order (0.19.8, an `lru_cache` by
    coordinator): after a forward alone every weight, and so training would gather each of them twice a step.
    """
    offload = engine.optimizer.parameter_offload
    coordinator = copy.copy(offload.get_param_coordinator())
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    offload.param_coordinator = coordinator


def heed_signals(step: int) -> None:
    """Have all ranks stop after this step where this one has got a signal. Local, before the step's last collective.

    What one rank says before a collective, all know after it: so none has to be made to ask for it.
    """
    if signals.received():
        comm.agreed("last step", str(step))


def _is_to_stop(step: int) -> bool:
    """Whether all ranks stop after this step; one that is ahead may have said so of the next. Local."""
    last = comm.agreed("last step")
    return last != "" and int(last) <= step
