"""The solver against fp64 SVDs: energy, span and orthonormality, by projectors and never by columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mica_ds.solver import minor_left_singular_vectors, solve

from .conftest import SMOLLM2

EPS32 = 2.0**-23


def assert_is_minor_basis(W_MN: torch.Tensor, B_MR: torch.Tensor, r: int) -> None:
    """The definition of a right basis: orthonormal, with the energy of the r smallest values, inside the thin U."""
    W, B = W_MN.double(), B_MR.double()
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    assert B_MR.dtype == torch.float32
    assert B.shape == (W.shape[0], r)
    assert (B.T @ B - torch.eye(r, dtype=torch.float64)).abs().max() < 1e-6
    energy, least = (B.T @ W).square().sum(), S[-r:].square().sum()
    assert abs(energy - least) <= 1e-3 * least + r * (8 * EPS32 * S[0]) ** 2
    if S[-1] > 1e-4 * S[0]:
        assert (B - U @ (U.T @ B)).norm(dim=0).max() < 1e-5
    if r == min(W.shape) and S[-1] > 1e-4 * S[0]:
        assert (B @ B.T - U @ U.T).abs().max() < 1e-5


@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    share=st.floats(0, 1),
    deficiency=st.integers(0, 3),
    duplicates=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_and_deficiency(m: int, n: int, share: float, deficiency: int, duplicates: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inner = max(1, min(m, n) - deficiency)
    W = torch.randn(m, inner, generator=generator) @ torch.randn(inner, n, generator=generator)
    if duplicates and m > 1:
        W[-1] = W[0]
    r = max(1, round(share * min(m, n)))
    assert_is_minor_basis(W, minor_left_singular_vectors(W, r), r)


@pytest.mark.parametrize("shape", [(64, 64), (200, 64), (64, 200)])
@pytest.mark.parametrize("r", [1, 8, 64])
def test_condition_1e8(shape: tuple[int, int], r: int) -> None:
    torch.manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    W = (U * torch.logspace(0, -8, 64, dtype=torch.float64)) @ V
    assert_is_minor_basis(W.float(), minor_left_singular_vectors(W.float(), r), r)


def test_a_tall_deficient_matrix_is_completed_orthogonally_to_its_range() -> None:
    torch.manual_seed(0)
    W = torch.randn(60, 10) @ torch.randn(10, 12)  # rank 10 of 12
    solution = solve(W, 4)
    assert solution.factor == "svd"
    assert (solution.B_MR[:, -2:].T @ W).abs().max() < 1e-4
    assert_is_minor_basis(W, solution.B_MR, 4)


def test_a_zero_matrix_has_an_orthonormal_basis() -> None:
    for shape in [(6, 6), (40, 6), (6, 40)]:
        assert_is_minor_basis(torch.zeros(shape), minor_left_singular_vectors(torch.zeros(shape), 3), 3)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"])
@pytest.mark.parametrize("layer", [0, 15, 29])
def test_real_weights_within_twice_the_error_of_an_fp32_svd(name: str, layer: int) -> None:
    if not SMOLLM2.is_dir():
        pytest.skip("run `python launch/prepare_model.py` first: it makes the real model")
    with safe_open(SMOLLM2 / "model.safetensors", framework="pt") as stored:
        W = stored.get_tensor(f"model.layers.{layer}.{name}.weight")
    solution = solve(W, 16)
    assert_is_minor_basis(W, solution.B_MR, 16)
    U, S, _ = torch.linalg.svd(W.double(), full_matrices=False)
    assert solution.sigma_minor == pytest.approx(S[-16:].tolist(), rel=1e-6)
    assert solution.sigma_max == pytest.approx(S[0].item(), rel=1e-6)
    assert solution.relative_gap == pytest.approx(((S[-17] - S[-16]) / S[-17]).item(), rel=1e-3)
    fp32 = torch.linalg.svd(W, full_matrices=False)[0][:, -16:]
    assert _sine(solution.B_MR, U[:, -16:]) <= max(1e-5, 2 * _sine(fp32, U[:, -16:]))


def test_the_same_matrix_gives_the_same_bits() -> None:
    W = torch.randn(50, 40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(minor_left_singular_vectors(W, 7), minor_left_singular_vectors(W.clone(), 7))


def test_principal_and_random_subspaces() -> None:
    W = torch.randn(50, 30, generator=torch.Generator().manual_seed(4))
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


def test_nan_is_refused() -> None:
    W = torch.randn(6, 9)
    W[2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        minor_left_singular_vectors(W, 2)


def _sine(B: torch.Tensor, U: torch.Tensor) -> float:
    """Sine of the largest angle between two subspaces of equal dimension."""
    return torch.linalg.matrix_norm(B.double() - U @ (U.T @ B.double()), ord=2).item()
