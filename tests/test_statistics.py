"""Intervals: the share of all possible samples that they cover, and what has no spread."""

import itertools

import numpy as np
import pytest
from scipy.stats import binom, multinomial

from mica_ds.statistics import accuracy_interval, paired_interval


@pytest.mark.parametrize("questions", [10, 72])
def test_wilson_covers_the_true_accuracy(questions: int) -> None:
    intervals = [accuracy_interval(n, questions) for n in range(questions + 1)]
    coverages = []
    for truth in np.linspace(0.05, 0.95, 19):
        chances = binom.pmf(range(questions + 1), questions, truth)
        coverages.append(sum(p for p, (low, high) in zip(chances, intervals, strict=True) if low <= truth <= high))
    assert min(coverages) > 0.9
    assert 0.94 < np.mean(coverages) < 0.97


@pytest.mark.parametrize("questions", [6, 20, 72])
def test_paired_intervals_cover_the_true_change(questions: int) -> None:
    """Over all samples that questions of which some get better and some worse can give."""
    samples = [(b, w) for b in range(questions + 1) for w in range(questions + 1 - b)]
    found = {}
    for better, worse in samples:
        before = [0] * better + [1] * worse + [1] * (questions - better - worse)
        after = [1] * better + [0] * worse + [1] * (questions - better - worse)
        mean, low, high = found[better, worse] = paired_interval(before, after)
        assert mean == pytest.approx((better - worse) / questions)
        assert -1 <= low <= mean <= high <= 1
    coverages = []
    for better, worse in itertools.product((0.02, 0.1, 0.3, 0.45), repeat=2):
        truth = better - worse
        counts = np.array([(b, w, questions - b - w) for b, w in samples])
        chances = multinomial.pmf(counts, questions, [better, worse, 1 - better - worse])
        covers = np.array([low <= truth <= high for _, low, high in found.values()])
        coverages.append(chances[covers].sum())
    assert min(coverages) > 0.92
    assert np.mean(coverages) < 0.99


def test_paired_intervals_cover_means_over_seeds() -> None:
    random = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        known = random.uniform(0.1, 0.9, size=60)  # each question's own chance before
        before = random.binomial(3, known, size=60) / 3
        after = random.binomial(3, known + 0.1, size=60) / 3
        _, low, high = paired_interval(before.tolist(), after.tolist())
        covered.append(low <= 0.1 <= high)
    assert np.mean(covered) > 0.94


def test_no_spread_is_not_taken_for_certainty() -> None:
    mean, low, high = paired_interval([0, 1, 1], [0, 1, 1])
    assert mean == 0
    assert low == -high < -0.2
    mean, low, high = paired_interval([0] * 10, [1] * 10)
    assert mean == high == 1
    assert 0.4 < low < 0.9
    low, high = accuracy_interval(5, 5)
    assert high == 1
    assert 0.5 < low < 0.6
    widths = [high - low for _, low, high in (paired_interval([0.5] * n, [0.5] * n) for n in (1, 10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)


def test_it_is_about_pairs() -> None:
    """The same two accuracies: nearly all questions as before, or half of them changed."""
    before = [1, 0] * 50
    _, low, high = paired_interval(before, [*before[:-10], *[1] * 10])
    _, apart_low, apart_high = paired_interval(before, [0, 1] * 40 + [1] * 20)
    assert high - low < 0.6 * (apart_high - apart_low)


@pytest.mark.parametrize(("before", "after"), [([], []), ([0, 1], [1]), ([0.5], [1.5])])
def test_what_cannot_be_paired_is_refused(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        paired_interval(before, after)
    with pytest.raises(ValueError, match="at least one"):
        accuracy_interval(0, 0)
