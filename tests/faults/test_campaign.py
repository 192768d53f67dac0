"""The quick part of the campaign: three of its moments, on a tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .campaign import Campaign, Moment

pytestmark = [pytest.mark.dist, pytest.mark.exclusive]


@pytest.fixture(scope="module")
def campaign(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("campaign"), tiny_model("llama"))


@pytest.mark.parametrize(
    "moment",
    [
        Moment("update", 0.1, [1]),
        Moment("writing a checkpoint", 0.002, [0]),
        Moment("recording", 0.0, [0]),
    ],
    ids=lambda moment: moment.phase.replace(" ", "-"),
)
def test_a_killed_run_comes_out_the_same(moment: Moment, campaign: Campaign) -> None:
    outcome = campaign.try_moment(moment, f"killed-{moment.phase.replace(' ', '-')}")
    assert not outcome.faults, outcome
