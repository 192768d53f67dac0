"""Which step of a run was the best, and when looking on for a better one is over: from what the run has logged.

So a resume changes nothing, on any number of ranks. transformers' EarlyStoppingCallback (5.23) hears only of the
Trainer's own evaluation, which scores no questions, and knows no bound.
"""

import math

from mica_ds.config import EvaluateSettings

History = list[dict[str, float]]


def ranked_steps(history: History, settings: EvaluateSettings) -> list[int]:
    """The evaluated steps of training, the best first. Local.

    Better is who knows more, of those within `evaluate.max_forgetting`; all others come after them, by their
    forgetting. Of equals the earlier one is better.
    """
    scored = _scored(history)
    before = scored.pop(0, {})
    bound = (settings.max_forgetting or math.inf) * before.get("retention", math.inf)
    places = {}
    for step, entry in scored.items():
        retention = entry.get("retention", 0.0)
        is_within = settings.max_forgetting is None or retention <= bound  # not where it is NaN
        places[step] = (0, -_knowledge(entry)) if is_within else (1, math.inf if math.isnan(retention) else retention)
    return sorted(places, key=lambda step: (places[step], step))


def is_out_of_patience(history: History, settings: EvaluateSettings) -> bool:
    """Whether `evaluate.patience` evaluations in a row, up to the last, have not been better than the best. Local."""
    ranked = ranked_steps(history, settings)
    return bool(ranked and settings.patience) and sum(step > ranked[0] for step in ranked) >= settings.patience


def _scored(history: History) -> dict[int, dict[str, float]]:
    """The entries of evaluations that know something, by step."""
    return {int(entry["step"]): entry for entry in history if "knowledge" in entry or "f1" in entry}


def _knowledge(entry: dict[str, float]) -> float:
    """The accuracy of multiple choice; where all questions are open, F1."""
    return entry.get("knowledge", entry.get("f1", 0.0))
