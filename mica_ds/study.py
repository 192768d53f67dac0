"""The verb `study`: which learning rate suits each arm, how the arms then compare, and what that supports."""

import shutil
import sys
import time
from pathlib import Path

from mica_ds import signals
from mica_ds.account import TABLE, warnings, write_account
from mica_ds.arms import Run, StudySettings, check_folder, run_config, sweep, trials
from mica_ds.crew import LOG, carry_out, last_words
from mica_ds.findings import Result, choices, read_results, read_run, standings, write_results
from mica_ds.parent import Parent

RESULTS = "results.jsonl"


def report(study: StudySettings, results: Path) -> None:
    """Make table, words and plots again from results alone, beside them. Local. Raises: UserError."""
    for path in write_account(study, read_results(results), results.parent):
        print(f"study: {path}")


def conduct(study: StudySettings) -> bool:
    """Sweep each arm's learning rate, run its seeds at the best, and compare; whether no run has failed. Local.

    What is finished stays, and what was begun goes on. Raises: UserError; at a signal Preempted or KeyboardInterrupt,
    once all runs have ended.
    """
    signals.watch()
    for run in sweep(study):
        check_folder(study, run)
    folder = study.output_dir
    with Parent(study, run_config(study, sweep(study)[0]).tracking) as parent:
        failed = _carry_out(study, sweep(study), parent)
        chosen = choices(study, _finished(sweep(study)))
        for arm, choice in chosen.items():
            print(f"study: learning rate of {arm}: {choice.learning_rate:g}")
        for warning in warnings(study, chosen):
            print(f"warning: {warning}")
        final = trials(study, {arm: choice.learning_rate for arm, choice in chosen.items()})
        failed += _carry_out(study, final, parent)
        results = _finished([*sweep(study), *final])
        write_results(results, folder / RESULTS)
        parent.artifact(folder / RESULTS)
        if failed:
            parent.is_failed = True
            print(f"study: {len(failed)} runs failed; the same command tries them again", file=sys.stderr)
            return False
        for path in write_account(study, results, folder):
            parent.artifact(path)
        for arm, standing in standings(study, results).items():
            found = {"knowledge": standing.knowledge[0], "forgetting": standing.forgetting}
            parent.metrics({f"{key}.{arm}": value for key, value in found.items()})
        print((folder / TABLE).read_text())
    return True


def _carry_out(study: StudySettings, runs: list[Run], parent: Parent) -> list[Run]:
    """Have these runs done, and return those that failed."""
    failed: list[Run] = []
    started, ended = time.monotonic(), 0

    def on_end(run: Run, code: int) -> None:
        nonlocal ended
        ended += 1
        place = f"study: [{ended}/{len(runs)}] {run}"
        if code or not _is_finished(run):
            failed.append(run)
            print(f"{place} failed: {last_words(run.folder)} ({run.folder / LOG})", file=sys.stderr, flush=True)
            return
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # what is exported is all that is still needed
        result = read_run(run)
        found = f"{result.knowledge:.1%} right, perplexity × {result.forgetting:.2f}, {result.train_seconds:.0f} s"
        print(f"{place}: {found} ({(time.monotonic() - started) / 60:.0f} min)", flush=True)

    for run in runs:
        check_folder(study, run)
    carry_out(study, runs, parent.id, _is_finished, on_end)
    return failed


def _is_finished(run: Run) -> bool:
    """Whether the run folder holds all: the summary is written last."""
    return (run.folder / "summary.json").exists()


def _finished(runs: list[Run]) -> list[Result]:
    return [read_run(run) for run in runs if _is_finished(run)]
