"""The bases of all target weights: who solves which, the cache, its manifest.

Each owner writes a matrix's basis as soon as it is solved, one safetensors file a matrix with its record in the header,
so an interrupted run goes on where it stopped. `manifest.json` is written last, from those records.
"""

import hashlib
import json
import os
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from mica_ds import comm, solver
from mica_ds.config import AdapterSettings
from mica_ds.errors import UserError
from mica_ds.exchange import assign_owners, ship
from mica_ds.shards import Shard, read_shard


@dataclass(frozen=True)
class Basis:
    """The bases in a run folder, read when they are asked for."""

    folder: Path
    manifest: dict[str, Any]
    solved: int
    """Matrices solved now; the others came from the cache."""
    seconds: float
    """Wall time of this call to `build_basis`, the check of the cache included."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """B (out, r) of a module, fp32."""
        with safe_open(_file(self.folder, name), framework="pt") as stored:
            return stored.get_tensor(name)


def build_basis(modules: dict[str, nn.Module], adapter: AdapterSettings, seed: int, folder: Path) -> Basis:
    """Solve each target weight once across the ranks, from ZeRO-3's partitions, or take it from the cache. Collective.

    Args:
        modules: the target linear modules by name, under ZeRO-3.
        adapter: gives `r` and `subspace`.
        seed: draws the random subspace; unused for the others.
        folder: the cache, on storage that all ranks share.

    Raises: UserError where the cache was made from other weights.
    """
    start = time.perf_counter()
    shards = [read_shard(name, module) for name, module in modules.items()]
    fingerprints = _fingerprints(shards)
    with comm.failing_together():
        missing = _missing(shards, fingerprints, adapter, seed, folder)
    if missing:
        _solve(missing, shards, fingerprints, adapter, seed, folder)
    with comm.failing_together():
        records = [_await_record(folder, shard.name) for shard in shards]
    seconds = time.perf_counter() - start
    manifest_file = folder / "manifest.json"
    if comm.is_main() and (missing or not _is_of(manifest_file, records)):
        _write_manifest(manifest_file, records, adapter, seconds)
    comm.barrier()
    return Basis(folder, json.loads(manifest_file.read_text()), len(missing), seconds)


def load_basis(folder: Path) -> Basis:
    """The bases that an earlier run left in `folder`. Local. Raises: UserError where they are missing."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no finished bases; run `mica-ds basis` or `mica-ds train` first") from None
    return Basis(folder, manifest, solved=0, seconds=0.0)


def _solve(
    shards: list[Shard],
    all_shards: list[Shard],
    fingerprints: dict[str, str],
    adapter: AdapterSettings,
    seed: int,
    folder: Path,
) -> None:
    """Solve the given matrices, each at its owner, and write them to the cache. Collective."""
    folder.mkdir(parents=True, exist_ok=True)
    owners = assign_owners([shard.shape for shard in shards], comm.world_size())
    pictured = _middle_of_each_kind([shard.name for shard in all_shards])
    bar = tqdm(
        total=len(all_shards),
        initial=len(all_shards) - len(shards),
        desc="bases",
        unit="matrix",
        disable=not comm.is_main(),
    )
    for i, W in ship(shards, owners):
        name, started = shards[i].name, time.perf_counter()
        solution = solver.solve(W, adapter.r, adapter.subspace, seed=seed + zlib.crc32(name.encode()))
        record = {
            "name": name,
            "shape": list(shards[i].shape),
            "r": adapter.r,
            "sigma_max": solution.sigma_max,
            "sigma_minor": solution.sigma_minor,
            "relative_gap": solution.relative_gap,
            "residual": solution.residual,
            "seconds": time.perf_counter() - started,
            "owner": comm.rank(),
            "factor": solution.factor,
            "fingerprint": fingerprints[name],
            "subspace": _subspace(adapter, seed),
        }
        if name in pictured:
            record["spectrum"] = solver.spectrum(W).tolist()
        _write(folder, name, solution.B_MR, record)
        bar.update(min(len(list(folder.glob("*.safetensors"))), bar.total) - bar.n)  # the other owners' as well
    comm.barrier()
    bar.update(bar.total - bar.n)
    bar.close()


def _fingerprints(shards: list[Shard]) -> dict[str, str]:
    """A fingerprint of each whole matrix, the same for every cut and number of ranks. Collective.

    A sum over the elements of a mix of their bits and their place, after splitmix64: the slices' sums add up.
    """
    sums = torch.stack([_mixed_sum(shard.values, shard.bounds[comm.rank()]) for shard in shards])
    comm.sum_(sums)
    described = {
        shard.name: f"{shard.name} {shard.stored_shape} {shard.values.dtype} {total}"
        for shard, total in zip(shards, sums.tolist(), strict=True)
    }
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in described.items()}


def _mixed_sum(values: torch.Tensor, start: int, chunk: int = 1 << 16) -> torch.Tensor:
    bits_dtype = {2: torch.int16, 4: torch.int32}[values.element_size()]
    total = torch.zeros((), dtype=torch.int64)
    for i in range(0, len(values), chunk):  # chunks that stay in the cache
        bits = values[i : i + chunk].view(bits_dtype).long()
        mixed = bits + torch.arange(start + i, start + i + len(bits)) * -7046029254386353131
        mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
        mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
        total += mixed.sum()
    return total


def _missing(
    shards: list[Shard],
    fingerprints: dict[str, str],
    adapter: AdapterSettings,
    seed: int,
    folder: Path,
) -> list[Shard]:
    """The matrices that the cache does not hold yet; a cache of other weights is refused. Local."""
    missing = []
    for shard in shards:
        record = _read_record(folder, shard.name)
        if record is not None and record["fingerprint"] != fingerprints[shard.name]:
            raise UserError(
                f"{folder} holds bases of another base model ({shard.name} differs); "
                "give this run its own output_dir, or delete that folder"
            )
        if record is None or record["r"] != adapter.r or record["subspace"] != _subspace(adapter, seed):
            missing.append(shard)
    return missing


def _subspace(adapter: AdapterSettings, seed: int) -> str:
    return f"random, seed {seed}" if adapter.subspace == "random" else adapter.subspace


def _middle_of_each_kind(names: list[str]) -> set[str]:
    """One matrix for each kind (last part of the name), half way up the layers: their whole spectra are pictured."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    return {members[len(members) // 2] for members in kinds.values()}


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _write(folder: Path, name: str, B_MR: torch.Tensor, record: dict[str, Any]) -> None:
    file = _file(folder, name)
    partial = file.with_suffix(".partial")
    save_file({name: B_MR}, partial, metadata={"record": json.dumps(record)})
    os.replace(partial, file)


def _await_record(folder: Path, name: str, limit: float = 90) -> dict[str, Any]:
    """The record that an owner has written; a network file system may show it to other nodes only after a minute."""
    deadline = time.monotonic() + limit
    while (record := _read_record(folder, name)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"{folder} is not the same folder on all ranks; output_dir must be on shared storage")
        time.sleep(1)
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


def _is_of(manifest_file: Path, records: list[Any]) -> bool:
    """Whether the manifest lists these matrices: an earlier run may have had other targets."""
    return manifest_file.is_file() and json.loads(manifest_file.read_text())["matrices"] == records


def _write_manifest(file: Path, records: list[Any], adapter: AdapterSettings, seconds: float) -> None:
    whole = hashlib.sha256("".join(record["fingerprint"] for record in records).encode()).hexdigest()
    manifest = {
        "fingerprint": whole,
        "r": adapter.r,
        "subspace": records[0]["subspace"],
        "seconds": seconds,
        "world_size": comm.world_size(),
        "matrices": records,
    }
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(manifest, indent=1))
    os.replace(partial, file)
