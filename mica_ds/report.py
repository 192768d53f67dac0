"""What a run came to: `summary.json`, and the same figures as a table."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mica_ds.config import Config
from mica_ds.files import replace_text
from mica_ds.tracking import pages_command

SUMMARY, EVALUATION = "summary.json", "evaluation.json"


def write_summary(summary: dict[str, Any], folder: Path) -> Path:
    """Write `summary.json`, whole or not at all, and return its path. Local, on one rank."""
    return _write(summary, folder / SUMMARY)


def write_evaluation(evaluated: dict[str, Any], folder: Path) -> Path:
    """Write `evaluation.json`, whole or not at all, and return its path. Local, on one rank."""
    return _write(evaluated, folder / EVALUATION)


def _write(content: dict[str, Any], file: Path) -> Path:
    replace_text(file, json.dumps(content, indent=1))
    return file


def print_evaluation(evaluated: dict[str, Any], config: Config) -> None:
    """Print what `mica-ds evaluate` found. Local, on one rank."""
    rows = _scores(evaluated)
    for suite, marks in evaluated["suites"].items():
        for mark, found in marks.items():
            interval = found.get("interval_after")
            rows += _share(f"{suite} ({mark})", found.get("before"), found["after"], interval, found.get("change"))
    _print(f"{evaluated['checkpoint'] or 'base model'} of {config.model.path.name}", rows)


def print_summary(summary: dict[str, Any], config: Config) -> None:
    """Print the closing table. Local, on one rank."""
    _print(f"{config.adapter.method} on {config.model.path.name}", _rows(summary, config))
    # Outside the table, in one piece, to be copied.
    print(f"MLflow's pages:  {pages_command(config.tracking.uri)}", flush=True)


def _print(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False)
    for label, value in rows:
        table.add_row(label, value)
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)


def _scores(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The measures that were taken, before (where it is known) and after."""
    rows = []
    labels = {
        "knowledge": "knowledge (accuracy)",
        "knowledge_normalised": "the same, by likelihood a character",
        "exact_match": "open questions (exact match)",
        "f1": "the same, F1 of words",
    }
    for measure, label in labels.items():
        before, after = summary[f"{measure}_before"], summary[f"{measure}_after"]
        if after is not None:
            interval, change = summary["intervals"].get(f"{measure}_after"), summary["changes"].get(measure)
            rows += _share(label, before, after, interval, change)
    for measure in ("domain", "retention"):
        before, after = summary[f"{measure}_before"], summary[f"{measure}_after"]
        if after is not None:
            change = "" if before is None else f"{before:.2f} → "
            ratio = "" if before is None else f" (× {after / before:.2f})"
            rows.append((f"{measure} (perplexity)", f"{change}{after:.2f}{ratio}"))
    return rows


def _share(
    label: str, before: float | None, after: float, interval: list[float] | None, change: list[float] | None
) -> list[tuple[str, str]]:
    """A share with its 95 % interval, and the change over the same questions with its own, in points."""
    text = f"{after:.1%}" if before is None else f"{before:.1%} → {after:.1%}"
    if interval:
        text += " ({:.1f} to {:.1f})".format(*(100 * end for end in interval))
    if change:
        text += "; {:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * end for end in change))
    return [(label, text)]


def _rows(summary: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    rows = _scores(summary)
    if summary["exported_step"] != summary["steps"]:
        rows.append(("exported", f"step {summary['exported_step']}, the best"))
    share = summary["trainable_parameters"] / summary["lora_trainable_parameters"]
    rows += [
        (
            "trainable parameters",
            f"{summary['trainable_parameters']:,} ({share:.0%} of LoRA's at r = {config.adapter.r})",
        ),
        ("bases", f"{summary['basis_seconds']:.1f} s"),
        (
            "training",
            f"{summary['steps']} steps, {summary['train_seconds']:.0f} s, final loss {summary['final_loss']:.3f}",
        ),
        (
            "speed",
            f"{summary['tokens_per_second']:.0f} tokens/s on {summary['world_size']} ranks",
        ),
        ("peak memory a rank", _gigabytes(summary["peak_rss_bytes"])),
        ("of it grown while loading", _gigabytes(summary["loading_rss_bytes"])),
        ("run folder", str(config.output_dir)),
    ]
    return rows


def _gigabytes(sizes: list[int]) -> str:
    return ", ".join(f"{size / 2**30:.2f}" for size in sizes) + " GiB"
