"""Standard suites (HellaSwag, TruthfulQA, MMLU, …) as lm-eval defines and marks them, by our own sharded likelihoods.

lm-eval's wrapper of transformers would give each rank questions of its own, and so different numbers of forwards, which
ZeRO-3 makes together. Here every rank takes lm-eval for the only process, and `Runner` shares the sequences.
"""

import contextlib
import functools
import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from mica_ds import comm
from mica_ds.config import EvaluateSettings
from mica_ds.encoding import without_end
from mica_ds.errors import UserError
from mica_ds.inference import Runner, Sequence
from mica_ds.scores import write_rows
from mica_ds.shelf import writing
from mica_ds.statistics import accuracy_interval, paired_interval

_MARKS = ("acc", "acc_norm")
_SEED = 1234  # lm-eval's own, for what examples precede a question

Marks = dict[str, list[float]]


def load_suites(settings: EvaluateSettings) -> dict[str, Any]:
    """lm-eval's tasks of each suite of the config, with their data. Collective.

    Nothing is asked of a hub: the data lies in `suites_data`, or in the hub's cache.
    Raises: UserError where lm-eval, a suite or its data is missing, or a suite is not multiple choice.
    """
    if not settings.suites:
        return {}
    loaded: dict[str, Any] = {}
    for is_turn in (comm.is_main(), not comm.is_main()):  # rank 0 alone converts the data into datasets' cache
        with comm.failing_together():
            if is_turn:
                loaded = open_suites(settings.suites, settings.suites_data)
    return loaded


def open_suites(names: list[str], data: Path | None) -> dict[str, Any]:
    """The same on one rank. Local. Raises: UserError."""
    manager = _manager()
    if data is not None and not data.is_dir():
        raise UserError(f"evaluate.suites_data: {data} is not a folder")
    loaded = {}
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"evaluate.suites: lm-eval knows no {name}; `lm-eval ls tasks` prints the names")
        try:
            # datasets (5.2) takes a folder of a repository's name for it, before it asks the hub or its cache.
            with contextlib.chdir(data or os.curdir):
                found = manager.load([name])
        except Exception as error:  # whatever datasets, pyarrow or the hub's client may raise
            where = f"below {data} or " if data else ""
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"evaluate.suites: the data of {name} is not {where}in the hub's cache: {reason}") from None
        for task in found["tasks"].values():
            if task.OUTPUT_TYPE != "multiple_choice":
                raise UserError(f"evaluate.suites: {name} is not multiple choice; only such suites are run")
        loaded[name] = found
    return loaded


def score_suites(loaded: dict[str, Any], runner: Runner, model: nn.Module, folder: Path, name: str) -> dict[str, Marks]:
    """Each suite's marks (`acc`, `acc_norm`), question by question; rank 0 writes them with lm-eval's samples.

    Collective. The samples go to `evaluation/NAME-SUITE.jsonl`.
    """
    if not loaded:
        return {}
    from lm_eval import evaluator

    found = {}
    for suite, tasks in loaded.items():
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(_SEED)  # each time, so that what is compared is asked with the same examples
        results = evaluator.evaluate(_model(runner, model), tasks, bootstrap_iters=0, log_samples=True)
        samples = [sample for _, of_task in sorted(results["samples"].items()) for sample in of_task]
        found[suite] = {mark: [float(sample[mark]) for sample in samples] for mark in _MARKS if mark in samples[0]}
        keys = ("doc_id", "target", "arguments", "filtered_resps", *found[suite])
        rows = [{key: sample[key] for key in keys} for sample in samples]
        with comm.failing_together():
            if comm.is_main():
                with writing(folder):
                    write_rows(rows, folder, f"{name}-{suite}")
    return found


def compare_suites(before: dict[str, Marks], after: dict[str, Marks]) -> dict[str, Any]:
    """Of each suite and mark the mean before (where measured) and after, its 95 % interval, and the paired change.

    Local. An interval is given where each question is right or wrong, which not all of TruthfulQA's are.
    """
    return {
        suite: {mark: _compared(before.get(suite, {}).get(mark), values) for mark, values in marks.items()}
        for suite, marks in after.items()
    }


@functools.cache
def _manager() -> Any:
    """lm-eval's index of its suites, which takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("evaluate.suites needs lm-eval, which launch/setup.sh installs") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def _compared(before: list[float] | None, after: list[float]) -> dict[str, Any]:
    found: dict[str, Any] = {"questions": len(after), "after": sum(after) / len(after)}
    if set(after) <= {0.0, 1.0}:
        found["interval_after"] = list(accuracy_interval(after.count(1), len(after)))
    if before is not None:
        found |= {"before": sum(before) / len(before), "change": list(paired_interval(before, after))}
    return found


def _model(runner: Runner, model: Any) -> Any:
    """What lm-eval asks for likelihoods. A function: its base class is an optional package's."""
    from lm_eval.api.model import TemplateLM

    tokenizer = runner.tokenizer
    longest = getattr(model, "module", model).config.get_text_config().max_position_embeddings

    class ShardedLM(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            """What stands before a continuation without a context."""
            return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = tokenizer(string, add_special_tokens=add_special_tokens is not False)["input_ids"]
            return without_end(ids, tokenizer)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            sequences = []
            for _, context, continuation in requests:
                ids = (context + continuation)[-longest:]
                sequences.append(Sequence(ids, [-100] * (len(ids) - len(continuation)) + continuation))
            found = runner.likelihoods(model, sequences)
            return [(-likelihood.loss, likelihood.is_greedy) for likelihood in found]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError("only multiple choice is run")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError("only multiple choice is run")

    return ShardedLM()
