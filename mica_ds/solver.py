"""The minor left singular vectors of one matrix. Pure tensors; no ranks, no files.

What the inverse iteration on a factor of W finds is judged and refined through W itself in fp64: Rayleigh-Ritz, and
corrections from the residual (Davidson's method), until the residual meets the tolerance. So the factor may be rough:
square weights, and the Grams of others, are factored in fp32. Where the tolerance is not met the fp64 Gram takes over,
and a full eigendecomposition at last.

Shapes: M rows (out features), N columns (in features), K = min(M, N), L = max(M, N), R the adapter's rank, Q columns
of one block or several. T (K, L) is W or its transpose, whichever is wide: the work is done on W's short side.
Method: Rüdiger and Raschka, "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning", arXiv:2604.01694.
"""

from dataclasses import dataclass

import torch

from mica_ds import symmetric
from mica_ds.factor import (
    EPS32,
    EPS64,
    Factor,
    Factored,
    block_width,
    choose_factor,
    factorise,
    gram,
    multiply,
    random_normal,
    times,
)

# The angle (radians) to the true subspace that the residual must promise; 1e-7 / gap for columns whose relative gap to
# σ_{K-R} is below 2 %: an fp32 SVD of trained weights is no nearer there (measured).
_TOLERANCE = 5e-6
# Below this share of the largest singular value, W v has lost its direction to rounding (fp64 Gram: about 1e-8).
_NEGLIGIBLE = 1e-7
_SMALL_SIDE = 256  # up to here always solved whole: 16 blocks of 16 columns must fit in, for σ_max
_SMALL_ENTRIES = 1 << 20  # up to here W is cast to fp64 once; larger ones a chunk at a time, to save memory
_STEPS = 16  # of conjugate gradients for a correction, at most
_REDUCTION = 1e-5  # of the squared residual by them
# What takes over where a factor does not reach the tolerance.
_AFTER: dict[Factor, list[Factor]] = {"lu": ["gram", "eigh"], "gram32": ["gram", "eigh"], "gram": ["eigh"], "eigh": []}


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
    """What was factored: W itself (`lu`, fp32), its Gram by Cholesky (`gram32` in fp32, `gram` in fp64), or `eigh`, a
    full solve of the Gram's eigenproblem."""
    unconverged: list[Factor]
    """Factors that were tried before and did not reach the tolerance: with any of them, the solve cost more."""


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


def minor_left_singular_vectors(W_MN: torch.Tensor, r: int) -> torch.Tensor:
    """The `r` left singular vectors of the smallest singular values of the thin SVD.

    Args:
        W_MN: any floating dtype, finite; where it lies, on the host or on a GPU, it is solved.
        r: between 1 and min(M, N).

    Returns: B (M, r) on the host, fp32, orthonormal, columns by descending singular value; deterministic, each column's
    entry of largest magnitude positive.
    Raises: ValueError where r is out of range or W is not finite.
    """
    return solve(W_MN, r).B_MR


def solve(
    W_MN: torch.Tensor,
    r: int,
    subspace: str = "minor",
    seed: int = 0,
    factor: Factor | None = None,
    gram_KK: torch.Tensor | None = None,
) -> Solution:
    """Find the basis of rank `r` in the named subspace (minor, principal or random) and the minor end of the spectrum.

    See `minor_left_singular_vectors` for the rest. `seed` draws the random subspace; `factor` replaces the choice of
    `choose_factor` where it can: small sides are always solved whole, and only on the host is there an LU, of a square
    matrix, or an fp32 Gram.
    `gram_KK` is what `factor.shared_gram` makes of T, where that is known; it is overwritten.
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
    first = choose_factor((m, n), r, symmetric.on_host(W_MN))
    is_possible = k > max(_SMALL_SIDE, 4 * block_width(r)) and (factor != "lu" or m == n)
    if factor and is_possible and (factor in ("gram", "eigh") or symmetric.on_host(W_MN)):
        first = factor
    unconverged: list[Factor] = []
    known_KQ: torch.Tensor | None = None
    for attempt in [first, *_AFTER[first]]:
        A_KL = T_KL if attempt in ("lu", "gram32") else T64_KL
        found = _attempt(A_KL, T64_KL, r, attempt, gram_KK, known_KQ, is_left=m <= n)
        if isinstance(found, tuple):
            break
        unconverged.append(attempt)
        known_KQ = known_KQ if found is None else found
    assert isinstance(found, tuple)  # the last one does not fail
    factored, minor = found
    if subspace == "principal":
        U_MR = _principal(T64_KL, r, is_wide=m <= n)
    elif subspace == "random":
        U_MR = torch.linalg.qr(random_normal(m, r, seed)).Q
    elif m <= n:
        U_MR = minor.X_KQ[:, -r:]
    else:
        U_MR = _long_side(T64_KL, minor, r, factored)
    return _solution(U_MR, minor, factored, r, unconverged)


def finish(factored: Factored, Y_LQ: torch.Tensor, Z_KQ: torch.Tensor, r: int, is_left: bool) -> Solution | None:
    """The minor basis from one product with T, or None where it did not reach the tolerance or T is deficient.

    `is_left`: T is W, and its left vectors X are wanted; otherwise T is W's transpose, and Y / σ are.
    """
    minor = _rayleigh_ritz(factored.start_KQ, Y_LQ, Z_KQ, factored.start_KQ.shape[1])
    is_deficient = bool(minor.sigma[-1] <= _NEGLIGIBLE * factored.sigma_max)
    D_KQ = _beyond(minor.X_KQ, _error(minor, factored))
    if is_deficient or not _is_converged(minor, D_KQ, factored, r, is_left):
        return None
    U_MR = minor.X_KQ[:, -r:] if is_left else torch.linalg.qr(minor.Y_LQ[:, -r:] / minor.sigma[-r:]).Q
    return _solution(U_MR, minor, factored, r, unconverged=[])


def _attempt(
    T_KL: torch.Tensor,
    T64_KL: torch.Tensor,
    r: int,
    factor: Factor,
    gram_KK: torch.Tensor | None,
    known_KQ: torch.Tensor | None,
    is_left: bool,
) -> tuple[Factored, _Ritz] | torch.Tensor | None:
    """The minor end by one factor, and by what is known of another.

    Where that did not reach the tolerance, the vectors that it came to, or None where there are none; the factor goes.
    """
    try:
        factored = factorise(T_KL, r, factor, gram_KK)
        minor, is_converged = _refine(T64_KL, factored, r, known_KQ, is_left)
    except symmetric.FAILURES:
        if factor == "eigh":
            raise
        return None
    return (factored, minor) if is_converged else minor.X_KQ


def _refine(
    T_KL: torch.Tensor, factored: Factored, r: int, known_KQ: torch.Tensor | None, is_left: bool, rounds: int = 8
) -> tuple[_Ritz, bool]:
    """Rayleigh-Ritz through T, with corrections from the residual until it meets the tolerance."""
    X_KQ = factored.start_KQ
    k, width = X_KQ.shape
    if known_KQ is not None:  # the best of both: a decomposition may be worse than what came near to the tolerance
        X_KQ = torch.linalg.qr(torch.cat([X_KQ, known_KQ], dim=1)).Q
    most = min(2, max(1, k // 2 // width - 1)) * width  # two blocks; with a third at most half of the space
    Y_LQ, Z_KQ = multiply(T_KL, X_KQ)
    for left in reversed(range(rounds)):
        ritz = _rayleigh_ritz(X_KQ, Y_LQ, Z_KQ, most)
        if factored.factor == "eigh":
            return ritz, True
        E_KQ = _error(ritz, factored)
        D_KQ = _beyond(ritz.X_KQ, E_KQ)
        if _is_converged(ritz, D_KQ, factored, r, is_left):
            return ritz, True
        if not left:
            break
        if factored.factor == "gram32":
            D_KQ = _beyond(ritz.X_KQ, _correction(ritz, E_KQ, factored))
        for _ in range(2):
            D_KQ = _beyond(ritz.X_KQ, torch.linalg.qr(D_KQ).Q)
        D_KQ = torch.linalg.qr(D_KQ).Q
        more = multiply(T_KL, D_KQ)
        X_KQ = torch.cat([ritz.X_KQ, D_KQ], dim=1)
        Y_LQ, Z_KQ = (torch.cat(pair, dim=1) for pair in zip((ritz.Y_LQ, ritz.Z_KQ), more, strict=True))
    return ritz, False


def _error(ritz: _Ritz, factored: Factored) -> torch.Tensor:
    """(T Tᵀ)⁻¹ residual (K, Q): beyond the columns kept, its component j is (1 − λ / λ_j) of the error's."""
    return factored.inverse(ritz.residual_KR(factored.start_KQ.shape[1]))


def _beyond(X_KQ: torch.Tensor, A_KQ: torch.Tensor) -> torch.Tensor:
    """What of A is not in the span of X, whose columns are orthonormal."""
    return A_KQ - X_KQ @ (X_KQ.T @ A_KQ)


def _correction(ritz: _Ritz, E_KQ: torch.Tensor, factored: Factored) -> torch.Tensor:
    """(T Tᵀ − λ)⁻¹ residual (K, Q): the error to first order, of which `_error`, E, is a part.

    By conjugate gradients on (I − λ (T Tᵀ)⁻¹) D = E, for all columns at once, with the eigenvectors that are known
    beside the start as preconditioner.
    """
    assert factored.beside
    beside_KQ, inverses = factored.beside
    width = E_KQ.shape[1]
    X_KQ, values = ritz.X_KQ[:, -width:], ritz.sigma[-width:] ** 2
    V_KQ = _beyond(X_KQ, beside_KQ)
    # At most 20 times, and never negative: a rough eigenvalue may come too near to λ, or beyond.
    stretch = 1 / (1 - inverses[:, None] * values).clamp(min=0.05) - 1

    def preconditioned(A_KQ: torch.Tensor) -> torch.Tensor:
        return A_KQ + V_KQ @ (stretch * (V_KQ.T @ A_KQ))

    D_KQ = torch.zeros_like(E_KQ)
    left_KQ = _beyond(X_KQ, E_KQ)
    first = left_KQ.square().sum(dim=0)
    direction_KQ = preconditioned(left_KQ)
    energy = (left_KQ * direction_KQ).sum(dim=0)
    for _ in range(_STEPS):
        image_KQ = direction_KQ - values * _beyond(X_KQ, factored.inverse(direction_KQ))
        curvature = (direction_KQ * image_KQ).sum(dim=0)
        step = torch.where(curvature > 0, energy / curvature, 0.0)  # a start that is too rough may make it negative
        D_KQ += step * direction_KQ
        left_KQ = left_KQ - step * image_KQ
        if ((left_KQ.square().sum(dim=0) <= _REDUCTION * first) | (curvature <= 0)).all():
            break
        next_KQ = preconditioned(left_KQ)
        before, energy = energy, (left_KQ * next_KQ).sum(dim=0)
        direction_KQ = next_KQ + energy / before.clamp(min=1e-300) * direction_KQ
    return D_KQ


def _is_converged(ritz: _Ritz, D_KQ: torch.Tensor, factored: Factored, r: int, is_left: bool) -> bool:
    """Whether the angle to the true subspace is within the tolerance, or the residual at fp64's rounding.

    The angle is estimated from D = `_error`; the share λ / λ_j of the error that it lacks shows in (T Tᵀ)⁻¹ D λ.
    Measured against fp64, the estimate was one to three times the sine of the angle wherever that was below 1e-3.
    """
    residual_KR, D_KR = ritz.residual_KR(r), D_KQ[:, -r:]
    if float(residual_KR.norm()) <= 8 * EPS64 * factored.sigma_max**2:
        return True
    sigma = ritz.sigma[-r:].clamp(min=_NEGLIGIBLE * factored.sigma_max)
    # Column by column, so that the last ones are right as a smaller basis, too, whatever the gap at R.
    gaps = (1 - ritz.sigma[-r:] / ritz.sigma[-r - 1].clamp(min=1e-300)).clamp(min=1e-6)
    bounds = (1e-7 / gaps).clamp(min=_TOLERANCE)
    error = D_KR.square().sum(dim=0)
    excess = (residual_KR * D_KR).sum(dim=0).clamp(min=0)  # ‖Tᵀ d‖²: the energy beyond the least
    if not is_left:  # on the long side the error is Tᵀ D / σ: its part along σ_j grows by σ_j / σ
        error = torch.maximum(error, excess / sigma**2)
        excess = residual_KR.square().sum(dim=0) / sigma**2
    share = float((error / bounds**2).sum().sqrt())
    allowed = 5e-4 * float(sigma.square().sum()) + r * (4 * EPS32 * factored.sigma_max) ** 2
    if share > 1 or float(excess.sum()) > allowed:
        return False  # before the two solves of the estimate
    E_KR = _beyond(ritz.X_KQ, factored.inverse(D_KR) * ritz.sigma[-r:] ** 2)
    return share <= max(1 - float(E_KR.norm()) / max(float(D_KR.norm()), 1e-300), 1e-3)


def _solution(U_MR: torch.Tensor, minor: _Ritz, factored: Factored, r: int, unconverged: list[Factor]) -> Solution:
    sigma_max = factored.sigma_max
    return Solution(
        B_MR=_fix_signs(U_MR).float().contiguous().cpu(),
        sigma_max=sigma_max,
        sigma_minor=minor.sigma[-r:].tolist(),
        relative_gap=None if r == len(minor.X_KQ) else minor.gap(r),
        residual=float(minor.residual_KR(r).norm()) / (sigma_max**2 or 1.0),
        factor=factored.factor,
        unconverged=unconverged,
    )


def _rayleigh_ritz(X_KQ: torch.Tensor, Y_LQ: torch.Tensor, Z_KQ: torch.Tensor, most: int) -> _Ritz:
    R_QQ = torch.linalg.qr(Y_LQ, mode="r").R.cpu()  # a GPU takes longer for an SVD of some dozens of columns
    sigma, V_QQ = (found.to(X_KQ.device) for found in torch.linalg.svd(R_QQ)[1:])
    rotation = V_QQ.T[:, -most:]
    return _Ritz(X_KQ @ rotation, Y_LQ @ rotation, Z_KQ @ rotation, sigma[-most:])


def _long_side(T_KL: torch.Tensor, minor: _Ritz, r: int, factored: Factored) -> torch.Tensor:
    """The vectors y / σ of a tall W, orthonormal. Where σ vanishes, y is noise: range(W) is completed instead."""
    sigma = minor.sigma[-r:]
    lost = int((sigma <= _NEGLIGIBLE * factored.sigma_max).sum())
    assert not lost or factored.factor in ("gram", "eigh")  # a deficient T drowns in fp32
    Y_LR = minor.Y_LQ[:, -r:][:, : r - lost] / sigma[: r - lost]
    if lost:
        filling = random_normal(len(Y_LR), lost, seed=0).to(Y_LR.device)
        for _ in range(3):  # each leaves δ / (σ² + δ) of what lies in range(W), δ being the shift in `inverse`
            filling = torch.linalg.qr(filling).Q
            filling = filling - multiply(T_KL, factored.inverse(times(T_KL, filling)))[0]
        Y_LR = torch.cat([Y_LR, filling], dim=1)
    return torch.linalg.qr(Y_LR).Q


def _principal(T_KL: torch.Tensor, r: int, is_wide: bool) -> torch.Tensor:
    k = len(T_KL)
    X_KR = symmetric.eigenvectors(gram(T_KL), k - r, k - 1)[0].flip(1)
    return X_KR if is_wide else torch.linalg.qr(multiply(T_KL, X_KR)[0]).Q


def _fix_signs(U_MR: torch.Tensor) -> torch.Tensor:
    """Make each column's entry of largest magnitude positive: singular vectors are unique only up to sign."""
    largest = U_MR.gather(0, U_MR.abs().argmax(dim=0, keepdim=True))
    return U_MR * torch.where(largest < 0, -1.0, 1.0)
