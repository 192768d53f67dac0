"""What a run leaves in its folder and in MLflow: settings when it begins; plots, report and summary at its end."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from mica_ds import comm, figures
from mica_ds.about import environment
from mica_ds.basis import Basis
from mica_ds.checkpoint import read_history
from mica_ds.config import Config
from mica_ds.errors import UserError
from mica_ds.files import replace_text, replacing
from mica_ds.overlap import counts, write_report
from mica_ds.page import write_page
from mica_ds.report import SUMMARY, write_summary
from mica_ds.resume import note_job
from mica_ds.scores import course, remove_rows
from mica_ds.settings import save_settings
from mica_ds.shelf import read_state, remove_checkpoints, writing
from mica_ds.tracking import Tracker


def open_run_folder(config: Config) -> Path:
    """Make the run folder, and check on every rank that it can be written. Collective. Raises: UserError."""
    folder = config.output_dir
    with comm.failing_together():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for inner in (folder, folder / "checkpoints"):
                if os.path.lexists(inner):
                    probe = inner / f".probe-{socket.gethostname()}-{os.getpid()}"
                    probe.touch()
                    probe.unlink()
        except OSError as error:
            raise UserError(f"output_dir: {error.filename or folder} cannot be written: {error.strerror}") from None
    return folder


def record_beginning(config: Config, about_data: dict[str, Any], tracker: Tracker) -> None:
    """Write the settings, the environment and what was read, and log them. Collective. Raises: UserError."""
    folder = config.output_dir
    with comm.failing_together():
        if comm.is_main():
            with writing(folder):
                save_settings(config, folder / "config.yaml")
                replace_text(folder / "environment.txt", environment())
                tracker.artifact(write_report(about_data, folder))
            for file in (folder / "config.yaml", folder / "environment.txt", config.deepspeed):
                tracker.artifact(file)
            tracker.metrics(counts(about_data))


def discard_after(step: int, config: Config) -> None:
    """Begin: remove what an earlier start has left of later steps, and its summary. Collective. Raises: UserError."""
    folder = config.output_dir
    with comm.failing_together():
        if comm.is_main():
            with writing(folder):
                # Later ones than the newest good one are damaged.
                remove_checkpoints(folder / "checkpoints", after=step, are_damaged=config.resume == "auto")
                remove_rows(folder, after=step)
                (folder / SUMMARY).unlink(missing_ok=True)
                note_job(folder)


@torch.no_grad()
def save_probe(model: nn.Module, ids: list[int], folder: Path) -> None:
    """Save a few token ids and the trained model's logits on them, against which a reload is checked. Collective.

    Raises: UserError where the disk is full or fails.
    """
    model.eval()
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)
    logits = model(input_ids=input_ids, use_cache=False).logits
    found = {"input_ids": input_ids.cpu(), "logits": logits.float().cpu()}
    with comm.failing_together():
        if comm.is_main():
            with writing(folder), replacing(folder / "probe.safetensors") as unfinished:
                save_file(found, unfinished)


def trained(checkpoint: Path) -> dict[str, Any]:
    """The figures of the training itself, over all starts of the run. Local."""
    state, history = read_state(checkpoint), read_history(checkpoint)
    return {
        **{key: value for key, value in state["run"].items() if key != "before"},
        "tokens_per_second": state["run"]["tokens"] / state["run"]["train_seconds"],
        "final_loss": [entry["loss"] for entry in history if "loss" in entry][-1],
        "steps": state["step"],
    }


def record_end(
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
        under = f"adapter/step-{summary['steps']:06d}"  # a run that goes on later changes no version that is registered
        tracker.artifact(exported, under=under)
        if config.tracking.register_as:
            tracker.register(config.tracking.register_as, under=under)
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
