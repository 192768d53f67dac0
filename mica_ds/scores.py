"""What an evaluation found, question by question, and how two of them differ."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mica_ds.files import replace_text
from mica_ds.statistics import accuracy_interval, paired_interval

FOLDER = "evaluation"

# What each measure averages over the questions that have it.
_SHARES = {"knowledge": "right", "knowledge_normalised": "right_normalised", "exact_match": "exact_match", "f1": "f1"}
_PERPLEXITIES = ("domain", "retention")
MEASURES = (*_SHARES, *_PERPLEXITIES)


@dataclass(frozen=True)
class Scores:
    """One evaluation."""

    rows: list[dict[str, Any]]
    """Each question's answer and marks, in the order of the file."""
    domain: float | None = None
    """Perplexity of the held-out text of the documents' own kind, per token."""
    retention: float | None = None
    """Perplexity of the held-out general text, per token."""

    def found(self) -> dict[str, float]:
        """The measures that the config asks for; `knowledge` is the accuracy by raw likelihood. Local."""
        shares = {key: sum(marks) / len(marks) for key in _SHARES if (marks := self.marks(key))}
        texts = {key: getattr(self, key) for key in _PERPLEXITIES if getattr(self, key) is not None}
        return shares | texts

    def marks(self, measure: str) -> list[float]:
        """Of each question that has the measure, in order: 0, 1, or with `f1` between. Local."""
        return [float(row[_SHARES[measure]]) for row in self.rows if _SHARES[measure] in row]

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold, and `Scores(**…)` takes back. Local."""
        return dataclasses.asdict(self)


def perplexity(loss: float, tokens: int) -> float:
    """exp of the mean loss (nats), up to 1e304. Local."""
    return math.exp(min(loss / tokens, 700))


def is_scored(history: list[dict[str, float]], step: int) -> bool:
    """Whether a run's log holds an evaluation of a step. Local."""
    return any(entry["step"] == step and not entry.keys().isdisjoint(MEASURES) for entry in history)


def write_rows(rows: list[dict[str, Any]], folder: Path, name: str) -> None:
    """Write `evaluation/NAME.jsonl` in a run folder, whole or not at all; nothing without rows. Local, on one rank."""
    if not rows:
        return
    file = folder / FOLDER / f"{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    replace_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def remove_rows(folder: Path, after: int) -> None:
    """Remove from a run folder what belongs to later steps than this, and to the end. Local, on one rank."""
    for file in (folder / FOLDER).glob("*.jsonl"):
        step = file.stem.removeprefix("step-")
        if file.stem == "after" or (step.isdigit() and int(step) > after):
            file.unlink()


def compare(before: Scores | None, after: Scores) -> dict[str, Any]:
    """Measures before and after (None where not measured), 95 % intervals of shares, and paired changes. Local."""
    summary: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    changes: dict[str, list[float]] = {}
    for time, scores in (("before", before), ("after", after)):
        found = scores.found() if scores else {}
        summary |= {f"{measure}_{time}": found.get(measure) for measure in MEASURES}
        for measure in found.keys() & {"knowledge", "knowledge_normalised", "exact_match"}:
            assert scores
            marks = scores.marks(measure)
            intervals[f"{measure}_{time}"] = list(accuracy_interval(marks.count(1), len(marks)))
    for measure in _SHARES:
        if before and (marks := before.marks(measure)):
            changes[measure] = list(paired_interval(marks, after.marks(measure)))
    return {**summary, "intervals": dict(sorted(intervals.items())), "changes": changes}


def course(history: list[dict[str, float]], summary: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Each measure over the steps, before, during and after training, where it was measured. Local."""
    found = {}
    for measure in MEASURES:
        if summary[f"{measure}_after"] is not None:
            points = {int(entry["step"]): entry[measure] for entry in history if measure in entry}
            found[measure] = sorted(({summary["exported_step"]: summary[f"{measure}_after"]} | points).items())
    return found
