"""What a run leaves at its end: plots, report and summary, in its folder and in MLflow."""

from pathlib import Path
from typing import Any

from mica_ds import figures
from mica_ds.basis import Basis
from mica_ds.checkpoint import read_history
from mica_ds.config import Config
from mica_ds.page import write_page
from mica_ds.report import write_summary
from mica_ds.scores import course
from mica_ds.shelf import read_state
from mica_ds.tracking import Tracker


def trained(checkpoint: Path) -> dict[str, Any]:
    """The figures of the training itself, over all starts of the run. Local."""
    state, history = read_state(checkpoint), read_history(checkpoint)
    return {
        **{key: value for key, value in state["run"].items() if key != "before"},
        "tokens_per_second": state["run"]["tokens"] / state["run"]["train_seconds"],
        "final_loss": [entry["loss"] for entry in history if "loss" in entry][-1],
        "steps": state["step"],
    }


def record(
    config: Config,
    summary: dict[str, Any],
    history: list[dict[str, float]],
    basis: Basis | None,
    exported: Path,
    tracker: Tracker,
) -> None:
    """Write the plots, the report and at last the summary, and log them with the rest of the run. Local, on rank 0."""
    folder = config.output_dir
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figures.plot_loss(
        [int(step) for step, _ in losses],
        [loss for _, loss in losses],
        folder / "loss.png",
    )
    tracker.artifact(folder / "loss.png")
    if scores := figures.plot_scores(course(history, summary), folder / "scores.png"):
        tracker.artifact(scores)
    if basis:
        figures.plot_spectrum(basis.manifest, folder / "spectrum.png")
        tracker.artifact(folder / "spectrum.png")
    if config.adapter.method != "full":  # a whole model stays in the run folder
        tracker.artifact(exported, under="adapter")
        if config.tracking.register_as:
            tracker.register(config.tracking.register_as, under="adapter")
    numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    ranks = {f"{key}_max": max(value) for key, value in summary.items() if isinstance(value, list)}
    ends = {
        f"{key}_{end}": value
        for key, (low, high) in summary["intervals"].items()
        for end, value in (("low", low), ("high", high))
    }
    changes = {
        f"{key}_change{end}": value
        for key, found in summary["changes"].items()
        for end, value in zip(("", "_low", "_high"), found, strict=True)
    }
    tracker.metrics({**numbers, **ranks, **ends, **changes}, step=summary["steps"])
    tracker.artifact(write_page(config, summary, history, basis.manifest if basis else None))
    tracker.artifact(write_summary(summary, folder))
