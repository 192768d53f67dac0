"""The cache of the bases: one safetensors file a matrix with its record in the header, and a manifest of them all.

Jobs that share a cache may work on it at once: a file is replaced whole, and only by one that serves more.
`manifest.json` is written last, from the records.
"""

import hashlib
import json
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mica_ds import comm
from mica_ds.errors import UserError
from mica_ds.files import locked, replace_text, replacing
from mica_ds.shards import Matrix
from mica_ds.solver import Solution

_LOCKS = 64
_DECISIVE = {"r", "subspace", "fingerprint", "digest"}  # of a record: whether its basis serves


@dataclass(frozen=True)
class Wanted:
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


def refuse_others(folder: Path, records: dict[str, dict[str, Any]], fingerprints: dict[str, str]) -> None:
    """Refuse a cache that was made from other weights. Local. Raises: UserError."""
    for name, record in records.items():
        if record["fingerprint"] != fingerprints[name]:
            raise UserError(
                f"{folder} holds bases of another base model ({name} differs), or of another model.dtype; "
                "give this run its own output_dir, or delete that folder"
            )


def basis_file(folder: Path, name: str) -> Path:
    """Where the basis of a matrix lies. Local."""
    return folder / f"{name}.safetensors"


def write_basis(
    folder: Path,
    matrix: Matrix,
    solution: Solution,
    wanted: Wanted,
    fingerprint: str,
    seconds: float,
    route: str,
) -> None:
    """Write a basis with its record, whole or not at all. Local, at the owner. Raises: UserError where it cannot."""
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
        "digest": digest(solution.B_MR),
        "subspace": wanted.label,
    }
    file = basis_file(folder, matrix.name)
    # Several, for an owner seldom to wait for another: network file systems try again only after seconds.
    lock = folder / f".lock-{zlib.crc32(matrix.name.encode()) % _LOCKS}"
    try:
        with locked(lock):
            current = read_record(folder, matrix.name)
            if current and wanted.is_served(current) and current["fingerprint"] == fingerprint:
                return  # another job was faster, perhaps with a larger r
            with replacing(file, is_shared=True) as partial:
                save_file({matrix.name: solution.B_MR}, partial, metadata={"record": json.dumps(record)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be written: {error}") from None


def digest(B_MR: torch.Tensor) -> str:
    """The SHA-256 of a basis. Local."""
    return hashlib.sha256(B_MR.numpy().tobytes()).hexdigest()


def await_record(folder: Path, name: str, wanted: Wanted, limit: float = 90) -> dict[str, Any]:
    """The record that an owner has written; a network file system may show it to other nodes only after a minute."""
    deadline = time.monotonic() + limit
    while not wanted.is_served(record := read_record(folder, name)):
        if time.monotonic() > deadline:
            reason = "another job replaced" if record else "the ranks do not share, or another job removed"
            raise UserError(
                f"{basis_file(folder, name)} is not what this run solved: a file that {reason}; start again"
            )
        time.sleep(1)
    assert record is not None
    return record


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """What is known of a cached basis; None where there is none. Local. Raises: UserError where it is damaged."""
    file = basis_file(folder, name)
    return _read(file)[0] if file.is_file() else None


def read_basis(folder: Path, name: str) -> tuple[dict[str, Any], torch.Tensor]:
    """The same of one that must be there, and the basis (out, r), fp32, compared with its digest. Local."""
    return _read(basis_file(folder, name), name)


def _read(file: Path, name: str | None = None) -> tuple[dict[str, Any], torch.Tensor]:
    """The record, and the basis of this name, or an empty tensor."""
    try:
        with safe_open(file, framework="pt") as stored:
            record = json.loads(stored.metadata()["record"])
            B_MR = stored.get_tensor(name) if name else torch.empty(0)
        if record.keys() >= _DECISIVE and (name is None or digest(B_MR) == record["digest"]):
            return record, B_MR
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, TypeError, KeyError, ValueError, AttributeError):
        pass
    raise UserError(f"{file} is damaged; delete it, and the next run solves it again")


def make_manifest(records: list[dict[str, Any]], wanted: Wanted, seconds: float) -> dict[str, Any]:
    """All records, as those of the wanted r, with digests over all weights and bases. Local."""

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


def write_manifest(file: Path, manifest: dict[str, Any]) -> None:
    """Write it, unless the file says the same of the matrices already. Local. Raises: UserError."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(file.read_text())["matrices"] == manifest["matrices"]:
            return
    try:
        replace_text(file, json.dumps(manifest, indent=1), is_shared=True)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error}") from None


def _cut(record: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    """The record of the first or last columns of a larger basis."""
    larger, r = record["r"], wanted.r
    if larger == r:
        return record
    above, first = record["sigma_minor"][-r - 1], record["sigma_minor"][-r]
    gap = (above - first) / max(above, 1e-300)
    return {**record, "r": r, "sigma_minor": record["sigma_minor"][-r:], "relative_gap": gap}
