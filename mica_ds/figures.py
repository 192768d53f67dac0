"""Plots of a run, as PNG files."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_loss(steps: list[int], losses: list[float], file: Path) -> None:
    """Training loss (nats per token) over optimizer steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def plot_spectrum(manifest: dict[str, Any], file: Path) -> None:
    """The singular values of one matrix of each kind, half way up the layers, with the minor band marked."""
    records = [record for record in manifest["matrices"] if "spectrum" in record]
    columns = min(4, len(records))
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, record in zip(grid, records, strict=False):
        k, r = len(record["spectrum"]), record["r"]
        axes.semilogy(range(1, k + 1), record["spectrum"], color="tab:blue")
        axes.axvspan(k - r + 1, k, color="tab:orange", alpha=0.4, label=f"minor band, r = {r}")
        axes.set_title(
            f"{_short(record['name'])} ({record['shape'][0]} × {record['shape'][1]})",
            fontsize=9,
        )
        axes.grid(alpha=0.3)
    for axes in grid[len(records) :]:
        axes.set_visible(False)
    grid[0].legend(fontsize=8, loc="lower left")
    figure.supxlabel("index", fontsize=9)
    figure.supylabel("singular value", fontsize=9)
    figure.savefig(file, dpi=150)


def _short(name: str) -> str:
    """`model.layers.15.self_attn.q_proj` as `layer 15 q_proj`."""
    parts = name.split(".")
    layer = next((f"layer {part} " for part in parts if part.isdigit()), "")
    return f"{layer}{parts[-1]}"
