"""Symmetric matrices, given by their lower triangles: LAPACK in their own memory on the host, torch on a GPU.

On the host scipy's OpenBLAS beats torch's MKL for these, and takes half the memory (measured; see the README's table).
Shapes: G (K, K), fp64 or fp32, column-major on the host, as `zeros` makes it.
"""

from collections.abc import Iterator

import numpy as np
import scipy.linalg
import torch

# What numpy and torch raise where a factorisation or an eigenproblem fails.
FAILURES = (np.linalg.LinAlgError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
STRIP = 128
"""Rows of a triangle that are moved at a time, with the whole of the diagonal's block: STRIP / K more than there is."""


def on_host(tensor: torch.Tensor) -> bool:
    """Whether LAPACK can work on it. Local."""
    return tensor.device.type == "cpu"


def zeros(k: int, device: torch.device, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A symmetric matrix of zeros, column-major."""
    return torch.zeros(k, k, dtype=dtype, device=device).T


def add_gram(G_KK: torch.Tensor, part_KQ: torch.Tensor, to_lower: bool = True) -> None:
    """G += P Pᵀ, in place, in one triangle alone on the host; P is of G's dtype and lies by rows or by columns."""
    if not on_host(G_KK):
        G_KK.addmm_(part_KQ, part_KQ.T)
        return
    is_by_rows = part_KQ.stride(1) == 1
    by_columns = (part_KQ.T if is_by_rows else part_KQ).numpy()
    G = G_KK.numpy()
    syrk = scipy.linalg.blas.get_blas_funcs("syrk", (G,))
    syrk(1.0, by_columns, beta=1.0, c=G, trans=is_by_rows, lower=to_lower, overwrite_c=True)


def strips(k: int) -> Iterator[slice]:
    """The rows of a triangle, some at a time."""
    return (slice(start, min(start + STRIP, k)) for start in range(0, k, STRIP))


def read_strip(G_KK: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some rows of the upper triangle's transpose, up to and with the diagonal's block, a view."""
    return G_KK.T[rows, : rows.stop]


def add_strip(G_KK: torch.Tensor, rows: slice, strip: torch.Tensor) -> None:
    """Add to the lower triangle what `read_strip` gave of a Gram, this one or another, but for its diagonal."""
    G_KK[rows, : rows.start] += strip[:, : rows.start]
    G_KK[rows, rows] += strip[:, rows].tril(-1)


def times(G_KK: torch.Tensor, X_KQ: torch.Tensor) -> torch.Tensor:
    """G X."""
    if not on_host(G_KK):
        return G_KK.tril() @ X_KQ + G_KK.tril(-1).T @ X_KQ
    G = G_KK.numpy()
    symm = scipy.linalg.blas.get_blas_funcs("symm", (G,))
    return torch.from_numpy(symm(1.0, G, X_KQ.numpy(), lower=True))


def cholesky(G_KK: torch.Tensor) -> torch.Tensor:
    """What `solve` takes: the lower factor, on the host in G's own memory. Raises: LinAlgError where G has none.

    On a GPU its inverse: a triangular solve of few columns would leave it idle, row after row.
    """
    if not on_host(G_KK):
        identity_KK = torch.eye(len(G_KK), dtype=G_KK.dtype, device=G_KK.device)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(G_KK), identity_KK, upper=False)
    G = G_KK.numpy()
    potrf = scipy.linalg.lapack.get_lapack_funcs("potrf", (G,))
    factor, failed = potrf(G, lower=True, overwrite_a=True, clean=False)
    if failed:
        raise np.linalg.LinAlgError(f"pivot {failed} is not positive")
    return torch.from_numpy(factor)


def solve(L_KK: torch.Tensor, X_KQ: torch.Tensor) -> torch.Tensor:
    """G⁻¹ X by what `cholesky` made of G, in its dtype."""
    X_KQ = X_KQ.to(L_KK.dtype)
    if not on_host(L_KK):
        return L_KK.T @ (L_KK @ X_KQ)
    Y_KQ = torch.linalg.solve_triangular(L_KK, X_KQ, upper=False)
    return torch.linalg.solve_triangular(L_KK.T, Y_KQ, upper=True)


def eigenvectors(G_KK: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, float]:
    """The eigenvectors of the eigenvalues number `first` to `last`, ascending, as columns, and the largest eigenvalue.

    G is positive semidefinite, but for rounding. On the host it is overwritten, by LAPACK's steps: the largest comes at
    once from the tridiagonal form, which `scipy.linalg.eigh` does not give.
    """
    if not on_host(G_KK):
        values, vectors_KQ = torch.linalg.eigh(G_KK, UPLO="L")
        return vectors_KQ[:, first : last + 1], max(float(values[-1]), 0.0)
    k = len(G_KK)
    reduced = scipy.linalg.lapack.dsytrd(G_KK.numpy(), lower=True, lwork=16 * k, overwrite_a=True)
    reflectors, diagonal, beside, scales, _ = reduced
    vectors = scipy.linalg.eigh_tridiagonal(diagonal, beside, select="i", select_range=(first, last))[1]
    largest = scipy.linalg.eigvalsh_tridiagonal(diagonal, beside, select="i", select_range=(k - 1, k - 1))[0]
    if k > 1:  # the reflectors lie below the diagonal, and leave the first row alone
        below = reflectors.ravel(order="K")[1 : 1 + k * (k - 1)].reshape(k, k - 1, order="F")
        size = 32 * vectors.shape[1]
        vectors[1:] = scipy.linalg.lapack.dormqr("L", "N", below, scales, vectors[1:], lwork=size)[0]
    return torch.from_numpy(vectors), max(float(largest), 0.0)
