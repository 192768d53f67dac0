"""The verb `study`: which learning rate suits each arm, how the arms then compare, and what that supports."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from mica_ds import comm
from mica_ds.account import TABLE, warnings, write_account
from mica_ds.arms import Run, StudySettings, check_folder, run_config, sweep, trials
from mica_ds.crew import LOG, carry_out, last_words, slots
from mica_ds.errors import Preempted, UserError
from mica_ds.findings import Result, check_budget, choices, read_results, read_run, standings, write_results
from mica_ds.overlap import REPORT
from mica_ds.scores import FOLDER
from mica_ds.settings import save_settings
from mica_ds.shelf import writing
from mica_ds.tracking import Tracker

RESULTS = "results.jsonl"


def report(study: StudySettings, results: Path) -> None:
    """Make table, words and plots again from results alone, beside them. Local. Raises: UserError."""
    found = read_results(results)
    with writing(results.parent):
        for path in write_account(study, found, results.parent):
            comm.say(f"study: {path}")


def conduct(study: StudySettings) -> None:
    """Sweep each arm's learning rate, run its seeds at the best, and compare.

    What is finished stays, and what was begun goes on. Local. Raises: UserError, also where a run has
    failed; Preempted at a signal or an interrupt, once all runs have ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a study starts its runs by itself: start it without a launcher, and set `launch` and `ranks`")
    slots(study)  # which says where the GPUs are too few
    for run in sweep(study):
        check_folder(study, run)
        if run.is_finished:
            read_run(run)  # which says what is wrong with one
    folder, tracking = study.output_dir, run_config(study, sweep(study)[0]).tracking
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_settings(study, folder / "study.yaml")
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}") from None
    with Tracker(folder, tracking, study.model_dump(mode="json")) as tracker:
        tracker.artifact(folder / "study.yaml")
        done: list[Run] = []
        try:
            failed = _carry_out(study, sweep(study), tracker.id, done)
            chosen = choices(study, _finished(sweep(study)))
            for arm, choice in chosen.items():
                comm.say(f"study: the learning rate of {arm} is {choice.learning_rate:g}")
            for warning in warnings(study, chosen):
                comm.say(f"warning: {warning}")
            final = trials(study, {arm: choice.learning_rate for arm, choice in chosen.items()})
            failed += _carry_out(study, final, tracker.id, done)
        except KeyboardInterrupt as stop:
            raise stop if isinstance(stop, Preempted) else Preempted("interrupted; start again to go on") from None
        results = _finished([*sweep(study), *final])
        with writing(folder):
            write_results(results, folder / RESULTS)
        tracker.artifact(folder / RESULTS)
        if failed:
            raise UserError(f"{len(failed)} runs failed, as said above; the same command tries them again")
        with writing(folder):
            for path in write_account(study, results, folder):
                tracker.artifact(path)
        for arm, standing in standings(study, results).items():
            found = {"knowledge": standing.knowledge[0], "forgetting": standing.forgetting}
            tracker.metrics({f"{key}.{arm}": value for key, value in found.items()})
        comm.say((folder / TABLE).read_text())


def _carry_out(study: StudySettings, runs: list[Run], parent: str, done: list[Run]) -> list[Run]:
    """Have these runs done, each then added to what is `done`, and return those that failed.

    Raises: UserError, which ends the others, as soon as one had not the same data and budget as those done before.
    """
    failed: list[Run] = []
    started, ended = time.monotonic(), 0

    def on_end(run: Run, code: int) -> None:
        nonlocal ended
        ended += 1
        place = f"study: [{ended}/{len(runs)}] {run}"
        if code or not run.is_finished:
            failed.append(run)
            comm.say(f"{place} failed: {last_words(run.folder)} ({run.folder / LOG})")
            return
        try:
            result = read_run(run)
        except UserError as error:
            failed.append(run)
            comm.say(f"{place} failed: {error}")
            return
        done.append(run)
        _check_sources(done)
        check_budget(_finished(done))
        if run_config(study, run).adapter.method == "full":  # one is three models, and the export has all that is used
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        found = f"{result.knowledge:.1%} right, perplexity × {result.forgetting:.2f}, {result.train_seconds:.0f} s"
        if result.has_diverged:
            found = "diverged: its loss was not finite at the end"
        comm.say(f"{place}: {found} (after {(time.monotonic() - started) / 60:.0f} min)")

    for run in runs:
        check_folder(study, run)
    carry_out(study, runs, parent, on_end)
    return failed


def _check_sources(runs: list[Run]) -> None:
    """Refuse runs that read other text from the same source, or other questions, or marked these by another key."""
    first: dict[str, tuple[Run, Any]] = {}
    for run in runs:
        with (run.folder / FOLDER / "before.jsonl").open(encoding="utf-8") as file:  # texts hold other ends of lines
            rows = list(map(json.loads, file))
        sources = json.loads((run.folder / REPORT).read_text())["sources"]
        read = {source["path"]: source["digest"] for source in sources}
        read["evaluate.questions"] = [(row["question"], row["answer"]) for row in rows if "question" in row]
        for what, found in read.items():
            other, theirs = first.setdefault(what, (run, found))
            if found != theirs:
                raise UserError(
                    f"not the same data: {what} was changed between {other} and {run}; put it back as it was, and "
                    "remove the folders of the runs that read the other"
                )


def _finished(runs: list[Run]) -> list[Result]:
    return [read_run(run) for run in runs if run.is_finished]
