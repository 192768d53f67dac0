"""A program for the tests: `mica-ds` that writes down what each step sees, and comes to grief where it is told to.

WATCH holds JSON: `folder` for the notes, and a list of the rows that were read for it, one file of each a rank;
`not_finite`: the steps whose loss is NaN on the last rank; `infinite`: those whose gradient is infinite there;
`signal`: [number, step], sent to the last rank by itself; `signal_in_backward`, `signal_in_update` and
`signal_in_evaluation`: the same, later in the step, or in the evaluation after it.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from mica_ds import cli, comm


def main() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

    from mica_ds import data, evaluate, trainer  # imports DeepSpeed, which wants to be started first

    watch = json.loads(os.environ["WATCH"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    notes = Path(watch["folder"]) / f"{comm.rank()}.jsonl"
    is_last = comm.rank() == comm.world_size() - 1
    compute_loss = trainer.MicaTrainer.compute_loss
    read = data.Sequences.__getitems__  # by which a data loader reads, and nothing else
    score, update, steps = evaluate.Evaluator.score, Zero.step, [0]

    def signal_at(moment: str) -> None:
        if is_last and watch.get(moment, [0, None])[1] == steps[-1]:
            os.kill(os.getpid(), watch[moment][0])

    def watched_loss(self: Any, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step + 1
        steps.append(step)
        with notes.open("a") as file:
            file.write(json.dumps({"step": step, **{key: rows.tolist() for key, rows in inputs.items()}}) + "\n")
        signal_at("signal")
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        loss.register_hook(lambda gradient: signal_at("signal_in_backward"))
        if is_last and step in watch.get("infinite", []):
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss * torch.nan if is_last and step in watch.get("not_finite", []) else loss

    def watched_read(self: Any, indices: list[int]) -> Any:
        with notes.with_suffix(".read").open("a") as file:
            file.writelines(f"{index}\n" for index in indices)
        return read(self, indices)

    def watched_score(self: Any, engine: Any) -> Any:
        signal_at("signal_in_evaluation")
        return score(self, engine)

    def watched_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        signal_at("signal_in_update")
        return update(self, *args, **kwargs)

    Zero.step = watched_update
    evaluate.Evaluator.score = watched_score
    trainer.MicaTrainer.compute_loss = watched_loss
    data.Sequences.__getitems__ = watched_read


if __name__ == "__main__":
    start = comm.start

    def start_watched() -> None:
        start()
        main()

    comm.start = start_watched
    cli.app(prog_name="mica-ds")
