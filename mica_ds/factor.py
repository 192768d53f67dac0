"""What a matrix is factored into, and the inverse iteration on it. Pure tensors; no ranks, no files.

Block Krylov on the inverse: the minor end of W is the dominant end of (W Wᵀ)⁻¹, which a factorisation of W applies.
A rough start is enough, since `solver` refines what comes out of here through W itself.
See Golub and Van Loan, "Matrix Computations", 4th ed., 8.6.3 and 10.1 to 10.6.

Shapes: M rows (out features), N columns (in features), K = min(M, N), L = max(M, N), R the adapter's rank, Q columns
of a block. T (K, L) is W or its transpose, whichever is wide: the work is done on W's short side.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import torch

from mica_ds import symmetric

Factor = Literal["lu", "gram32", "gram", "eigh"]
Operator = Callable[[torch.Tensor], torch.Tensor]

EPS32 = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps
_MOST_STEPS = 64  # of block Krylov on an fp32 Gram, where corrections follow
_DROWNED = 0.1  # the share of a Gram's least eigenvalue from which fp32's rounding is too much
SHARED = 1 / 4
"""The part of a Gram that a second rank may sum: a larger one balances the ranks worse where they own few matrices."""
_CHUNK = 1 << 19  # entries that are cast at a time, to stay in the cache; for a Gram more


@dataclass(frozen=True)
class Factored:
    """What is known once a matrix is factored."""

    sigma_max: float
    inverse: Operator
    """X → (T Tᵀ + δ)⁻¹ X, with a shift δ at the level of rounding."""
    start_KQ: torch.Tensor
    """Orthonormal columns, fp64, whose span holds the minor end."""
    factor: Factor
    beside: tuple[torch.Tensor, torch.Tensor] | None = None
    """Rough eigenvectors next to the start's (K, Q), and their eigenvalues of `inverse`, fp64. Only of `gram32`, whose
    corrections converge sooner with them."""


def choose_factor(shape: tuple[int, int], r: int, on_host: bool = True) -> Factor:
    """The cheapest factor for a matrix of this shape (measured; see the README's table). Local.

    A GPU with fp64 units makes a Gram faster than it factors an LU.
    """
    k = min(shape)
    if k <= 640 or r > k // 32:
        return "eigh"
    if not on_host:
        return "gram"
    return "lu" if shape[0] == shape[1] else "gram32"


def block_width(r: int) -> int:
    """Columns of a block: some more than the basis has, since the last ones converge slowly.

    A multiple of 24, for other widths MKL takes up to twice as long on AMD (fp64, measured).
    """
    return -(-(r + 8) // 24) * 24


def cost(shape: tuple[int, int], r: int) -> float:
    """Seconds of a solve by `RATES`, to compare matrices. Local."""
    return seconds(work(shape, r), RATES)


def seconds(work: dict[str, float], rates: dict[str, float]) -> float:
    """The time that some work takes at these rates. Local."""
    return sum(amount / rates[kind] for kind, amount in work.items())


def work(shape: tuple[int, int], r: int) -> dict[str, float]:
    """The work of a solve by kind: floating-point operations, and bytes of the passes over W and its factor. Local."""
    k, long = min(shape), max(shape)
    factor = choose_factor(shape, r)
    if factor == "lu":
        return {"lu": 2 / 3 * k**3, "bytes": 4 * k**2 * _PASSES["lu"]}
    if factor == "gram32":
        return {"gram32": long * k**2, "cholesky32": k**3 / 3, "bytes": 4 * k**2 * _PASSES["gram32"] + 16 * long * k}
    return {"gram": long * k**2, "eigh": 4 / 3 * k**3}


# Operations (bytes) a second of one core of an AMD EPYC with AVX2, and how often a solve reads its factor or as much:
# measured, see tests/benchmarks.
RATES = {"lu": 87e9, "gram32": 99e9, "cholesky32": 101e9, "gram": 43e9, "eigh": 20e9, "bytes": 3.3e9}
_PASSES = {"lu": 40, "gram32": 54}


def factorise(T_KL: torch.Tensor, r: int, factor: Factor, gram_KK: torch.Tensor | None = None) -> Factored:
    """Factor T and find a start; `gram_KK` is what `shared_gram` makes of T, where that is known.

    Raises: LinAlgError where T is singular to the factor's rounding.
    """
    k = len(T_KL)
    if factor == "lu":
        T32_KK = torch.empty(k, k).copy_(T_KL)  # by rows, however T lies in memory
        largest = _largest(lambda X: (T32_KK @ (T32_KK.T @ X.float())).double(), random_normal(k, 16, seed=0))
        inverse = _lu_inverse(T32_KK)
        # fp32 noise stops it soon; corrections through T do the rest
        width = block_width(r)
        steps = min(8, k // 2 // width)
        found_KQ = _krylov(inverse, random_normal(k, width, seed=0).float(), r + 1, 1e-3, steps, first_check=5)[1]
        return _factored(largest, inverse, found_KQ[:, -width:], factor)
    if factor == "gram32":
        return factor_gram(shared_gram(T_KL) if gram_KK is None else gram_KK, r, tolerance=1e-3)
    if factor == "gram":
        return factor_gram(gram(T_KL), r, tolerance=1e-6)
    minor, largest = symmetric.eigenvectors(gram(T_KL), 0, min(block_width(r), k) - 1)
    factored = functools.cache(lambda: _cholesky(gram(T_KL), largest))  # made where it is needed, for a deficient T
    return _factored(largest, lambda X: symmetric.solve(factored(), X), minor, factor)


def factor_gram(G_KK: torch.Tensor, r: int, tolerance: float) -> Factored:
    """Factor a Gram T Tᵀ (fp64 or fp32, column-major; the lower triangle is enough), and find a start.

    On the host it is done in the Gram's own memory. `r` is at most K / 32. `tolerance` is of the start's residuals,
    relative to their eigenvalues: where corrections through T follow, a rough one is enough.

    Raises: LinAlgError where a pivot is not positive, or fp32's range or rounding loses the minor end.
    """
    k, width = len(G_KK), block_width(r)
    if G_KK.dtype == torch.float32 and not 1e-20 < G_KK.diagonal().max() < 1e20:  # fp32 ends at 1e-38 and 3e38
        raise np.linalg.LinAlgError("squares of such values leave the range of fp32")
    largest = _largest_of_gram(G_KK)
    inverse = functools.partial(symmetric.solve, _cholesky(G_KK, largest))
    start_KQ = random_normal(k, width, seed=0).to(G_KK)
    steps = max(1, k // 2 // width)
    if G_KK.dtype == torch.float32:
        steps = min(steps, _MOST_STEPS)
    values, found_KQ = _krylov(inverse, start_KQ, r + 1, tolerance, steps, first_check=8)
    start_KQ = found_KQ[:, -width:]
    if G_KK.dtype == torch.float64:
        return _factored(largest, inverse, start_KQ, "gram")
    if not EPS32 * largest * float(values[-1]) <= _DROWNED:
        raise np.linalg.LinAlgError("fp32's rounding drowns the minor end")
    beside = found_KQ[:, :-width].double(), values[:-width].double()
    return _factored(largest * (1 - 1e-5), inverse, start_KQ, "gram32", beside)  # from below, whatever G's rounding


def _factored(
    largest: float,
    inverse: Operator,
    start_KQ: torch.Tensor,
    factor: Factor,
    beside: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Factored:
    start_KQ = torch.linalg.qr(start_KQ.double()).Q
    return Factored(largest**0.5, lambda X: inverse(X).double(), start_KQ, factor, beside)


def gram(T_KL: torch.Tensor, dtype: torch.dtype = torch.float64, to_lower: bool = True) -> torch.Tensor:
    """A triangle of T Tᵀ, with zeros in the other one (on a GPU all of it)."""
    return _add_gram(symmetric.zeros(len(T_KL), T_KL.device, dtype), T_KL, to_lower)


def _add_gram(G_KK: torch.Tensor, T_KL: torch.Tensor, to_lower: bool) -> torch.Tensor:
    for part in _parts(T_KL, 8 * _CHUNK, G_KK.dtype):
        symmetric.add_gram(G_KK, part, to_lower)
    return G_KK


def first_columns(long: int) -> int:
    """How many columns of T its owner sums the Gram of; `SHARED` are the others. Local."""
    return long - int(SHARED * long)


def shared_gram(T_KL: torch.Tensor) -> torch.Tensor:
    """The lower triangle of T Tᵀ in fp32, as the sum of two: of the first columns of T, and of the last quarter.

    Two ranks may sum one each, and get the same bits (`exchange`). The last quarter's takes the place of the upper
    triangle, and is left there. On the host.
    """
    first = first_columns(T_KL.shape[1])
    G_KK = gram(T_KL[:, :first], torch.float32)
    diagonal = G_KK.diagonal().clone()
    G_KK.diagonal().zero_()
    _add_gram(G_KK, T_KL[:, first:], to_lower=False)
    for rows in symmetric.strips(len(G_KK)):
        symmetric.add_strip(G_KK, rows, symmetric.read_strip(G_KK, rows))
    G_KK.diagonal().add_(diagonal)
    return G_KK


def _cholesky(G_KK: torch.Tensor, largest: float) -> torch.Tensor:
    """What `symmetric.cholesky` makes of G + δ, and of its memory."""
    # δ keeps a singular Gram positive definite despite rounding, and leaves the eigenvectors alone. fp32's rounding
    # would need one as large as the minor end; there a singular Gram fails.
    if G_KK.dtype == torch.float64:
        G_KK.diagonal().add_(len(G_KK) * EPS64 * largest or 1.0)
    return symmetric.cholesky(G_KK)


def _lu_inverse(T_KK: torch.Tensor) -> Operator:
    """X → (T Tᵀ)⁻¹ X in fp32; T is factored in its own memory. LAPACK works on columns, so it sees the transpose."""
    LU_KK, pivots = (torch.from_numpy(a) for a in scipy.linalg.lapack.sgetrf(T_KK.numpy().T, overwrite_a=True)[:2])
    diagonal = LU_KK.diagonal().abs()
    if diagonal.min() <= EPS32**0.5 * diagonal.max():
        raise np.linalg.LinAlgError("a pivot vanishes: one direction would drown the others in fp32's rounding")
    pivots += 1  # torch counts from 1

    def inverse(X: torch.Tensor) -> torch.Tensor:
        return torch.linalg.lu_solve(LU_KK, pivots, torch.linalg.lu_solve(LU_KK, pivots, X.float(), adjoint=True))

    return inverse


def _krylov(
    operator: Operator, start_KQ: torch.Tensor, wanted: int, tolerance: float, steps: int, first_check: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The dominant eigenvalues and eigenvectors (K, Q) of a symmetric positive operator, ascending: of four blocks at
    most the last holds those that are `wanted`, to a tolerance, and the others precondition.

    Block Lanczos from a random block, in its dtype and on its device; each block is orthogonalised against all before
    it, twice. It ends when the residuals of the wanted ones, relative to their eigenvalues, are below the tolerance, or
    after `steps`.
    """
    block = torch.linalg.qr(start_KQ).Q
    k, width = block.shape
    basis = block.new_empty(k, steps * width)
    H = block.new_empty(steps * width, steps * width)  # its upper triangle alone is used
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
    return values[-4 * width :], known @ vectors[:, -4 * width :]


def _largest(operator: Operator, start_KQ: torch.Tensor) -> float:
    """The largest eigenvalue of a symmetric positive operator, to about 1e-3, from below."""
    values, _ = _krylov(operator, start_KQ, 1, tolerance=3e-2, steps=16, first_check=2)
    return float(values[-1].clamp(min=0))


def _largest_of_gram(G_KK: torch.Tensor) -> float:
    # MKL takes twice as long on AMD for columns that are no multiple of 12 (fp64, measured).
    return _largest(functools.partial(symmetric.times, G_KK), random_normal(len(G_KK), 12, seed=0).to(G_KK))


def multiply(T_KL: torch.Tensor, X_KQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Y = Tᵀ X (L, Q) and Z = T Y (K, Q) in fp64, in one pass over T (any dtype)."""
    Z_KQ = torch.zeros_like(X_KQ)
    Y_LQ = X_KQ.new_empty(T_KL.shape[1], X_KQ.shape[1])
    done = 0
    for part in _parts(T_KL, _CHUNK, torch.float64):
        Y_part = torch.mm(part.T, X_KQ, out=Y_LQ[done : done + part.shape[1]])
        Z_KQ.addmm_(part, Y_part)
        done += part.shape[1]
    return Y_LQ, Z_KQ


def times(T_KL: torch.Tensor, Y_LQ: torch.Tensor) -> torch.Tensor:
    """T Y (K, Q) in fp64."""
    Z_KQ = Y_LQ.new_zeros(len(T_KL), Y_LQ.shape[1])
    done = 0
    for part in _parts(T_KL, _CHUNK, torch.float64):
        Z_KQ.addmm_(part, Y_LQ[done : done + part.shape[1]])
        done += part.shape[1]
    return Z_KQ


def _parts(T_KL: torch.Tensor, entries: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """T in this dtype, some columns at a time, in the same memory each time: fresh memory costs more than the cast.

    Where it needs no cast, views of T: of all of it in fp64, which is small, and else of columns that lie together.
    """
    if T_KL.dtype == torch.float64 == dtype:
        yield T_KL
        return
    k = len(T_KL)
    if not symmetric.on_host(T_KL):  # no cache to stay in: few large kernels
        entries = max(16 * entries, 1 << 24)
    size = min(max(128, entries // k), T_KL.shape[1])
    if T_KL.dtype == dtype and T_KL.T.is_contiguous():
        yield from T_KL.split(size, dim=1)
        return
    # As T lies in memory: by rows, or by columns where it is the transpose of a tall W.
    shape = (k, size) if T_KL.stride(1) == 1 else (size, k)
    buffer = torch.empty(shape, dtype=dtype, device=T_KL.device)
    for part in T_KL.split(size, dim=1):
        whole = part.shape[1] == size
        if T_KL.stride(1) == 1:
            target = buffer if whole else buffer.new_empty(part.shape)
        else:
            target = buffer[: part.shape[1]].T
        yield target.copy_(part)


def random_normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
