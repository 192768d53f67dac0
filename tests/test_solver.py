"""The solver against fp64 SVDs: energy, span and orthonormality, by projectors and never by columns.

Shapes: W (M, N), K = min(M, N), R the adapter's rank, U (M, K) the thin left singular vectors, S (K) descending.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mica_ds import symmetric
from mica_ds.factor import Factor, first_columns, gram, shared_gram
from mica_ds.solver import Solution, minor_left_singular_vectors, solve

EPS32 = 2.0**-23
ALL = 1 << 30  # an r that stands for K


@dataclass(frozen=True)
class Truth:
    """A matrix and its thin SVD in fp64."""

    W_MN: torch.Tensor
    U_MK: torch.Tensor
    S_K: torch.Tensor

    @functools.cached_property
    def fp32_U_MK(self) -> torch.Tensor:
        """What an SVD in fp32 finds."""
        return torch.linalg.svd(self.W_MN.float(), full_matrices=False)[0]

    @property
    def noise(self) -> float:
        """Singular values up to here count as zero: the definition of a right energy allows as much for each."""
        return 8 * EPS32 * self.S_K[0].item()

    def gap(self, r: int) -> float:
        """The relative gap at r; none at r = K, nor among zeros."""
        above, below = self.S_K[-r - 1 :][:2].tolist() if r < len(self.S_K) else (0.0, 0.0)
        return 1 - below / above if above > self.noise else 0.0

    def sine(self, B_MR: torch.Tensor) -> float:
        """Of the largest angle between B and the last R columns of U; those of σ = 0 may be any off range(W)."""
        r = B_MR.shape[1]
        above, minor, B = self.U_MK[:, :-r], self.U_MK[:, -r:], B_MR.double()
        certain = minor[:, self.S_K[-r:] > self.noise]
        return max(_norm(above.T @ B), _norm(certain - B @ (B.T @ certain)))


def truth_of(W_MN: torch.Tensor) -> Truth:
    U, S, _ = torch.linalg.svd(W_MN.double(), full_matrices=False)
    return Truth(W_MN, U, S)


def assert_is_minor_basis(W_MN: torch.Tensor, B_MR: torch.Tensor, r: int, truth: Truth | None = None) -> None:
    """The definition of a right basis: orthonormal, with the energy of the r smallest values, inside the thin U."""
    truth = truth or truth_of(W_MN)
    W, B, U, S = W_MN.double(), B_MR.double(), truth.U_MK, truth.S_K
    assert B_MR.dtype == torch.float32
    assert B.shape == (W.shape[0], r)
    assert (B.T @ B - torch.eye(r, dtype=torch.float64)).abs().max() <= 1e-6
    energy, least = (B.T @ W).square().sum(), S[-r:].square().sum()
    assert abs(energy - least) <= 1e-3 * least + r * truth.noise**2
    lost = int((S[-r:] <= truth.noise).sum())
    assert (B[:, r - lost :].T @ W).norm() <= lost**0.5 * truth.noise  # where σ is zero, B is orthogonal to range(W)
    if S[-1] > 1e-4 * S[0]:
        assert (B - U @ (U.T @ B)).norm() <= 1e-5
    if r == len(S):
        range_of_W = U[:, 1e-4 * S[0] < S]
        assert (range_of_W - B @ (B.T @ range_of_W)).norm() <= 1e-5


def assert_is_right(truth: Truth, r: int, solution: Solution) -> None:
    """A right basis, at most twice as far from the truth as an fp32 SVD, and a report that agrees with fp64."""
    W, B, S = truth.W_MN.double(), solution.B_MR.double(), truth.S_K
    assert_is_minor_basis(truth.W_MN, solution.B_MR, r, truth)
    assert 0.99 * S[0] <= solution.sigma_max <= S[0] * (1 + EPS32)
    energies, least = [sigma**2 for sigma in solution.sigma_minor], S[-r:].square().tolist()
    assert energies == pytest.approx(least, rel=1e-3, abs=truth.noise**2)
    assert (solution.relative_gap is None) == (r == len(S))
    if truth.gap(r) > 0:
        assert solution.relative_gap == pytest.approx(truth.gap(r), rel=1e-2, abs=1e-3)
    rounding, residual = r**0.5 * EPS32, solution.residual * S[0] ** 2
    is_wide = W.shape[0] <= W.shape[1]  # B is on the short side then, where the residual is taken
    if is_wide:
        again = W @ (W.T @ B) - B * torch.tensor(energies, dtype=torch.float64)
        assert abs(again.norm() - residual) <= rounding * S[0] ** 2
    if truth.gap(r) >= 0.01:
        assert truth.sine(B) <= max(1e-5, 2 * truth.sine(truth.fp32_U_MK[:, -r:]))
        if is_wide:  # the residual bounds the angle (Davis and Kahan)
            assert truth.sine(B) <= residual / (S[-r - 1] ** 2 - S[-r] ** 2) + rounding


def _norm(A: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(A, ord=2).item() if A.numel() else 0.0


def _gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _with_values(m: int, n: int, first: float, last: float, then: Sequence[float] = ()) -> torch.Tensor:
    """Random singular vectors; the values go down from `first` to `last` by equal ratios, then as given."""
    k = min(m, n)
    falling = first * (last / first) ** torch.linspace(0, 1, k - len(then), dtype=torch.float64)
    S_K = torch.cat([falling, torch.tensor(then, dtype=torch.float64)])
    return (torch.linalg.qr(_gaussian(m, k, 1)).Q * S_K) @ torch.linalg.qr(_gaussian(n, k, 2)).Q.T


def _of_rank(m: int, n: int, rank: int) -> torch.Tensor:
    """Products of small integers: the deficiency is exact."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randint, -2, 3, generator=generator)
    return (draw((m, rank)) @ draw((rank, n))).double()


def _with_outliers(m: int, n: int) -> torch.Tensor:
    """64 directions 30 to 60 times the largest singular value of the rest."""
    bulk = _gaussian(m, n) / (m**0.5 + n**0.5)
    return bulk + _with_values(m, n, 60, 30, then=[0.0] * (min(m, n) - 64))


MADE: dict[str, Callable[[int, int], torch.Tensor]] = {
    "gaussian": _gaussian,
    "values near 1e-20": lambda m, n: 1e-20 * _gaussian(m, n),
    "outliers": _with_outliers,
    "deficient by 4": lambda m, n: _of_rank(m, n, min(m, n) - 4),
    "deficient by 40": lambda m, n: _of_rank(m, n, min(m, n) - 40),
    "rank 1": lambda m, n: _of_rank(m, n, 1),
    "zero": lambda m, n: 0 * _gaussian(m, n),
    "duplicate rows": lambda m, n: _gaussian(m, n)[torch.arange(m) % (m - 12)],
    "duplicate columns": lambda m, n: _gaussian(m, n)[:, torch.arange(n) % (n - 12)],
    "zero rows": lambda m, n: _gaussian(m, n) * (torch.arange(m) >= 12)[:, None],
    "zero columns": lambda m, n: _gaussian(m, n) * (torch.arange(n) >= 12),
    "condition 1e8": lambda m, n: _with_values(m, n, 1, 1e-8),
    "one value of 1e-8": lambda m, n: _with_values(m, n, 2, 1, then=[1e-8]),
    "one value of 1e-4": lambda m, n: _with_values(m, n, 2, 1, then=[1e-4]),
    "ten equal values of 1e-3": lambda m, n: _with_values(m, n, 2, 1, then=[1e-3] * 10),
    "all values equal": lambda m, n: _with_values(m, n, 3, 3),
}
RANKS = [1, 8, 64, ALL]
SOLVES = [
    *product([(200, 96), (96, 200), (300, 300), (700, 320), (320, 700)], [None], RANKS),
    *product([(576, 576), (900, 650), (650, 900)], [None], [1, 8]),  # the last two take the Gram by choice
    *product([(576, 576)], ["lu"], [1, 8]),
    *product([(300, 300)], ["lu", "gram32", "gram"], RANKS),
    *product([(700, 320), (320, 700)], ["gram32", "gram"], RANKS),
]


def _id(part: object) -> str:
    return "k" if part == ALL else str(part).replace(", ", "x")


@functools.lru_cache(maxsize=2)
def made(recipe: str, shape: tuple[int, int]) -> Truth:
    return truth_of(MADE[recipe](*shape).float())


@pytest.mark.parametrize(("shape", "factor", "r"), SOLVES, ids=_id)
@pytest.mark.parametrize("recipe", MADE)
def test_made_matrices(recipe: str, shape: tuple[int, int], factor: Factor | None, r: int) -> None:
    truth, r = made(recipe, shape), min(r, *shape)
    assert_is_right(truth, r, solve(truth.W_MN, r, factor=factor))


@pytest.mark.parametrize(
    ("recipe", "shape", "r", "tried"),
    [
        ("outliers", (300, 300), 8, ["eigh"]),
        ("outliers", (650, 650), 8, ["lu"]),
        ("outliers", (650, 650), 64, ["eigh"]),
        ("outliers", (700, 320), 8, ["eigh"]),
        ("outliers", (900, 650), 8, ["gram32"]),
        ("outliers", (650, 900), 8, ["gram32"]),
        ("deficient by 4", (650, 650), 8, ["lu", "gram"]),
        ("deficient by 4", (900, 650), 8, ["gram32", "gram"]),
        ("deficient by 4", (650, 900), 8, ["gram32", "gram"]),
        ("condition 1e8", (900, 650), 8, ["gram32", "gram", "eigh"]),
    ],
    ids=_id,
)
def test_factors_tried(recipe: str, shape: tuple[int, int], r: int, tried: list[Factor]) -> None:
    solution = solve(MADE[recipe](*shape).float(), r)
    assert [*solution.unconverged, solution.factor] == tried


@functools.lru_cache(maxsize=2)
def real(model: Path, layer: int, kind: str) -> Truth:
    with safe_open(model / "model.safetensors", framework="pt") as stored:
        return truth_of(stored.get_tensor(f"model.layers.{layer}.{kind}_proj.weight"))


SQUARE = ["self_attn.q", "self_attn.o"]
KINDS = [*SQUARE, "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down"]
for_each_real_solve = pytest.mark.parametrize(
    ("kind", "r", "factor"),
    # These are small enough to be decomposed whole; the others are what larger ones get.
    [*product(KINDS, RANKS, [None]), *product(KINDS, [1, 8, 64], ["gram32", "gram"]), *product(SQUARE, [1, 8], ["lu"])],
    ids=_id,
)


@for_each_real_solve
@pytest.mark.parametrize("layer", [0, 15, 29])
def test_real_weights(smollm2: Path, layer: int, kind: str, r: int, factor: Factor | None) -> None:
    truth = real(smollm2, layer, kind)
    r = min(r, *truth.W_MN.shape)
    assert_is_right(truth, r, solve(truth.W_MN, r, factor=factor))


@pytest.mark.slow
@for_each_real_solve
@pytest.mark.parametrize("layer", range(30))
def test_all_210_real_weights(smollm2: Path, layer: int, kind: str, r: int, factor: Factor | None) -> None:
    test_real_weights(smollm2, layer, kind, r, factor)


@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    share=st.floats(0, 1),
    deficiency=st.integers(0, 3),
    duplicates=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150)
def test_any_shape_and_deficiency(m: int, n: int, share: float, deficiency: int, duplicates: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inner = max(1, min(m, n) - deficiency)
    W = torch.randn(m, inner, generator=generator) @ torch.randn(inner, n, generator=generator)
    if duplicates and m > 1:
        W[-1] = W[0]
    r = max(1, round(share * min(m, n)))
    assert_is_right(truth_of(W), r, solve(W, r))


@pytest.mark.parametrize(
    ("shape", "factor"),
    [
        ((300, 300), "lu"),
        ((320, 700), "eigh"),
        *product([(700, 320), (320, 700), (20001, 320), (320, 16500)], ["gram32", "gram"]),
    ],
    ids=_id,
)
def test_how_a_matrix_is_stored_does_not_matter(shape: tuple[int, int], factor: Factor) -> None:
    W = _with_values(*shape, 2, 1, then=[0.5] * 8).bfloat16()
    B, from_fp32, from_view = (solve(V, 8, factor=factor).B_MR for V in (W, W.float(), W.T.contiguous().T))
    assert_is_minor_basis(W, B, 8)
    assert torch.equal(B, from_fp32)
    assert _sine(from_view, B.double()) <= 1e-6


@pytest.mark.parametrize(
    ("shape", "factor"), [((700, 700), "lu"), *product([(900, 700), (700, 900)], ["gram32", "gram"])], ids=_id
)
def test_a_tiny_gap_at_r_leaves_its_smaller_bases_right(shape: tuple[int, int], factor: Factor) -> None:
    """The last 8 of 16 columns, which a cache serves as the basis of r = 8, where the gaps are 1e-5 and 2 %."""
    k = min(shape)
    values = torch.cat(
        [torch.linspace(2, 1, k - 16), torch.full((8,), 1 - 1e-5), torch.linspace(0.98, 0.8, 8)]
    ).double()
    W = (torch.linalg.qr(_gaussian(shape[0], k, 1)).Q * values) @ torch.linalg.qr(_gaussian(shape[1], k, 2)).Q.T
    truth = truth_of(W.float())
    assert truth.gap(8) > 0.01 > 1e-4 > truth.gap(16)
    B = solve(truth.W_MN, 16, factor=factor).B_MR[:, -8:]
    assert truth.sine(B) <= max(1e-5, 2 * truth.sine(truth.fp32_U_MK[:, -8:]))


@pytest.mark.parametrize("shape", [(1600, 1100), (1100, 1600)], ids=_id)
@pytest.mark.parametrize("then", [[1e-2], [1e-3], [0.8 * 0.6**i for i in range(17)]], ids=["1e-2", "1e-3", "17"])
def test_what_fp32_would_drown_is_solved_in_fp64(then: list[float], shape: tuple[int, int]) -> None:
    truth = truth_of(_with_values(*shape, 10, 1, then=then).float())
    solution = solve(truth.W_MN, 16)
    assert [*solution.unconverged, solution.factor] == ["gram32", "gram"]
    assert_is_right(truth, 16, solution)


def test_a_decomposition_is_no_worse_than_what_came_near() -> None:
    """Its own vectors are off by 9e-4 here, since the fp64 Gram squares the condition; what was found before is not."""
    truth = truth_of(_with_values(1000, 800, 1, 1.2e-7))
    solution = solve(truth.W_MN, 8)
    assert [*solution.unconverged, solution.factor] == ["gram32", "gram", "eigh"]
    assert truth.sine(solution.B_MR) < 3e-5


@pytest.mark.parametrize("shape", [(1, 2), (3, 4), (130, 131), (300, 1001), (650, 13001)])
@pytest.mark.parametrize("is_tall", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gram_of_two_parts_is_their_sum_to_the_bit(shape: tuple[int, int], is_tall: bool, dtype: torch.dtype) -> None:
    T_KL = _gaussian(*shape).to(dtype)
    if is_tall:
        T_KL = T_KL.T.contiguous().T
    whole_KK = shared_gram(T_KL)
    fp64_KK = T_KL.double() @ T_KL.double().T
    assert (whole_KK.tril() - fp64_KK.tril()).abs().max() <= 1e-5 * fp64_KK.abs().max()
    first = first_columns(shape[1])
    mine, others = T_KL[:, :first], T_KL[:, first:]
    if not is_tall:
        others = others.contiguous()  # as a helper has it
    first_KK, last_KK = gram(mine, torch.float32), gram(others, torch.float32, to_lower=False)
    assert torch.equal(whole_KK.tril(), (first_KK.tril() + last_KK.triu().T))


@pytest.mark.parametrize("factor", ["lu", "gram32", "gram", "eigh"])
def test_the_same_matrix_gives_the_same_bits(factor: Factor) -> None:
    W = _gaussian(300, 300).float()
    B = solve(W, 7, factor=factor).B_MR
    assert torch.equal(B, solve(W.clone(), 7, factor=factor).B_MR)
    assert (B.gather(0, B.abs().argmax(dim=0, keepdim=True)) > 0).all()


ON_A_GPU = [*product([(200, 96), (300, 300), (700, 320), (320, 700), (900, 650)], [1, 8, 64])]
DEGENERATE = ["gaussian", "outliers", "deficient by 4", "zero rows", "condition 1e8", "ten equal values of 1e-3"]


@pytest.mark.parametrize(("shape", "r"), ON_A_GPU, ids=_id)
@pytest.mark.parametrize("recipe", DEGENERATE)
def test_what_a_gpu_would_compute(recipe: str, shape: tuple[int, int], r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own routines, which stand in for LAPACK's on a GPU, on this CPU."""
    monkeypatch.setattr(symmetric, "on_host", lambda _: False)
    truth = made(recipe, shape)
    solution = solve(truth.W_MN, r)
    assert solution.factor in ("gram", "eigh")
    assert_is_right(truth, r, solution)
    assert solve(truth.W_MN, r, factor="gram32").factor in ("gram", "eigh")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("shape", "r"), ON_A_GPU, ids=_id)
@pytest.mark.parametrize("recipe", DEGENERATE)
def test_on_a_gpu(recipe: str, shape: tuple[int, int], r: int) -> None:
    truth = made(recipe, shape)
    assert_is_right(truth, r, solve(truth.W_MN.cuda(), r))


@pytest.mark.parametrize("shape", [(50, 30), (30, 50), (300, 300)])
def test_principal_and_random_subspaces(shape: tuple[int, int]) -> None:
    W = _gaussian(*shape, seed=4).float()
    U = torch.linalg.svd(W.double(), full_matrices=False)[0]
    principal = solve(W, 5, "principal").B_MR
    assert _sine(principal, U[:, :5]) < 1e-6
    first, again, other = (solve(W, 5, "random", seed).B_MR for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.allclose(first.T @ first, torch.eye(5), atol=1e-6)


@pytest.mark.parametrize(("r", "message"), [(0, "r=0"), (7, "r=7")])
def test_r_out_of_range_is_refused(r: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minor_left_singular_vectors(torch.randn(6, 9), r)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_refused(value: float) -> None:
    W = torch.randn(6, 9)
    W[2, 3] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        minor_left_singular_vectors(W, 2)


def _sine(B: torch.Tensor, U: torch.Tensor) -> float:
    """Sine of the largest angle between two subspaces of equal dimension."""
    return _norm(B.double() - U @ (U.T @ B.double()))
