"""A program for the tests: `mica-ds` that writes down what each step sees, and comes to grief where it is told to.

WATCH holds JSON: `folder` for the notes, one file a rank, and lists of the rows that were read for it, of a Llama's
layers that ran while training, and of the micro-batches whose activations were offloaded;
`parts`: whether to note the elements of what trains, each whole and this rank's of its gradient, master and moments;
`infinite_loss`: the steps whose loss is infinite on the last rank; `infinite_gradient`: those whose gradient is;
`signal`: [number, step], sent to the last rank by itself; `signal_in_backward`, `signal_in_update` and
`signal_in_evaluation`: the same, later in the step, or in the evaluation after it.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import transformers

from mica_ds import cli, comm


def main() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad, safe_get_local_optimizer_state
    from transformers.models.llama.modeling_llama import LlamaMLP

    from mica_ds import data, evaluate, trainer  # imports DeepSpeed, which wants to be started first

    watch = json.loads(os.environ["WATCH"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    notes = Path(watch["folder"]) / f"{comm.rank()}.jsonl"
    is_last = comm.rank() == comm.world_size() - 1
    compute_loss, plain_loss = trainer.MicaTrainer.compute_loss, transformers.Trainer.compute_loss
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
        if is_last and step in watch.get("infinite_gradient", []):
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    def watched_plain_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain_loss(self, *args, **kwargs)
        return loss + torch.inf if is_last and steps[-1] in watch.get("infinite_loss", []) else loss

    def watched_read(self: Any, indices: list[int]) -> Any:
        with notes.with_suffix(".read").open("a") as file:
            file.writelines(f"{index}\n" for index in indices)
        return read(self, indices)

    def note_calls(owner: Any, name: str, suffix: str) -> None:
        original = getattr(owner, name)

        def noting(self: Any, *args: Any) -> Any:
            if getattr(self, "training", True):
                with notes.with_suffix(suffix).open("a") as file:
                    file.write(f"{steps[-1]}\n")
            return original(self, *args)

        setattr(owner, name, noting)

    def watched_score(self: Any, engine: Any) -> Any:
        signal_at("signal_in_evaluation")
        return score(self, engine)

    def watched_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        signal_at("signal_in_update")
        if watch.get("parts") and steps[-1] == 2:  # when there are moments
            trained = [p for group in self.fp16_groups for p in group]
            parts = [[p, safe_get_local_grad(p), safe_get_local_fp32_param(p)] for p in trained]
            for own in parts:
                own.extend(safe_get_local_optimizer_state(own[0], moment) for moment in ("exp_avg", "exp_avg_sq"))
            sizes = [[p.ds_numel, *(part.numel() for part in own)] for p, *own in parts]
            notes.with_suffix(".parts").write_text(json.dumps(sizes))
        return update(self, *args, **kwargs)

    note_calls(LlamaMLP, "forward", ".layers")
    note_calls(torch.autograd.graph.save_on_cpu, "__enter__", ".offloads")
    Zero.step = watched_update
    evaluate.Evaluator.score = watched_score
    transformers.Trainer.compute_loss = watched_plain_loss
    trainer.MicaTrainer.compute_loss = watched_loss
    data.Sequences.__getitems__ = watched_read


if __name__ == "__main__":
    start = comm.start

    def start_watched(is_watched: bool) -> None:
        start(is_watched)
        main()

    comm.start = start_watched
    cli.app(prog_name="mica-ds")
