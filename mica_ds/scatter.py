"""The two plots of a study: knowledge against forgetting, and against the number of trained parameters."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mica_ds.statistics import Interval

# Okabe and Ito's colours, which the colour-blind tell apart; each comes with a marker of its own.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_SIDE = 1.12  # the ratio by which arms with as many parameters as another stand side by side


@dataclass(frozen=True)
class Arm:
    """What the plots show of an arm: of each seed the ratio of perplexities and the share of the questions, …"""

    ratios: list[float]
    shares: list[float]
    knowledge: Interval
    """… their mean share with the ends of its interval, …"""
    parameters: int
    """… and how many parameters were trained."""


def plot_forgetting(arms: dict[str, Arm], base: Interval, bound: float, file: Path) -> None:
    """Knowledge over the ratio of perplexities: each run, each arm's mean with its interval, and the base model."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.axvline(bound, color="black", linestyle=":", linewidth=1.2, label="bound for a rate to be chosen")
    _draw(axes, arms, base, [arm.ratios for arm in arms.values()])
    axes.set_xlabel("perplexity of general text, after to before")
    figure.savefig(file, dpi=150)


def plot_parameters(arms: dict[str, Arm], base: Interval, file: Path) -> None:
    """Knowledge over the number of trained parameters: each run, and each arm's mean with its interval."""
    counts = [arm.parameters for arm in arms.values()]
    places = []
    for number, count in enumerate(counts):
        twins = [twin for twin, other in enumerate(counts) if other == count]
        places.append([count * _SIDE ** (twins.index(number) - (len(twins) - 1) / 2)])
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    _draw(axes, arms, base, places)
    ticks = sorted(set(counts))
    axes.set_xticks(ticks, [f"{count / 1e6:.3g}" for count in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("millions of trained parameters (arms with as many as another stand side by side)")
    figure.savefig(file, dpi=150)


def _draw(axes: Axes, arms: dict[str, Arm], base: Interval, places: list[list[float]]) -> None:
    """All arms, each at its runs' places or at one for all, and the geometric mean of these."""
    axes.axhline(100 * base[0], color="tab:gray", linestyle="--", linewidth=1.2, label="base model")
    for number, (name, arm) in enumerate(arms.items()):
        look: dict[str, Any] = {"color": _COLOURS[number % 6], "marker": _MARKERS[(number + number // 6) % 6]}
        xs = places[number] * (len(arm.shares) // len(places[number]))
        axes.scatter(xs, [100 * share for share in arm.shares], s=26, alpha=0.5, linewidths=0, **look)
        mean, low, high = (100 * value for value in arm.knowledge)
        axes.errorbar(
            math.exp(sum(map(math.log, xs)) / len(xs)),
            mean,
            [[mean - low], [high - mean]],
            label=name,
            markersize=8,
            markeredgecolor="black",
            markeredgewidth=0.6,
            capsize=3,
            linewidth=1.2,
            **look,
        )
    axes.set_ylabel("questions answered right, %")
    axes.grid(alpha=0.3)
    legend = axes.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize=8,
        title="small: one seed;\nlarge: mean of the seeds,\n95 % over questions, of\neach arm alone; arms are\n"
        "compared by the table's\npaired columns",
    )
    legend.get_title().set_fontsize(8)
