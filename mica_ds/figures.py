"""Plots of a run: PNG files for MLflow, and the same as SVG that takes its colours from the page around it."""

import html
import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

# The colours drawn, and those that a page sets. Text has none of its own: the SVG's root gives it the page's.
_PAGE_COLOURS = {
    "#000000": "currentColor",
    "#b0b0b0": "var(--line)",
    "#7f7f7f": "var(--muted)",
    "#1f77b4": "var(--first)",
    "#ff7f0e": "var(--second)",
    "#2ca02c": "var(--third)",
}
_PANEL = (5.0, 3.0)  # inches: 360 units wide, so that text of 10 is as large on a phone
_SPECTRUM = (5.0, 3.6)


def plot_loss(steps: list[int], losses: list[float], file: Path) -> None:
    """Training loss (nats per token) over optimizer steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    _draw_loss(axes, steps, losses)
    axes.set_title("Training loss")
    figure.savefig(file, dpi=150)


def plot_scores(scores: dict[str, list[tuple[int, float]]], file: Path) -> Path | None:
    """Shares of questions and perplexities over optimizer steps, where any was measured."""
    labels = {
        "knowledge": "knowledge (accuracy)",
        "f1": "open questions (F1)",
        "domain": "domain (perplexity)",
        "retention": "retention (perplexity)",
    }
    shown = {label: scores[key] for key, label in labels.items() if key in scores}
    if not shown:
        return None
    figure = Figure(figsize=(7, 2.6 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (label, points) in zip(panels, shown.items(), strict=True):
        axes.plot(*zip(*points, strict=True), color="tab:blue", marker=".")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(file, dpi=150)
    return file


def plot_spectrum(manifest: dict[str, Any], file: Path) -> None:
    """For each kind of target over depth: σ_max, the minor band from σ_{K-R+1} to σ_K, and below it the gap at R."""
    kinds = _by_kind(manifest)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    width, height = _SPECTRUM
    figure = Figure(figsize=(width * columns, height * rows))
    for part, (kind, records) in zip(figure.subfigures(rows, columns, squeeze=False).flat, kinds.items(), strict=False):
        _draw_spectrum(part, records, top=0.92).set_title(kind)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def loss_panel(steps: list[int], losses: list[float]) -> str:
    """The training loss as SVG for a page."""
    figure = Figure(figsize=_PANEL, layout="constrained")
    _draw_loss(figure.subplots(), steps, losses)
    return _to_svg(figure, "Line chart: training loss over steps")


def accuracy_panel(shares: dict[str, float], intervals: dict[str, tuple[float, float]], chance: float) -> str:
    """Accuracies by their names as bars with their intervals, and a line where guessing is; SVG for a page."""
    figure = Figure(figsize=(_PANEL[0], 0.9 + 0.4 * len(shares)), layout="constrained")
    axes = figure.subplots()
    names = list(reversed(shares))  # the first one stands at the top
    places = range(len(names))
    colours = ["tab:blue" if place == 0 else "tab:gray" for place in places]
    axes.barh(places, [100 * shares[name] for name in names], color=colours, height=0.6, alpha=0.7)
    ends = [intervals[name] for name in names]
    axes.hlines(places, [100 * low for low, _ in ends], [100 * high for _, high in ends], color="black", linewidth=1.2)
    axes.vlines(100 * chance, -0.5, len(names) - 0.55, color="tab:orange", linestyle="--", linewidth=1.2)
    axes.text(100 * chance, len(names) - 0.5, "guessing", color="tab:orange", ha="center", va="bottom")
    axes.set(xlim=(0, 100), ylim=(-0.5, len(names)), xlabel="questions answered right, %")
    axes.set_yticks(places, names)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    told = "; ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return _to_svg(figure, f"Bar chart: questions answered right, with 95 % intervals: {told}; guessing {chance:.1%}")


def spectrum_panels(manifest: dict[str, Any]) -> dict[str, str]:
    """The plots of `plot_spectrum`, each kind of target as an SVG of its own for a page, by the kind with its shape."""
    panels = {}
    for kind, records in _by_kind(manifest).items():
        figure = Figure(figsize=_SPECTRUM)
        _draw_spectrum(figure, records, top=0.98)
        panels[kind] = _to_svg(figure, f"Line chart: largest and minor singular values of {kind} over the layers")
    return panels


def _draw_loss(axes: Axes, steps: list[int], losses: list[float]) -> None:
    axes.plot(steps, losses, color="tab:blue", marker="." if len(steps) == 1 else None)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)


def _draw_spectrum(figure: FigureBase, records: list[dict[str, Any]], top: float) -> Axes:
    """The spectrum of one kind of target over depth, and the upper one of its two axes, up to `top` of the height."""
    # Fixed, since to find where all fits takes longer than to draw it.
    place = {"left": 0.17, "right": 0.97, "bottom": 0.14, "top": top, "hspace": 0.08}
    above, below = figure.subplots(2, 1, height_ratios=[3, 1], gridspec_kw=place)
    depth = range(len(records))
    band = [record["sigma_minor"] for record in records]
    marker = "." if len(records) == 1 else None
    above.semilogy(depth, [record["sigma_max"] for record in records], color="tab:blue", marker=marker, label="σ max")
    above.fill_between(depth, [b[-1] for b in band], [b[0] for b in band], color="tab:orange", alpha=0.5)
    label = f"minor band, r = {records[0]['r']}"
    above.semilogy(depth, [b[0] for b in band], color="tab:orange", marker=marker, label=label)
    above.tick_params(labelbottom=False)
    above.set_ylabel("singular value")
    gaps = [record["relative_gap"] if record["relative_gap"] is not None else float("nan") for record in records]
    below.plot(depth, [100 * gap for gap in gaps], color="tab:green", marker=".", markersize=3)
    below.set_ylim(bottom=0)
    below.set(xlabel="layer", ylabel="gap, %")
    for axes in (above, below):
        axes.set_xlim(-0.5, len(records) - 0.5)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_label_coords(-0.17, 0.5)
    return above


def _by_kind(manifest: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The records of each kind of target, by its name and shape."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for record in manifest["matrices"]:
        kinds.setdefault(_kind(record["name"]), []).append(record)
    return {f"{kind} ({found[0]['shape'][0]} × {found[0]['shape'][1]})": found for kind, found in kinds.items()}


def _kind(name: str) -> str:
    """`model.layers.15.self_attn.q_proj` as `q_proj`; of stacked experts `experts.down_proj`, one record an expert."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[-2:]) if name[-1].isdigit() else parts[-1]


def _to_svg(figure: Figure, label: str) -> str:
    """An `svg` element for an HTML page, without what only a file needs; `label` is read to those who do not see it."""
    written = io.StringIO()
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": label,  # the ids of two figures on one page differ
            "font.sans-serif": ["DejaVu Sans"],
            "path.simplify_threshold": 1.0,  # a curve of 100,000 steps takes 35 kB
        }
    ):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    text = written.getvalue()
    drawing = text[text.index(">", text.index("<svg")) + 1 :]
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # numbered alike in every figure (matplotlib 3.11)
    for drawn, shown in _PAGE_COLOURS.items():
        drawing = drawing.replace(drawn, shown)
    width, height = (72 * inches for inches in figure.get_size_inches())
    opening = (
        f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {width:g} {height:g}" fill="currentColor">'
    )
    return opening + drawing
