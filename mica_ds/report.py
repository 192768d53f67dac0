"""What a run came to: `summary.json`, and the same figures as a table."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mica_ds.config import Config
from mica_ds.files import replacing
from mica_ds.tracking import pages_command

SUMMARY = "summary.json"


def write_summary(summary: dict[str, Any], folder: Path) -> Path:
    """Write `summary.json`, whole or not at all, and return its path. Local, on one rank."""
    file = folder / SUMMARY
    with replacing(file) as partial:
        partial.write_text(json.dumps(summary, indent=1))
    return file


def print_summary(summary: dict[str, Any], config: Config) -> None:
    """Print the closing table. Local, on one rank."""
    table = Table(title=f"{config.adapter.method} on {config.model.path.name}", show_header=False)
    for label, value in _rows(summary, config):
        table.add_row(label, value)
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    # Outside the table, in one piece, to be copied.
    print(f"MLflow's pages:  {pages_command(config.tracking.uri)}", flush=True)


def _rows(summary: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    rows = []
    if summary["knowledge_after"] is not None:
        before, after = summary["knowledge_before"], summary["knowledge_after"]
        rows.append(("knowledge (accuracy)", f"{before:.1%} → {after:.1%}"))
    if summary["retention_after"] is not None:
        before, after = summary["retention_before"], summary["retention_after"]
        rows.append(
            (
                "retention (perplexity)",
                f"{before:.2f} → {after:.2f} (× {after / before:.2f})",
            )
        )
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
