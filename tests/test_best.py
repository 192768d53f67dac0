"""The best step and the end of patience, from logs alone."""

import math

from hypothesis import given
from hypothesis import strategies as st

from mica_ds.best import is_out_of_patience, ranked_steps
from mica_ds.config import EvaluateSettings

BEFORE = {"step": 0, "knowledge": 0.9, "retention": 10.0}


def entries(*scores: tuple[float, float]) -> list[dict[str, float]]:
    """A log with an evaluation at each tenth step: knowledge and retention."""
    scored = [{"step": 10 * i, "knowledge": k, "retention": r} for i, (k, r) in enumerate(scores, start=1)]
    return [BEFORE, {"step": 1, "loss": 4.0}, *scored]


def test_of_those_within_the_bound_who_knows_most() -> None:
    history = entries((0.3, 10), (0.5, 10.9), (0.8, 11.1), (0.5, 10.5), (0.9, math.nan), (0.7, 30))
    assert ranked_steps(history, EvaluateSettings(max_forgetting=1.1)) == [20, 40, 10, 30, 60, 50]
    assert ranked_steps(history, EvaluateSettings()) == [50, 30, 60, 20, 40, 10]


def test_open_questions_alone_rank_by_f1() -> None:
    history = [{"step": 0, "f1": 0.0}, {"step": 1, "f1": 0.2}, {"step": 2, "f1": 0.4}]
    assert ranked_steps(history, EvaluateSettings()) == [2, 1]


def test_patience_counts_from_the_best() -> None:
    settings = EvaluateSettings(patience=2, max_forgetting=1.1)
    assert not is_out_of_patience([BEFORE], settings)
    assert not is_out_of_patience(entries((0.3, 10), (0.2, 10)), settings)
    assert is_out_of_patience(entries((0.3, 10), (0.2, 10), (0.3, 10)), settings)  # as good is no better
    assert is_out_of_patience(
        entries((0.3, 10), (0.8, 12), (0.9, 13)), settings
    )  # nor is knowing more beyond the bound
    assert not is_out_of_patience(entries((0.3, 10), (0.2, 10), (0.4, 10)), settings)
    assert not is_out_of_patience(entries((0.3, 10), (0.2, 10), (0.1, 10)), EvaluateSettings())


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(1, 100)), min_size=1, max_size=12),
    st.floats(1, 3),
    st.integers(1, 4),
)
def test_a_longer_log_stops_no_later_than_its_beginnings(
    scores: list[tuple[float, float]], bound: float, patience: int
) -> None:
    """So a run that is resumed ends where one without a break does."""
    settings = EvaluateSettings(patience=patience, max_forgetting=bound)
    history = entries(*scores)
    ranked = ranked_steps(history, settings)
    assert sorted(ranked) == [10 * i for i in range(1, len(scores) + 1)]
    if any(retention <= bound * 10 for _, retention in scores):
        assert scores[ranked[0] // 10 - 1][1] <= bound * 10
        assert scores[ranked[0] // 10 - 1][0] == max(k for k, r in scores if r <= bound * 10)
    stops = [n for n in range(1, len(scores) + 1) if is_out_of_patience(entries(*scores[:n]), settings)]
    if stops:
        best = ranked_steps(entries(*scores[: stops[0]]), settings)[0]
        assert stops[0] == best // 10 + patience
