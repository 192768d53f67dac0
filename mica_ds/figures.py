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
    """For each kind of target over depth: σ_max, the minor band from σ_{K-R+1} to σ_K, and below it the gap at R."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for record in manifest["matrices"]:
        kinds.setdefault(_kind(record["name"]), []).append(record)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 4.0 * rows), layout="constrained")
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 1] * rows)
    for place in range(rows * columns):
        above, below = (grid[2 * (place // columns) + part][place % columns] for part in (0, 1))
        if place >= len(kinds):
            above.set_visible(False)
            below.set_visible(False)
            continue
        kind, records = list(kinds.items())[place]
        depth = range(len(records))
        band = [record["sigma_minor"] for record in records]
        above.semilogy(depth, [record["sigma_max"] for record in records], color="tab:blue", label="σ max")
        above.fill_between(depth, [b[-1] for b in band], [b[0] for b in band], color="tab:orange", alpha=0.5)
        above.semilogy(depth, [b[0] for b in band], color="tab:orange", label=f"minor band, r = {manifest['r']}")
        above.set_title(f"{kind} ({records[0]['shape'][0]} × {records[0]['shape'][1]})", fontsize=9)
        above.tick_params(labelbottom=False)
        gaps = [record["relative_gap"] if record["relative_gap"] is not None else float("nan") for record in records]
        below.plot(depth, [100 * gap for gap in gaps], color="tab:green", marker=".", markersize=3)
        below.set_ylim(bottom=0)
        for axes in (above, below):
            axes.grid(alpha=0.3)
        if place % columns == 0:
            above.set_ylabel("singular value", fontsize=9)
            below.set_ylabel("gap at r, %", fontsize=9)
    grid[0][0].legend(fontsize=8)
    figure.supxlabel("layer", fontsize=9)
    figure.savefig(file, dpi=150)


def _kind(name: str) -> str:
    """`model.layers.15.self_attn.q_proj` as `q_proj`; of stacked experts `experts.down_proj`, one record an expert."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[-2:]) if name[-1].isdigit() else parts[-1]
