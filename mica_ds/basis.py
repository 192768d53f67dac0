"""The bases of all target weights: what is missing in the cache is solved, each matrix once, at its owner.

Each owner writes a matrix's basis as soon as it is solved, so an interrupted run goes on where it stopped.
"""

import functools
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mica_ds import comm, exchange, schedule, solver
from mica_ds.cache import (
    Wanted,
    await_record,
    basis_file,
    make_manifest,
    read_basis,
    read_record,
    refuse_others,
    write_basis,
    write_manifest,
)
from mica_ds.config import AdapterSettings, BasisSettings
from mica_ds.errors import UserError
from mica_ds.files import remove_abandoned
from mica_ds.fingerprint import describe, mixed_sum
from mica_ds.progress import Progress
from mica_ds.shards import Matrix, WeightSource


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
        """B (out, r) of a module, fp32: the last columns of a larger minor basis, the first of a principal one.

        Raises: UserError where the file is damaged, or another's.
        """
        record, B_MR = read_basis(self.folder, name)
        if record["fingerprint"] != self._fingerprints[name] or record["subspace"] != self.manifest["subspace"]:
            raise UserError(f"{basis_file(self.folder, name)} is of another job, which has replaced it; start again")
        is_principal = self.manifest["subspace"] == "principal"
        return (B_MR[:, : self.r] if is_principal else B_MR[:, -self.r :]).contiguous()

    @functools.cached_property
    def _fingerprints(self) -> dict[str, str]:
        return {record["name"]: record["fingerprint"] for record in self.manifest["matrices"]}

    def costs(self) -> dict[str, float]:
        """Seconds, and which rank took the longest for the matrices that it owns (when they were solved). Local."""
        owners = {record["owner"] for record in self.manifest["matrices"]}
        shares = {o: sum(r["seconds"] for r in self.manifest["matrices"] if r["owner"] == o) for o in owners}
        slowest = max(shares, key=shares.__getitem__)
        return {
            "basis_seconds": self.seconds,
            "basis_slowest_rank": slowest,
            "basis_slowest_rank_seconds": shares[slowest],
        }


def build_basis(
    source: WeightSource, adapter: AdapterSettings, settings: BasisSettings, seed: int, folder: Path
) -> Basis:
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
    wanted = Wanted(adapter.r, adapter.subspace, label, seed)
    with comm.failing_together():
        records = {matrix.name: read_record(folder, matrix.name) for matrix in source.matrices}
        views = torch.tensor([(bool(record), wanted.is_served(record)) for record in records.values()]).long()
    # What all ranks see: another job may be writing, and a network file system show it to one rank before another.
    is_cached, is_served = (comm.sum_(views) == comm.world_size()).T.tolist()
    fingerprints = _fingerprints(source, [i for i, it_is in enumerate(is_cached) if it_is], adapter.r)
    with comm.failing_together():
        theirs = {name: record for name, record in records.items() if record and name in fingerprints}
        refuse_others(folder, theirs, fingerprints)
    missing = [i for i, it_is in enumerate(is_served) if not it_is]
    if missing:
        fingerprints |= _solve(source, missing, wanted, settings, folder)
    with comm.failing_together():
        found = {matrix.name: await_record(folder, matrix.name, wanted) for matrix in source.matrices}
        refuse_others(folder, found, fingerprints)  # another job may have written meanwhile
    seconds = max(comm.gather(time.perf_counter() - start))
    manifest = make_manifest(list(found.values()), wanted, seconds)
    with comm.failing_together():
        if comm.is_main():
            write_manifest(folder / "manifest.json", manifest)
    return Basis(folder, adapter.r, manifest, len(missing), seconds)


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


def _solve(
    source: WeightSource, missing: list[int], wanted: Wanted, settings: BasisSettings, folder: Path
) -> dict[str, str]:
    """Solve the given matrices, each at its owner, into the cache, and return their fingerprints. Collective."""
    with comm.failing_together():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned(folder)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    machine = schedule.measure_machine(source.dtype.itemsize, source.is_sliced, settings.device)
    asked = schedule.allowed_exchange(settings, wanted.subspace)
    routes = {i: schedule.choose_route(source.matrices[i], wanted.r, machine, asked) for i in missing}
    with Progress([source.matrices[i] for i in missing], wanted.r) as progress:
        fingerprints, failed = _solve_by_gram(
            source, [i for i in missing if routes[i] == "gram"], wanted, folder, progress
        )
        shipped = [i for i in missing if routes[i] == "ship" or i in failed]
        may_share = schedule.may_share(settings, wanted.subspace)
        assignment = schedule.assign([source.matrices[i] for i in shipped], wanted.r, machine, may_share)
        fingerprints |= _solve_shipped(source, shipped, assignment, wanted, settings, folder, progress)
    return fingerprints


def _solve_shipped(
    source: WeightSource,
    chosen: list[int],
    assignment: schedule.Assignment,
    wanted: Wanted,
    settings: BasisSettings,
    folder: Path,
    progress: Progress,
) -> dict[str, str]:
    matrices = [source.matrices[i] for i in chosen]
    shards = [source.shard(i, owner) for i, owner in zip(chosen, assignment.owners, strict=True)]
    fingerprints: dict[str, str] = {}
    error: Exception | None = None
    for i, receive in exchange.ship(shards, assignment):
        received = receive()  # where this fails the run ends at once: others may wait for what it should have sent
        try:
            if not progress.has_failed():
                fingerprints |= _solve_one(matrices[i], received, wanted, settings, folder)
        except Exception as raised:  # go on: others may still be sending to this rank
            error = error or raised
            progress.fail()
        del received  # before the next one comes
        progress.advance(matrices[i])
    with comm.failing_together():
        if error:
            raise error
    return {name: value for theirs in comm.gather(fingerprints) for name, value in theirs.items()}


def _solve_one(
    matrix: Matrix, received: exchange.Received, wanted: Wanted, settings: BasisSettings, folder: Path
) -> dict[str, str]:
    """Solve a matrix, write it, and return its fingerprint by name."""
    started = time.perf_counter()
    factor = None if settings.factor == "auto" else settings.factor
    try:
        on_device = received.W_MN.to(schedule.choose_device(matrix, settings.device))
        solution = solver.solve(on_device, wanted.r, wanted.subspace, _seed(wanted, matrix), factor, received.gram_KK)
    except solver.NotFiniteError:
        raise UserError(f"model.path: {matrix.name} holds NaN or Inf; copy the checkpoint again") from None
    stored = (on_device.T if matrix.is_transposed else on_device).reshape(-1)
    fingerprint = describe(matrix, stored.dtype, int(mixed_sum(stored, 0)))
    seconds = received.seconds + time.perf_counter() - started
    route = "ship" if received.gram_KK is None else "share"
    write_basis(folder, matrix, solution, wanted, fingerprint, seconds, route)
    return {matrix.name: fingerprint}


def _solve_by_gram(
    source: WeightSource, chosen: list[int], wanted: Wanted, folder: Path, progress: Progress
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
                write_basis(folder, matrix, solution, wanted, fingerprints[matrix.name], seconds, "gram")
            except UserError as raised:  # go on: the others sum with this rank
                error = error or raised
            progress.advance(matrix)
        started = time.perf_counter()
    with comm.failing_together():
        if error:
            raise error
    return fingerprints, set().union(*comm.gather(failed))


def _seed(wanted: Wanted, matrix: Matrix) -> int:
    return wanted.seed + zlib.crc32(matrix.name.encode())


def _fingerprints(source: WeightSource, chosen: list[int], r: int) -> dict[str, str]:
    """A fingerprint of each of some whole matrices, the same for every cut and number of ranks. Collective.

    A sum over the elements of their bits, weighted by their place: the slices' sums add up.
    """
    if not chosen:
        return {}
    owners = schedule.assign_owners([source.matrices[i] for i in chosen], r, comm.world_size())
    shards = [source.shard(i, owner) for i, owner in zip(chosen, owners, strict=True)]
    sums = torch.stack([mixed_sum(shard.read(), shard.bounds[comm.rank()]) for shard in shards])
    comm.sum_(sums)
    return {
        shard.matrix.name: describe(shard.matrix, source.dtype, total)
        for shard, total in zip(shards, sums.tolist(), strict=True)
    }
