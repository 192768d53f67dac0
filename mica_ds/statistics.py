"""How sure a share of questions is, and a change in it over the same questions: 95 % intervals."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

_Z = NormalDist().inv_cdf(0.975)

Interval = tuple[float, float, float]
"""A mean and the ends of its 95 % interval."""


def accuracy_interval(right: int, questions: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share of so many questions that were answered right. Local.

    Raises: ValueError without questions.
    """
    from scipy.stats import binomtest  # half a second, which only the rank that reports spends

    if not questions:
        raise ValueError("an interval needs at least one question")
    interval = binomtest(right, questions).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def paired_interval(before: Sequence[float], after: Sequence[float]) -> Interval:
    """The mean of `after - before` over the same questions, and its 95 % interval. Local.

    A question's score is 0 or 1, or a mean of such over several seeds. The interval is Bonett and Price's (2012) for
    paired proportions: the normal one after two questions have been added, of which one got better and one worse by 1.
    So it has a width where all questions changed alike, or not at all, and keeps its level for few of them. It is about
    the choice of questions; what differs from seed to seed is not in it.

    Raises: ValueError without questions, or where the scores are not as many, or outside of 0 to 1.
    """
    scores = np.array([before, after], dtype=np.float64)  # refuses two lengths
    if not scores.size or scores.min() < 0 or scores.max() > 1:
        raise ValueError("paired scores must be one or more, from 0 to 1")
    differences = scores[1] - scores[0]
    added = np.append(differences, [1.0, -1.0])
    centre, half = float(added.mean()), _Z * float(added.std()) / len(added) ** 0.5
    return float(differences.mean()), max(centre - half, -1.0), min(centre + half, 1.0)


def mean_interval(scores: Sequence[float]) -> Interval:
    """The mean of the questions' scores, and its 95 % interval. Local.

    A score is 0 or 1, or a mean of such over several seeds. The interval is Agresti and Coull's: the normal one after
    two questions answered right and two answered wrong have been added. It is about the choice of questions alone.

    Raises: ValueError without questions, or where a score is outside of 0 to 1.
    """
    found = np.array(scores, dtype=np.float64)
    if not found.size or found.min() < 0 or found.max() > 1:
        raise ValueError("scores must be one or more, from 0 to 1")
    added = np.append(found, [1.0, 1.0, 0.0, 0.0])
    centre, half = float(added.mean()), _Z * float(added.std()) / len(added) ** 0.5
    return float(found.mean()), max(centre - half, 0.0), min(centre + half, 1.0)


def points(change: float) -> str:
    """A change of a share, in percentage points: `+12.5`, `−3.0`. Local."""
    return f"{100 * change:+.1f}".replace("-", "\N{MINUS SIGN}")
