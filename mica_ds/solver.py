"""The minor left singular vectors of one matrix. Pure tensors on the CPU; no ranks, no files.

Block Krylov on the inverse: the minor end of W is the dominant end of (W Wᵀ)⁻¹, which a factorisation of W applies.
What it finds is judged and refined through W itself in fp64: Rayleigh-Ritz, and corrections from the residual
(Davidson's method), until the residual meets the tolerance. So the factor may be rough: square weights are factored in
fp32. Where the tolerance is not met the fp64 Gram takes over, and a full eigendecomposition at last.
See Golub and Van Loan, "Matrix Computations", 4th ed., 8.6.3 and 10.1 to 10.6.

Shapes: M rows (out features), N columns (in features), K = min(M, N), L = max(M, N), R the adapter's rank, Q columns
of a block. T (K, L) is W or its transpose, whichever is wide: the work is done on W's short side.
Method: Rüdiger and Raschka, "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning", arXiv:2604.01694.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.linalg
import torch

Factor = Literal["lu", "gram", "eigh"]
Operator = Callable[[torch.Tensor], torch.Tensor]

# The angle (radians) to the true subspace that the residual must promise; 1e-7 / gap for columns whose relative gap to
# σ_{K-R} is below 2 %: an fp32 SVD of trained weights is no nearer there (measured).
_TOLERANCE = 5e-6
# What numpy and torch raise where a factorisation or an eigenproblem fails.
FAILURES = (np.linalg.LinAlgError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
# Below this share of the largest singular value, W v has lost its direction to rounding (fp64 Gram: about 1e-8).
_NEGLIGIBLE = 1e-7
_EPS64 = torch.finfo(torch.float64).eps
_SMALL_SIDE = 256  # up to here a full eigendecomposition is cheaper (measured)
_SMALL_ENTRIES = 1 << 20  # up to here W is cast to fp64 once; larger ones a chunk at a time, to save memory
_CHUNK = 1 << 19  # entries of such a chunk: it stays in the cache


class NotFiniteError(ValueError):
    """The matrix holds NaN or Inf."""


@dataclass(frozen=True)
class Solution:
    """A basis and what is known of the spectrum around it."""

    B_MR: torch.Tensor
    """Orthonormal columns, fp32; for the minor subspace by descending singular value."""
    sigma_max: float
    """To a relative 1e-3 or so, from below."""
    sigma_minor: list[float]
    """The R smallest singular values, descending."""
    relative_gap: float | None
    """(σ_{K-R} − σ_{K-R+1}) / σ_{K-R}; None at R = K."""
    residual: float
    """‖W Wᵀ U − U Σ²‖ / σ_max² of the minor vectors U in fp64 (Frobenius norm; on the short side of W)."""
    factor: Factor
    """What was factored: W itself (`lu`, fp32), its Gram (`gram`, Cholesky in fp64), or `eigh`, a full solve of
    the Gram's eigenproblem."""
    unconverged: list[Factor]
    """Factors that were tried before and did not reach the tolerance: with any of them, the solve cost more."""


@dataclass(frozen=True)
class Factored:
    """What is known once a matrix is factored."""

    sigma_max: float
    inverse: Operator
    """X → (T Tᵀ + δ)⁻¹ X, with a shift δ at the level of rounding."""
    start_KQ: torch.Tensor
    """Orthonormal columns, fp64, whose span holds the minor end."""
    factor: Factor


@dataclass(frozen=True)
class _Ritz:
    """Approximate singular triplets by descending singular value, fp64: X on T's short side, Y = Tᵀ X, Z = T Y."""

    X_KQ: torch.Tensor
    Y_LQ: torch.Tensor
    Z_KQ: torch.Tensor
    sigma: torch.Tensor

    def gap(self, r: int) -> float:
        """(σ_{K-R} − σ_{K-R+1}) / σ_{K-R}."""
        above, below = self.sigma[-r - 1 :][:2].tolist()
        return 1 - below / above if above > 0 else 0.0

    def residual_KR(self, r: int) -> torch.Tensor:
        """T Tᵀ x − σ² x of the r last ones."""
        return self.Z_KQ[:, -r:] - self.X_KQ[:, -r:] * self.sigma[-r:] ** 2


def choose_factor(shape: tuple[int, int], r: int) -> Factor:
    """The cheapest factor for a matrix of this shape (measured; see the README's table). Local."""
    k = min(shape)
    is_square = shape[0] == shape[1]
    if k <= (_SMALL_SIDE if is_square else 640) or r > k // 32:
        return "eigh"
    return "lu" if is_square else "gram"


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


def solve(W_MN: torch.Tensor, r: int, subspace: str = "minor", seed: int = 0, factor: Factor | None = None) -> Solution:
    """Find the basis of rank `r` in the named subspace (minor, principal or random) and the minor end of the spectrum.

    See `minor_left_singular_vectors` for the rest. `seed` draws the random subspace; `factor` replaces the choice of
    `choose_factor` where it can: small sides are always solved whole, and only a square matrix has an LU.
    """
    W_MN = W_MN.detach()
    m, n = W_MN.shape
    k = min(m, n)
    if not 1 <= r <= k:
        raise ValueError(f"r={r} is not between 1 and min(out, in)={k}")
    if not torch.stack(W_MN.aminmax()).isfinite().all():  # one pass; NaN is both the least and the largest
        raise NotFiniteError("the matrix holds NaN or Inf")
    T_KL = W_MN if m <= n else W_MN.T
    T64_KL = T_KL.double() if T_KL.numel() <= _SMALL_ENTRIES else T_KL
    first = choose_factor((m, n), r)
    if factor and k > max(_SMALL_SIDE, 4 * block_width(r)) and (factor != "lu" or m == n):
        first = factor
    unconverged: list[Factor] = []
    for attempt in [first, *_AFTER[first]]:
        try:
            factored = _factorise(T_KL if attempt == "lu" else T64_KL, r, attempt)
            minor, is_converged = _refine(T64_KL, factored, r)
        except FAILURES:
            if attempt == "eigh":
                raise
            is_converged = False
        if is_converged:
            break
        unconverged.append(attempt)
    if subspace == "principal":
        U_MR = _principal(T64_KL, r, is_wide=m <= n)
    elif subspace == "random":
        U_MR = torch.linalg.qr(_random(m, r, seed)).Q
    elif m <= n:
        U_MR = minor.X_KQ[:, -r:]
    else:
        U_MR = _long_side(T64_KL, minor, r, factored)
    return _solution(U_MR, minor, factored, r, unconverged)


def factor_gram(G_KK: torch.Tensor, r: int) -> Factored:
    """Factor a Gram matrix T Tᵀ whose T is elsewhere, in its own memory.

    Args:
        G_KK: fp64, column-major; the lower triangle is enough.
        r: at most K / 32.

    Returns: the start for `finish`, once Y = Tᵀ X and Z = T Y are known for its X.
    """
    return _factor_gram(G_KK.numpy(), r, tolerance=1e-8)  # no corrections follow


def finish(factored: Factored, Y_LQ: torch.Tensor, Z_KQ: torch.Tensor, r: int, is_left: bool) -> Solution | None:
    """The minor basis from one product with T, or None where it did not reach the tolerance or T is deficient.

    `is_left`: T is W, and its left vectors X are wanted; otherwise T is W's transpose, and Y / σ are.
    """
    minor = _rayleigh_ritz(factored.start_KQ, Y_LQ, Z_KQ, factored.start_KQ.shape[1])
    is_deficient = bool(minor.sigma[-1] <= _NEGLIGIBLE * factored.sigma_max)
    if is_deficient or not _is_converged(minor, _error(minor, factored, r), factored, r):
        return None
    U_MR = minor.X_KQ[:, -r:] if is_left else torch.linalg.qr(minor.Y_LQ[:, -r:] / minor.sigma[-r:]).Q
    return _solution(U_MR, minor, factored, r, unconverged=[])


def multiply(T_KL: torch.Tensor, X_KQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Y = Tᵀ X (L, Q) and Z = T Y (K, Q) in fp64, in one pass over T (any dtype)."""
    Z_KQ = torch.zeros_like(X_KQ)
    Y_LQ = X_KQ.new_empty(T_KL.shape[1], X_KQ.shape[1])
    done = 0
    for part in _fp64_parts(T_KL, _CHUNK):
        Y_part = torch.mm(part.T, X_KQ, out=Y_LQ[done : done + part.shape[1]])
        Z_KQ.addmm_(part, Y_part)
        done += part.shape[1]
    return Y_LQ, Z_KQ


def block_width(r: int) -> int:
    """Columns of a Krylov block: some more than the basis has, since the last ones converge slowly."""
    return r + max(8, r // 2)


def cost(shape: tuple[int, int], r: int) -> float:
    """Seconds of a solve on one core of the machine that the README's table names, to compare matrices. Local."""
    return sum(amount / _RATES[kind] for kind, amount in work(shape, r).items())


def work(shape: tuple[int, int], r: int) -> dict[str, float]:
    """The work of a solve by kind: floating-point operations, and bytes of the passes that memory limits. Local."""
    k, long = min(shape), max(shape)
    factor = choose_factor(shape, r)
    if factor == "lu":
        return {"lu": 2 / 3 * k**3, "bytes": 4 * k**2 * _PASSES["lu"]}
    if factor == "gram":
        return {"gram": long * k**2, "cholesky": k**3 / 3, "bytes": 8 * k**2 * _PASSES["gram"] + 16 * long * k}
    return {"gram": long * k**2, "eigh": 4 / 3 * k**3}


# Operations (bytes) a second of one core, and how often a solve reads its factor: measured, see tests/benchmarks.
_RATES = {"lu": 120e9, "gram": 85e9, "cholesky": 55e9, "eigh": 23e9, "bytes": 8e9}
_PASSES = {"lu": 40, "gram": 32}
# What takes over where a factor does not reach the tolerance.
_AFTER: dict[Factor, list[Factor]] = {"lu": ["gram", "eigh"], "gram": ["eigh"], "eigh": []}


def _factorise(T_KL: torch.Tensor, r: int, factor: Factor) -> Factored:
    """Factor T and find a start. Raises: LinAlgError where T is singular to the factor's rounding."""
    k = len(T_KL)
    if factor == "lu":
        T32_KK = torch.empty(k, k).copy_(T_KL)  # by rows, however T lies in memory
        largest = _largest(lambda X: (T32_KK @ (T32_KK.T @ X.float())).double(), k)
        inverse = _lu_inverse(T32_KK)
        # fp32 noise stops it soon; corrections through T do the rest
        width = block_width(r)
        steps = min(8, k // 2 // width)
        start_KQ = _krylov(inverse, k, r + 1, width, 1e-3, steps, dtype=torch.float32, first_check=5)
        return Factored(largest**0.5, inverse, torch.linalg.qr(start_KQ.double()).Q, factor)
    G_KK = gram(T_KL)
    if factor == "gram":
        return _factor_gram(G_KK, r, tolerance=1e-6)
    largest = _largest_of_gram(G_KK)
    lowest = min(r + 1, k)  # one more than the basis, for the gap
    minor = scipy.linalg.eigh(G_KK, subset_by_index=[0, lowest - 1], check_finite=False)[1]
    return Factored(largest**0.5, _cholesky_inverse(G_KK, largest), torch.linalg.qr(torch.from_numpy(minor)).Q, factor)


def _factor_gram(G_KK: np.ndarray[Any, Any], r: int, tolerance: float) -> Factored:
    k, width = len(G_KK), block_width(r)
    largest = _largest_of_gram(G_KK)
    inverse = _cholesky_inverse(G_KK, largest)
    start_KQ = _krylov(inverse, k, r + 1, width, tolerance, steps=max(1, k // 2 // width), first_check=8)
    return Factored(largest**0.5, inverse, torch.linalg.qr(start_KQ).Q, "gram")


def gram(T_KL: torch.Tensor) -> np.ndarray[Any, Any]:
    """The lower triangle of T Tᵀ in fp64, column-major for LAPACK. In fp32 it would lose half of its digits."""
    G_KK = np.zeros((len(T_KL), len(T_KL)), order="F")
    for part in _fp64_parts(T_KL, 8 * _CHUNK):
        is_by_rows = part.stride(1) == 1
        by_columns = (part.T if is_by_rows else part).numpy()
        scipy.linalg.blas.dsyrk(1.0, by_columns, beta=1.0, c=G_KK, trans=is_by_rows, lower=True, overwrite_c=True)
    return G_KK


def _cholesky_inverse(G_KK: np.ndarray[Any, Any], largest: float) -> Operator:
    """X → (G + δ)⁻¹ X; G's lower triangle is factored in its own memory when it is first needed."""

    @functools.cache
    def factored() -> torch.Tensor:
        k = len(G_KK)
        # δ keeps a singular Gram positive definite despite rounding, and leaves the eigenvectors alone.
        G_KK[np.diag_indices(k)] += k * _EPS64 * largest or 1.0
        L_KK, failed = scipy.linalg.lapack.dpotrf(G_KK, lower=True, overwrite_a=True, clean=False)
        if failed:
            raise np.linalg.LinAlgError(f"pivot {failed} is not positive")
        return torch.from_numpy(L_KK)

    def inverse(X: torch.Tensor) -> torch.Tensor:
        Y = torch.linalg.solve_triangular(factored(), X, upper=False)
        return torch.linalg.solve_triangular(factored().T, Y, upper=True)

    return inverse


def _lu_inverse(T_KK: torch.Tensor) -> Operator:
    """Factor a square T, fp32, in its own memory. LAPACK works on columns, so it sees the transpose."""
    LU_KK, pivots = (torch.from_numpy(a) for a in scipy.linalg.lapack.sgetrf(T_KK.numpy().T, overwrite_a=True)[:2])
    diagonal = LU_KK.diagonal().abs()
    if diagonal.min() <= torch.finfo(torch.float32).eps ** 0.5 * diagonal.max():
        raise np.linalg.LinAlgError("a pivot vanishes: one direction would drown the others in fp32's rounding")
    pivots += 1  # torch counts from 1

    def inverse(X: torch.Tensor) -> torch.Tensor:
        Y = torch.linalg.lu_solve(LU_KK, pivots, X.float(), adjoint=True)
        return torch.linalg.lu_solve(LU_KK, pivots, Y).to(X.dtype)

    return inverse


def _krylov(
    operator: Operator,
    k: int,
    wanted: int,
    width: int,
    tolerance: float,
    steps: int,
    dtype: torch.dtype = torch.float64,
    first_check: int = 3,
) -> torch.Tensor:
    """The dominant eigenvectors (K, width) of a symmetric positive operator, the first `wanted` to a tolerance.

    Block Lanczos from a fixed random block; each block is orthogonalised against all before it, twice. It ends when the
    residuals of the wanted ones, relative to their eigenvalues, are below the tolerance, or after `steps`.
    """
    block = torch.linalg.qr(_random(k, width, seed=0).to(dtype)).Q
    basis = torch.empty(k, steps * width, dtype=dtype)
    H = torch.zeros(steps * width, steps * width, dtype=dtype)
    next_check = first_check
    for step in range(1, steps + 1):
        known = basis[:, : step * width]
        new = slice((step - 1) * width, step * width)
        basis[:, new] = block
        Y = operator(block)
        coefficients = known.T @ Y
        block, first = torch.linalg.qr(Y.addmm(known, coefficients, alpha=-1))
        # Again, now that the columns are of length 1: where Y vanished (the space is exhausted), they are noise.
        missed = known.T @ block
        block, second = torch.linalg.qr(block.addmm(known, missed, alpha=-1))
        H[: step * width, new] = coefficients + missed @ first
        next_coefficients = second @ first
        if step < min(next_check, steps):
            continue
        next_check = step + 1 + step // 8  # the decomposition below grows with the cube of the step
        values, vectors = torch.linalg.eigh(H[: step * width, : step * width], UPLO="U")
        errors = (next_coefficients @ vectors[-width:, -wanted:]).norm(dim=0)
        if (errors <= tolerance * values[-wanted:].abs()).all():
            break
    return known @ vectors[:, -width:]


def _largest(operator: Operator, k: int) -> float:
    """The largest eigenvalue of a symmetric positive operator, to about 1e-3, from below."""
    if k <= _SMALL_SIDE:
        return float(torch.linalg.eigvalsh(operator(torch.eye(k, dtype=torch.float64)))[-1].clamp(min=0))
    top = _krylov(operator, k, 1, width=8, tolerance=3e-2, steps=16)[:, -1:]
    return float((top.T @ operator(top)).squeeze().clamp(min=0))


def _largest_of_gram(G_KK: np.ndarray[Any, Any]) -> float:
    symm = scipy.linalg.blas.dsymm
    return _largest(lambda X: torch.from_numpy(symm(1.0, G_KK, X.numpy(), lower=True)), len(G_KK))


def _refine(T_KL: torch.Tensor, factored: Factored, r: int, rounds: int = 8) -> tuple[_Ritz, bool]:
    """Rayleigh-Ritz through T, with corrections from the residual until it meets the tolerance."""
    X_KQ = factored.start_KQ
    width = X_KQ.shape[1]
    Y_LQ, Z_KQ = multiply(T_KL, X_KQ)
    for _ in range(rounds):
        ritz = _rayleigh_ritz(X_KQ, Y_LQ, Z_KQ, width)
        if factored.factor == "eigh":
            return ritz, True
        D_KR = _error(ritz, factored, r)
        if _is_converged(ritz, D_KR, factored, r):
            return ritz, True
        for _ in range(2):
            D_KR = torch.linalg.qr(D_KR).Q
            D_KR -= ritz.X_KQ @ (ritz.X_KQ.T @ D_KR)
        D_KR = torch.linalg.qr(D_KR).Q
        Y_LR, Z_KR = multiply(T_KL, D_KR)
        X_KQ = torch.cat([ritz.X_KQ, D_KR], dim=1)
        Y_LQ, Z_KQ = torch.cat([ritz.Y_LQ, Y_LR], dim=1), torch.cat([ritz.Z_KQ, Z_KR], dim=1)
    return ritz, False


def _error(ritz: _Ritz, factored: Factored, r: int) -> torch.Tensor:
    """(T Tᵀ)⁻¹ residual, beyond the columns kept (K, R): component j is (1 − λ / λ_j) of the error's."""
    D_KR = factored.inverse(ritz.residual_KR(r))
    return D_KR - ritz.X_KQ @ (ritz.X_KQ.T @ D_KR)


def _is_converged(ritz: _Ritz, D_KR: torch.Tensor, factored: Factored, r: int) -> bool:
    """Whether the angle to the true subspace is within the tolerance, or the residual at fp64's rounding.

    The angle is estimated from D = `_error`; the share λ / λ_j of the error that it lacks shows in (T Tᵀ)⁻¹ D λ.
    Measured against fp64, the estimate was one to three times the sine of the angle wherever that was below 1e-3.
    """
    if float(ritz.residual_KR(r).norm()) <= 8 * _EPS64 * factored.sigma_max**2:
        return True
    residual_KR, sigma = ritz.residual_KR(r), ritz.sigma[-r:].clamp(min=_NEGLIGIBLE * factored.sigma_max)
    # Column by column, so that the last ones are right as a smaller basis, too, whatever the gap at R.
    gaps = (1 - ritz.sigma[-r:] / ritz.sigma[-r - 1].clamp(min=1e-300)).clamp(min=1e-6)
    bounds = (1e-7 / gaps).clamp(min=_TOLERANCE)
    short_side = D_KR.square().sum(dim=0)
    # On the long side the error is Tᵀ D / σ: its part along σ_j grows by σ_j / σ. And ‖Tᵀ d‖² is residual · d.
    long_side = (residual_KR * D_KR).sum(dim=0).clamp(min=0) / sigma**2
    share = float((torch.maximum(short_side, long_side) / bounds**2).sum().sqrt())
    # The energy by which the left vectors of a tall W exceed the least.
    excess = float((residual_KR.square().sum(dim=0) / sigma**2).sum())
    allowed = 5e-4 * float(sigma.square().sum()) + r * (4 * torch.finfo(torch.float32).eps * factored.sigma_max) ** 2
    if share > 1 or excess > allowed:
        return False  # before the two solves of the estimate
    E_KR = factored.inverse(D_KR) * ritz.sigma[-r:] ** 2
    E_KR -= ritz.X_KQ @ (ritz.X_KQ.T @ E_KR)
    return share <= max(1 - float(E_KR.norm()) / max(float(D_KR.norm()), 1e-300), 1e-3)


def _solution(U_MR: torch.Tensor, minor: _Ritz, factored: Factored, r: int, unconverged: list[Factor]) -> Solution:
    sigma_max = factored.sigma_max
    return Solution(
        B_MR=_fix_signs(U_MR).float().contiguous(),
        sigma_max=sigma_max,
        sigma_minor=minor.sigma[-r:].tolist(),
        relative_gap=None if r == len(minor.X_KQ) else minor.gap(r),
        residual=float(minor.residual_KR(r).norm()) / (sigma_max**2 or 1.0),
        factor=factored.factor,
        unconverged=unconverged,
    )


def _rayleigh_ritz(X_KQ: torch.Tensor, Y_LQ: torch.Tensor, Z_KQ: torch.Tensor, keep: int) -> _Ritz:
    sigma, V_QQ = torch.linalg.svd(torch.linalg.qr(Y_LQ, mode="r").R)[1:]
    rotation = V_QQ.T[:, -keep:]
    return _Ritz(X_KQ @ rotation, Y_LQ @ rotation, Z_KQ @ rotation, sigma[-keep:])


def _times(T_KL: torch.Tensor, Y_LQ: torch.Tensor) -> torch.Tensor:
    """T Y (K, Q) in fp64."""
    Z_KQ = Y_LQ.new_zeros(len(T_KL), Y_LQ.shape[1])
    done = 0
    for part in _fp64_parts(T_KL, _CHUNK):
        Z_KQ.addmm_(part, Y_LQ[done : done + part.shape[1]])
        done += part.shape[1]
    return Z_KQ


def _fp64_parts(T_KL: torch.Tensor, entries: int) -> Iterator[torch.Tensor]:
    """T in fp64, some columns at a time, in the same memory each time: fresh memory costs more than the cast."""
    if T_KL.dtype == torch.float64:
        yield T_KL
        return
    k = len(T_KL)
    size = max(128, entries // k)
    # As T lies in memory: by rows, or by columns where it is the transpose of a tall W.
    buffer = torch.empty((k, size) if T_KL.stride(1) == 1 else (size, k), dtype=torch.float64)
    for part in T_KL.split(size, dim=1):
        whole = part.shape[1] == size
        if T_KL.stride(1) == 1:
            target = buffer if whole else torch.empty(part.shape, dtype=torch.float64)
        else:
            target = buffer[: part.shape[1]].T
        yield target.copy_(part)


def _long_side(T_KL: torch.Tensor, minor: _Ritz, r: int, factored: Factored) -> torch.Tensor:
    """The vectors y / σ of a tall W, orthonormal. Where σ vanishes, y is noise: range(W) is completed instead."""
    sigma = minor.sigma[-r:]
    lost = int((sigma <= _NEGLIGIBLE * factored.sigma_max).sum())
    Y_LR = minor.Y_LQ[:, -r:][:, : r - lost] / sigma[: r - lost]
    if lost:
        filling = _random(len(Y_LR), lost, seed=0)
        for _ in range(3):  # each leaves δ / (σ² + δ) of what lies in range(W), δ being the shift in `inverse`
            filling = torch.linalg.qr(filling).Q
            filling = filling - multiply(T_KL, factored.inverse(_times(T_KL, filling)))[0]
        Y_LR = torch.cat([Y_LR, filling], dim=1)
    return torch.linalg.qr(Y_LR).Q


def _principal(T_KL: torch.Tensor, r: int, is_wide: bool) -> torch.Tensor:
    k = len(T_KL)
    X_KR = scipy.linalg.eigh(gram(T_KL), subset_by_index=[k - r, k - 1], check_finite=False)[1][:, ::-1].copy()
    return torch.from_numpy(X_KR) if is_wide else torch.linalg.qr(multiply(T_KL, torch.from_numpy(X_KR))[0]).Q


def _random(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _fix_signs(U_MR: torch.Tensor) -> torch.Tensor:
    """Make each column's entry of largest magnitude positive: singular vectors are unique only up to sign."""
    largest = U_MR.gather(0, U_MR.abs().argmax(dim=0, keepdim=True))
    return U_MR * torch.where(largest < 0, -1.0, 1.0)
