"""Who solves what, and who helps whom, from the shapes alone."""

from dataclasses import replace

import pytest

from mica_ds import factor
from mica_ds.config import BasisSettings
from mica_ds.schedule import Assignment, Machine, assign, choose_route, may_share, moved_bytes, rank_work
from mica_ds.shards import Matrix

R = 16
FILES = Machine(ranks=2, itemsize=2, memory=1 << 40, is_sliced=False, is_on_host=True, threads=1)
LAYER = [
    Matrix(name, shape, is_transposed=False)
    for name, shape in {
        "q": (4096, 4096),
        "k": (1024, 4096),
        "v": (1024, 4096),
        "o": (4096, 4096),
        "gate": (14336, 4096),
        "up": (14336, 4096),
        "down": (4096, 14336),
    }.items()
]


def seconds(matrices: list[Matrix], assignment: Assignment, ranks: int) -> list[float]:
    return [factor.seconds(work, factor.RATES) for work in rank_work(matrices, assignment, R, ranks)]


def test_one_layer_on_two_ranks_is_shared_where_seven_matrices_do_not_split_evenly() -> None:
    alone, shared = assign(LAYER, R, FILES, may_share=False), assign(LAYER, R, FILES)
    assert alone.owners == shared.owners
    assert not alone.helpers
    assert list(shared.helpers.values()) == [1]
    assert {shared.owners[i] for i in shared.helpers} == {0}
    before, after = seconds(LAYER, alone, 2), seconds(LAYER, shared, 2)
    assert sum(after) == pytest.approx(sum(before))
    assert max(after) < 0.95 * max(before)
    quarter = factor.work((14336, 4096), R)["gram32"] / 4 / factor.RATES["gram32"]
    assert after[1] - before[1] == pytest.approx(quarter)


def test_what_splits_evenly_is_not_shared() -> None:
    assert not assign(32 * LAYER, R, FILES).helpers
    assert not assign(2 * LAYER[4:5], R, FILES).helpers
    assert not assign([], R, FILES).helpers


def test_a_square_weight_has_no_gram_to_share() -> None:
    assert not assign(LAYER[:1], R, FILES).helpers
    assert assign(LAYER[4:5], R, FILES).helpers == {0: 1}


def test_ranks_are_numbered_by_their_load() -> None:
    for ranks in (2, 3, 5):
        machine = replace(FILES, ranks=ranks)
        loads = seconds(LAYER, assign(LAYER, R, machine, may_share=False), ranks)
        assert loads == pytest.approx(sorted(loads, reverse=True))
        assert sum(loads) == pytest.approx(sum(factor.cost(matrix.shape, R) for matrix in LAYER))


def test_help_has_to_save_more_time_than_it_takes_to_send() -> None:
    assert assign(LAYER[4:5], R, replace(FILES, threads=4)).helpers
    assert not assign(LAYER[4:5], R, replace(FILES, threads=64)).helpers
    assert assign([LAYER[4], *2 * LAYER[:1]], R, FILES).helpers
    assert not assign([LAYER[4], *3 * LAYER[:1]], R, FILES).helpers  # it would save less than 5 %


def test_nobody_is_helped_who_ends_earlier_than_the_longest() -> None:
    matrices = [Matrix("longest", (28672, 4096), is_transposed=False), LAYER[4]]
    assert assign(matrices, R, replace(FILES, ranks=4)).helpers == {0: 3}


def test_more_ranks_than_matrices_share_them_in_pairs() -> None:
    ranks = 1024
    matrices = 80 * LAYER
    assignment = assign(matrices, R, replace(FILES, ranks=ranks))
    assert len(assignment.helpers) == 80 * 3
    pairs = [(assignment.owners[i], helper) for i, helper in assignment.helpers.items()]
    assert all(owner + helper == ranks - 1 and owner < helper for owner, helper in pairs)
    assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs)
    quarter = factor.work((14336, 4096), R)["gram32"] / 4 / factor.RATES["gram32"]
    costliest = max(factor.cost(matrix.shape, R) for matrix in matrices)
    assert max(seconds(matrices, assignment, ranks)) == pytest.approx(costliest - quarter)


def test_of_partitions_only_long_weights_are_shared() -> None:
    machine = replace(FILES, is_sliced=True)
    (i,) = assign(LAYER, R, machine).helpers
    assert LAYER[i].name in ("gate", "up")  # a slice of the wide one has no columns of its own
    assert not assign(LAYER[-1:], R, machine).helpers
    assert not assign(LAYER[4:5], R, replace(machine, ranks=3)).helpers
    (moved,) = moved_bytes(LAYER[4:5], Assignment([0], {0: 1}), R, machine)
    weight, triangle = 2 * 14336 * 4096, 4 * 4096 * 4097 / 2
    assert weight / 2 + triangle < moved < 1.1 * weight


def test_where_all_ranks_sum_none_helps() -> None:
    machine = replace(FILES, is_sliced=True, memory=1 << 27)
    assert choose_route(LAYER[4], R, machine) == "gram"
    assert not assign(LAYER[4:5], R, machine).helpers
    assert may_share(BasisSettings(), "minor")
    assert not may_share(BasisSettings(exchange="gram"), "minor")
    assert not may_share(BasisSettings(factor="gram"), "minor")
    assert not may_share(BasisSettings(), "principal")


def test_a_gram_that_costs_more_to_send_than_the_weight_is_not_shared() -> None:
    square_like = [Matrix("a", (4700, 4096), is_transposed=False)]
    assert choose_route(square_like[0], R, FILES) == "ship"
    assert not assign(square_like, R, FILES).helpers
    assert assign(square_like, R, replace(FILES, itemsize=4)).helpers


def test_gpus_need_no_help() -> None:
    assert not assign(LAYER, R, replace(FILES, is_on_host=False)).helpers
