"""The bases of all target weights: who solves which, the cache, its manifest.

Each owner writes a matrix's basis as soon as it is solved, one safetensors file a matrix with its record in the header,
so an interrupted run goes on where it stopped. `manifest.json` is written last, from those records. Jobs that share a
cache may work on it at once: a file is replaced whole, and only by one that serves more.
"""

import fcntl
import functools
import hashlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from mica_ds import comm, exchange, solver
from mica_ds.config import AdapterSettings, BasisSettings
from mica_ds.errors import UserError
from mica_ds.shards import Matrix, Source


@dataclass(frozen=True)
class Basis:
    """The bases in a cache, read when they are asked for."""

    folder: Path
    r: int
    manifest: dict[str, Any]
    solved: int
    """Matrices solved now; the others came from the cache."""
    seconds: float
    """Wall time of this call to `build_basis`, the check of the cache included."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """B (out, r) of a module, fp32: the last columns of a larger minor basis, the first of a principal one."""
        with safe_open(_file(self.folder, name), framework="pt") as stored:
            B_MR = stored.get_tensor(name)
        is_principal = self.manifest["subspace"] == "principal"
        return (B_MR[:, : self.r] if is_principal else B_MR[:, -self.r :]).contiguous()


def build_basis(source: Source, adapter: AdapterSettings, settings: BasisSettings, seed: int, folder: Path) -> Basis:
    """Solve each matrix once across the ranks, from their slices, or take it from the cache. Collective.

    Args:
        source: the target weights, partitioned or in files.
        adapter: gives `r` and `subspace`.
        settings: route and factor, where they are not left to the engine.
        seed: draws the random subspace; unused for the others.
        folder: the cache, on storage that all ranks share.

    Raises: UserError where the cache was made from other weights, or a weight holds NaN or Inf (by name).
    """
    start = time.perf_counter()
    label = f"random, seed {seed}" if adapter.subspace == "random" else adapter.subspace
    wanted = _Wanted(adapter.r, adapter.subspace, label, seed)
    with comm.failing_together():
        records = {matrix.name: _read_record(folder, matrix.name) for matrix in source.matrices}
    cached = [i for i, matrix in enumerate(source.matrices) if records[matrix.name]]
    fingerprints = _fingerprints(source, cached, adapter.r)
    with comm.failing_together():
        _refuse_others(folder, {name: record for name, record in records.items() if record}, fingerprints)
    missing = [i for i, matrix in enumerate(source.matrices) if not wanted.is_served(records[matrix.name])]
    if missing:
        fingerprints |= _solve(source, missing, wanted, settings, folder)
    with comm.failing_together():
        found = {matrix.name: _await_record(folder, matrix.name, wanted) for matrix in source.matrices}
        _refuse_others(folder, found, fingerprints)  # another job may have written meanwhile
    seconds = max(comm.gather(time.perf_counter() - start))
    manifest = _manifest(list(found.values()), wanted, seconds)
    with comm.failing_together():
        if comm.is_main():
            _write_manifest(folder / "manifest.json", manifest)
    return Basis(folder, adapter.r, manifest, len(missing), seconds)


def load_basis(folder: Path, r: int) -> Basis:
    """The bases of rank `r` that an earlier run left in `folder`. Local. Raises: UserError where they are missing."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no finished bases; run `mica-ds basis` or `mica-ds train` first") from None
    if manifest["r"] < r:
        raise UserError(f"{folder} holds bases of r = {manifest['r']}, which is less than adapter.r={r}")
    return Basis(folder, r, manifest, solved=0, seconds=0.0)


def warnings(manifest: dict[str, Any]) -> list[str]:
    """What a user should know of the bases, one line each. Local."""
    records = manifest["matrices"]
    eps = torch.finfo(torch.float32).eps
    if manifest["subspace"] != "minor":
        return []
    deficient = [r for r in records if r["sigma_minor"][-1] <= eps * r["sigma_max"]]
    # Rounding W to fp32 turns such a basis by a tenth of a radian or more.
    loose = [
        r
        for r in records
        if r["relative_gap"] is not None and r["relative_gap"] * r["sigma_minor"][0] <= 10 * eps * r["sigma_max"]
    ]
    fallen_back = [r for r in records if r["unconverged"]]
    lines = []
    for found, what in [
        (deficient, "rank-deficient to fp32 accuracy: B holds directions that the weight never writes"),
        (loose, "with a gap at r so small that the basis is not unique: another r may cut the spectrum better"),
        (fallen_back, "did not converge with the first factor and took a slower one"),
    ]:
        if found:
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            lines.append(f"bases: {found[0]['name']}{others}: {what}")
    return lines


@dataclass(frozen=True)
class _Wanted:
    """What this run asks of the cache."""

    r: int
    subspace: str
    label: str
    """The subspace, with its seed where it is random."""
    seed: int

    def is_served(self, record: dict[str, Any] | None) -> bool:
        """A larger basis serves every smaller r, except a random one, which is drawn for its r."""
        if record is None or record["subspace"] != self.label:
            return False
        return record["r"] == self.r or (record["r"] > self.r and self.subspace != "random")


def _solve(
    source: Source, missing: list[int], wanted: _Wanted, settings: BasisSettings, folder: Path
) -> dict[str, str]:
    """Solve the given matrices, each at its owner, into the cache, and return their fingerprints. Collective."""
    with comm.failing_together():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    machine = exchange.measure_machine(source.dtype.itemsize)
    # A file's reader has the whole matrix; and a Gram gives the minor vectors alone.
    may_sum = source.is_sliced and wanted.subspace == "minor" and settings.factor in ("auto", "gram")
    asked = settings.exchange if may_sum else "ship"
    routes = {i: exchange.choose_route(source.matrices[i], wanted.r, machine, asked) for i in missing}
    with _Progress([source.matrices[i] for i in missing], wanted.r) as progress:
        fingerprints, failed = _solve_by_gram(
            source, [i for i in missing if routes[i] == "gram"], wanted, folder, progress
        )
        shipped = [i for i in missing if routes[i] == "ship" or i in failed]
        fingerprints |= _solve_shipped(source, shipped, wanted, settings, folder, progress)
    return fingerprints


def _solve_shipped(
    source: Source, chosen: list[int], wanted: _Wanted, settings: BasisSettings, folder: Path, progress: "_Progress"
) -> dict[str, str]:
    matrices = [source.matrices[i] for i in chosen]
    owners = exchange.assign_owners(matrices, wanted.r, comm.world_size())
    fingerprints: dict[str, str] = {}
    error: Exception | None = None
    for i, receive in exchange.ship([source.shard(i, owner) for i, owner in zip(chosen, owners, strict=True)], owners):
        try:
            fingerprints |= _solve_one(matrices[i], receive(), wanted, settings, folder, skip=progress.has_failed())
        except Exception as raised:  # go on: others may still be sending to this rank
            error = error or raised
            progress.fail()
        progress.advance(matrices[i])
    with comm.failing_together():
        if error:
            raise error
    return {name: value for theirs in comm.gather(fingerprints) for name, value in theirs.items()}


def _solve_one(
    matrix: Matrix, W: torch.Tensor, wanted: _Wanted, settings: BasisSettings, folder: Path, skip: bool
) -> dict[str, str]:
    """Solve a matrix, write it, and return its fingerprint by name; `skip` where it was only to be received."""
    if skip:
        return {}
    started = time.perf_counter()
    factor = None if settings.factor == "auto" else settings.factor
    try:
        solution = solver.solve(W, wanted.r, wanted.subspace, _seed(wanted, matrix), factor)
    except solver.NotFiniteError:
        raise UserError(f"model.path: {matrix.name} holds NaN or Inf; copy the checkpoint again") from None
    stored = (W.T if matrix.is_transposed else W).reshape(-1)
    fingerprint = _describe(matrix, stored.dtype, int(_mixed_sum(stored, 0)))
    _write(folder, matrix, solution, wanted, fingerprint, time.perf_counter() - started, "ship")
    return {matrix.name: fingerprint}


def _solve_by_gram(
    source: Source, chosen: list[int], wanted: _Wanted, folder: Path, progress: "_Progress"
) -> tuple[dict[str, str], set[int]]:
    """Also returns those that did not converge."""
    fingerprints = _fingerprints(source, chosen, wanted.r)
    owners = [place % comm.world_size() for place in range(len(chosen))]
    shards = [source.shard(i, owner) for i, owner in zip(chosen, owners, strict=True)]
    failed: set[int] = set()
    error: Exception | None = None
    started = time.perf_counter()
    for place, solution in exchange.sum_grams(shards, owners, wanted.r):
        matrix, seconds = source.matrices[chosen[place]], time.perf_counter() - started
        if solution is None:
            failed.add(chosen[place])
        else:
            try:
                _write(folder, matrix, solution, wanted, fingerprints[matrix.name], seconds, "gram")
            except UserError as raised:  # go on: the others sum with this rank
                error = error or raised
            progress.advance(matrix)
        started = time.perf_counter()
    with comm.failing_together():
        if error:
            raise error
    return fingerprints, set().union(*comm.gather(failed))


def _seed(wanted: _Wanted, matrix: Matrix) -> int:
    return wanted.seed + zlib.crc32(matrix.name.encode())


# One number that all ranks share: failures, solved matrices and their costs (ms), in one count a matrix.
_FAILED, _ONE = 1 << 50, 1 << 34


class _Progress:
    """One bar on rank 0 over the matrices of all ranks, with the time left by their costs; a context manager."""

    _calls = itertools.count()

    def __init__(self, matrices: list[Matrix], r: int) -> None:
        self._key = f"bases-{next(self._calls)}"  # the same on all ranks: they call in step
        self._r = r
        self._matrices = len(matrices)
        self._total = sum(map(self._cost, matrices))
        self._state = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def advance(self, matrix: Matrix) -> None:
        """Count a solved matrix. Local."""
        self._state = comm.count(self._key, _ONE + self._cost(matrix))

    def fail(self) -> None:
        """Tell all ranks that one has failed. Local."""
        self._state = comm.count(self._key, _FAILED)

    def has_failed(self) -> bool:
        """Whether any rank had failed when this one last counted. Local."""
        return self._state >= _FAILED

    def _cost(self, matrix: Matrix) -> int:
        return 1 + int(1e3 * solver.cost(matrix.shape, self._r))

    def _show(self) -> None:
        interval = 0.5 if sys.stderr.isatty() else 10.0  # a log is not a terminal
        layout = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
        with tqdm(total=self._total, desc="bases", bar_format=layout) as bar:
            while True:
                is_over = self._is_over.wait(interval)
                solved, cost = divmod(comm.count(self._key) % _FAILED, _ONE)
                bar.set_description_str(f"bases: {solved}/{self._matrices} matrices", refresh=False)
                bar.n = cost
                bar.refresh()
                if is_over:
                    return

    def __enter__(self) -> "_Progress":
        if comm.is_main():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if comm.is_main():
            self._thread.join()


def _fingerprints(source: Source, chosen: list[int], r: int) -> dict[str, str]:
    """A fingerprint of each of some whole matrices, the same for every cut and number of ranks. Collective.

    A sum over the elements of their bits, weighted by their place: the slices' sums add up.
    """
    if not chosen:
        return {}
    owners = exchange.assign_owners([source.matrices[i] for i in chosen], r, comm.world_size())
    shards = [source.shard(i, owner) for i, owner in zip(chosen, owners, strict=True)]
    sums = torch.stack([_mixed_sum(shard.read(), shard.bounds[comm.rank()]) for shard in shards])
    comm.sum_(sums)
    return {
        shard.matrix.name: _describe(shard.matrix, source.dtype, total)
        for shard, total in zip(shards, sums.tolist(), strict=True)
    }


def _describe(matrix: Matrix, dtype: torch.dtype, total: int) -> str:
    return hashlib.sha256(f"{matrix.name} {matrix.stored_shape} {dtype} {total}".encode()).hexdigest()


def _mixed_sum(values: torch.Tensor, start: int) -> torch.Tensor:
    """A sum, modulo 2⁶⁴, of each element's bits times an odd weight that belongs to its place in the whole matrix."""
    integers = {2: torch.int16, 4: torch.int32}[values.element_size()]
    weights = _weights()
    total = torch.zeros((), dtype=torch.int64)
    done = 0
    while done < len(values):
        chunk, place = divmod(start + done, len(weights))
        bits = values[done : done + len(weights) - place].view(integers)
        done += len(bits)
        total += (bits * weights[place : place + len(bits)]).sum() * _mix(torch.tensor(chunk + 1))
    return total


@functools.cache
def _weights() -> torch.Tensor:
    return _mix(torch.arange(1, 1 + (1 << 16)))


def _mix(numbers: torch.Tensor) -> torch.Tensor:
    """Odd pseudo-random 64-bit integers (splitmix64)."""
    mixed = numbers * -7046029254386353131
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return mixed | 1


def _refuse_others(folder: Path, records: dict[str, dict[str, Any]], fingerprints: dict[str, str]) -> None:
    """Refuse a cache that was made from other weights. Local."""
    for name, record in records.items():
        if record["fingerprint"] != fingerprints[name]:
            raise UserError(
                f"{folder} holds bases of another base model ({name} differs), or of another model.dtype; "
                "give this run its own output_dir, or delete that folder"
            )


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _write(
    folder: Path,
    matrix: Matrix,
    solution: solver.Solution,
    wanted: _Wanted,
    fingerprint: str,
    seconds: float,
    route: str,
) -> None:
    record = {
        "name": matrix.name,
        "shape": list(matrix.shape),
        "r": wanted.r,
        "sigma_max": solution.sigma_max,
        "sigma_minor": solution.sigma_minor,
        "relative_gap": solution.relative_gap,
        "residual": solution.residual,
        "seconds": seconds,
        "owner": comm.rank(),
        "exchange": route,
        "factor": solution.factor,
        "unconverged": solution.unconverged,
        "fingerprint": fingerprint,
        "digest": hashlib.sha256(solution.B_MR.numpy().tobytes()).hexdigest(),
        "subspace": wanted.label,
    }
    file = _file(folder, matrix.name)
    # A name of its own: two jobs on one cache must not write into one file.
    partial = file.with_suffix(f".{socket.gethostname()}-{os.getpid()}.partial")
    try:
        save_file({matrix.name: solution.B_MR}, partial, metadata={"record": json.dumps(record)})
        with _locked(folder):
            current = _read_record(folder, matrix.name)
            if current and wanted.is_served(current) and current["fingerprint"] == fingerprint:
                partial.unlink()  # another job was faster, perhaps with a larger r
            else:
                os.replace(partial, file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be written: {error}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other jobs from replacing a basis meanwhile, where the file system knows locks."""
    with open(folder / ".lock", "w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _await_record(folder: Path, name: str, wanted: _Wanted, limit: float = 90) -> dict[str, Any]:
    """The record that an owner has written; a network file system may show it to other nodes only after a minute."""
    deadline = time.monotonic() + limit
    while not wanted.is_served(record := _read_record(folder, name)):
        if time.monotonic() > deadline:
            reason = "another job replaced" if record else "the ranks do not share, or another job removed"
            raise UserError(f"{_file(folder, name)} is not what this run solved: a file that {reason}; start again")
        time.sleep(1)
    assert record is not None
    return record


def _read_record(folder: Path, name: str) -> dict[str, Any] | None:
    file = _file(folder, name)
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            return json.loads(stored.metadata()["record"])
    except (SafetensorError, TypeError, KeyError, ValueError):
        raise UserError(f"{file} is damaged; delete it, and the next run solves it again") from None


def _manifest(records: list[dict[str, Any]], wanted: _Wanted, seconds: float) -> dict[str, Any]:
    def whole(key: str) -> str:
        return hashlib.sha256("".join(record[key] for record in records).encode()).hexdigest()

    return {
        "fingerprint": whole("fingerprint"),
        "digest": whole("digest"),
        "r": wanted.r,
        "subspace": wanted.label,
        "seconds": seconds,
        "world_size": comm.world_size(),
        "matrices": [_cut(record, wanted) for record in records],
    }


def _write_manifest(file: Path, manifest: dict[str, Any]) -> None:
    """Write it, unless the file says the same of the matrices already."""
    with suppress(OSError, ValueError, KeyError):
        if json.loads(file.read_text())["matrices"] == manifest["matrices"]:
            return
    partial = file.with_suffix(f".{socket.gethostname()}-{os.getpid()}.partial")
    partial.write_text(json.dumps(manifest, indent=1))
    os.replace(partial, file)


def _cut(record: dict[str, Any], wanted: _Wanted) -> dict[str, Any]:
    """The record of the first or last columns of a larger basis."""
    larger, r = record["r"], wanted.r
    if larger == r:
        return record
    above, first = record["sigma_minor"][-r - 1], record["sigma_minor"][-r]
    gap = (above - first) / max(above, 1e-300)
    return {**record, "r": r, "sigma_minor": record["sigma_minor"][-r:], "relative_gap": gap}
