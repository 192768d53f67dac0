"""The minor left singular vectors of one matrix. Pure tensors on the CPU; no ranks, no files.

Shapes: M rows (out features), N columns (in features), K = min(M, N), R the adapter's rank.

The eigenvectors of the smaller Gram matrix in fp64 are the singular vectors of W on its smaller side: squaring the
condition number costs half the digits, of which fp64 has enough and fp32 has not (Golub and Van Loan, 8.6.3).
Method: Rüdiger and Raschka, "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning", arXiv:2604.01694.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch

# Below this share of the largest singular value, W v has lost its direction to rounding (fp64 Gram: about 1e-8).
_NEGLIGIBLE = 1e-7


@dataclass(frozen=True)
class Solution:
    """A basis and what is known of the spectrum around it."""

    B_MR: torch.Tensor
    """Orthonormal columns, fp32; for the minor subspace by descending singular value."""
    sigma_max: float
    sigma_minor: list[float]
    """The R smallest singular values, descending."""
    relative_gap: float | None
    """(σ_{K-R} − σ_{K-R+1}) / σ_{K-R}; None at R = K."""
    residual: float
    """‖W Wᵀ U − U Σ²‖ / σ_max² of the minor vectors U in fp64 (Frobenius norm)."""
    factor: str
    """How the problem was factored: `gram-eigh`, or `svd` where W is tall and rank-deficient."""


def minor_left_singular_vectors(W_MN: torch.Tensor, r: int) -> torch.Tensor:
    """The `r` left singular vectors of the smallest singular values of the thin SVD.

    Args:
        W_MN: any floating dtype, on the CPU, finite.
        r: between 1 and min(M, N).

    Returns: B (M, r), fp32, orthonormal, columns by descending singular value; deterministic, each column's entry of
    largest magnitude positive.
    Raises: ValueError where r is out of range or W is not finite.
    """
    return solve(W_MN, r).B_MR


def solve(W_MN: torch.Tensor, r: int, subspace: str = "minor", seed: int = 0) -> Solution:
    """Find the basis of rank `r` in the named subspace (minor, principal or random) and the minor end of the spectrum.

    See `minor_left_singular_vectors` for the arguments; `seed` draws the random subspace.
    """
    W = W_MN.double().numpy()
    m, n = W.shape
    k = min(m, n)
    if not 1 <= r <= k:
        raise ValueError(f"r={r} is not between 1 and min(out, in)={k}")
    if not np.isfinite(W).all():
        raise ValueError("the matrix holds NaN or Inf")
    G_KK = W @ W.T if m <= n else W.T @ W
    sigma_max = _largest_singular_value(G_KK)
    lowest = min(r + 1, k)  # one more than the basis, for the gap
    squares, vectors = scipy.linalg.eigh(G_KK, subset_by_index=[0, lowest - 1], check_finite=False)
    sigma = np.sqrt(np.maximum(squares[::-1], 0.0))  # descending
    vectors = vectors[:, ::-1][:, -r:]
    factor = "gram-eigh"
    if m <= n:
        U_MR = vectors
    elif sigma[-1] > _NEGLIGIBLE * sigma_max:
        U_MR = np.linalg.qr(W @ (vectors / sigma[-r:]))[0]
    else:
        # W v is noise here. The thin U of a full SVD is orthonormal all the same: it completes range(W).
        U_MR = np.linalg.svd(W, full_matrices=False)[0][:, -r:]
        factor = "svd"
    residual = np.linalg.norm(W @ (W.T @ U_MR) - U_MR * sigma[-r:] ** 2) / (sigma_max**2 or 1.0)
    if subspace == "principal":
        U_MR = _principal(W, G_KK, r)
    elif subspace == "random":
        U_MR = np.linalg.qr(np.random.default_rng(seed).standard_normal((m, r)))[0]
    return Solution(
        B_MR=torch.from_numpy(_fix_signs(U_MR)).float().contiguous(),
        sigma_max=sigma_max,
        sigma_minor=sigma[-r:].tolist(),
        relative_gap=None if r == k else float((sigma[0] - sigma[1]) / max(sigma[0], 1e-300)),
        residual=float(residual),
        factor=factor,
    )


def spectrum(W_MN: torch.Tensor) -> torch.Tensor:
    """All K singular values, descending, fp64."""
    return torch.linalg.svdvals(W_MN.double())


def _largest_singular_value(G_KK: np.ndarray[Any, Any]) -> float:
    k = len(G_KK)
    if k <= 32:  # ARPACK wants a matrix larger than its basis
        return float(np.sqrt(max(np.linalg.eigvalsh(G_KK)[-1], 0.0)))
    if not G_KK.any():
        return 0.0
    start = np.random.default_rng(0).standard_normal(k)  # fixed: ARPACK would draw another one each time
    top = scipy.sparse.linalg.eigsh(G_KK, k=1, which="LA", v0=start, tol=1e-9, return_eigenvectors=False)
    return float(np.sqrt(max(top[0], 0.0)))


def _principal(W: np.ndarray[Any, Any], G_KK: np.ndarray[Any, Any], r: int) -> np.ndarray[Any, Any]:
    k = len(G_KK)
    vectors = scipy.linalg.eigh(G_KK, subset_by_index=[k - r, k - 1], check_finite=False)[1][:, ::-1]
    return vectors if W.shape[0] <= W.shape[1] else np.linalg.qr(W @ vectors)[0]


def _fix_signs(U_MR: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Make each column's entry of largest magnitude positive: singular vectors are unique only up to sign."""
    largest = np.take_along_axis(U_MR, np.abs(U_MR).argmax(axis=0)[None], axis=0)
    return U_MR * np.where(largest < 0, -1.0, 1.0)
