"""A merged model: the base checkpoint's own files again, with (alpha / r) B A added to what the adapter is on.

The files are cut into pieces. A piece is read from the base, added to in fp32, rounded once to the stored
dtype, and written to the same place of a file of the same length: so headers, order and all other bytes are the
base's. Any number of ranks and threads share the pieces, those of one file too, and only a few are in memory. Each is
noted with the SHA-256 of what was written; an interrupted export goes on with those that are not on the disk as noted.
"""

import hashlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mica_ds import comm
from mica_ds.config import Config, fixed_settings
from mica_ds.deltas import MANIFEST, Merge
from mica_ds.errors import UserError
from mica_ds.files import file_hash, sync
from mica_ds.fingerprint import WEIGHTS, fingerprint_parameters
from mica_ds.meter import peak_rss, rss
from mica_ds.pieces import Piece, read, share
from mica_ds.shelf import check_origin, put_in_place, read_state, writing

_THREADS = 4


@dataclass
class _Note:
    """What is known of a piece once it is written."""

    sha256: str
    sums: dict[str, int]
    """For each parameter in it its share of the base's fingerprint."""


def merge_checkpoint(config: Config, checkpoint: Path) -> Path:
    """Merge a checkpoint's adapter into its base model, in `merged/` of the run folder, and return that. Collective.

    Files, names, order and dtypes are the base's; what else lies in its folder is copied. Whole or absent: until then
    it is `merged.partial/`, from which the next start goes on. One that is whole is checked by its hashes and left
    alone. Raises: UserError where there is nothing to merge or no way to, where the base is not the one that the
    checkpoint was trained on, and where the disk is full or fails.
    """
    started, before = time.perf_counter(), rss()
    with comm.failing_together():
        if config.adapter.method == "full":
            raise UserError("adapter.method=full has nothing to merge: `mica-ds export` writes the whole model already")
        check_origin(checkpoint, fixed_settings(config))
        merge = Merge(config, checkpoint)
        origin = merge.origin
    origin = comm.gather(origin)[0]  # a node's own copy of the base has other times
    target = config.output_dir / "merged"
    if _is_whole(target, origin):
        comm.say(f"merge: {target} is whole already, and as it was written")
        return target
    partial = target.with_name(f"{target.name}.partial")
    with comm.failing_together():
        if comm.is_main():
            with writing(partial):
                _prepare(partial, merge, origin)
    notes = _read_notes(partial)
    comm.barrier()  # all have read before any writes more
    with comm.failing_together(), writing(partial):
        written = _write_share(merge, partial, notes)
    kept = sum(comm.gather(sum(notes.get(place) is note for place, note in written.items())))
    _check_base(merge, partial, written)
    _check_pieces(merge, partial, written)
    hashes = _hashes(partial, [*merge.files, *(file.name for file in merge.others)])
    grown = max(comm.gather(peak_rss() - before))
    with comm.failing_together():
        if comm.is_main():
            with writing(partial):
                for file in partial.glob("notes-*.jsonl"):
                    file.unlink()
                (partial / MANIFEST).write_text(json.dumps({**origin, "files": hashes}, indent=1))
                put_in_place(partial, target)
    seconds = time.perf_counter() - started
    if kept:
        comm.say(f"merge: {kept} of {len(merge.pieces)} pieces were there already")
    comm.say(
        f"merge: {merge.size / 1e9:.2f} GB in {seconds:.1f} s ({merge.size / 1e9 / seconds:.2f} GB/s), "
        f"memory of a rank up by at most {grown / 2**30:.2f} GiB"
    )
    return target


def _is_whole(target: Path, origin: dict[str, Any]) -> bool:
    """Whether the merged model is there already, of the same origin and with all its hashes. Collective."""
    try:
        manifest = json.loads((target / MANIFEST).read_text())
        files = manifest.pop("files") if comm.is_main() else {}
    except (OSError, ValueError, KeyError, AttributeError):
        manifest, files = {}, {}
    manifest, files = comm.gather((manifest, files))[0]
    if manifest != origin:
        return False
    if not comm.gather(all((target / name).is_file() for name in files))[0]:
        return False
    return _hashes(target, sorted(files)) == files


def _prepare(partial: Path, merge: Merge, origin: dict[str, Any]) -> None:
    """Make the folder, its files at their full length, and what is not weights; keep what is of the same origin."""
    try:
        is_ours = json.loads((partial / MANIFEST).read_text()) == origin
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    there = sum(file.stat().st_blocks * 512 for file in partial.iterdir())
    room = shutil.disk_usage(partial).free + there
    needed = merge.size + sum(file.stat().st_size for file in merge.others)
    if room < needed:
        if not there:
            partial.rmdir()
        raise UserError(
            f"{partial.parent} has room for {room / 1e9:.2f} GB, but the merged model takes {needed / 1e9:.2f}: "
            "make room, and start again"
        )
    for file in merge.others:
        shutil.copyfile(file, partial / file.name)
    for name in merge.files:
        with (partial / name).open("ab") as opened:
            opened.truncate((merge.base / name).stat().st_size)
    (partial / MANIFEST).write_text(json.dumps(origin))


def _read_notes(partial: Path) -> dict[tuple[str, int], _Note]:
    """What earlier starts have noted, on whatever number of ranks."""
    notes = {}
    for file in partial.glob("notes-*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                name, start, sha256, sums = json.loads(line)
            except ValueError:  # cut off by what ended the start before
                continue
            notes[name, start] = _Note(sha256, sums)
    return notes


def _write_share(merge: Merge, partial: Path, notes: dict[tuple[str, int], _Note]) -> dict[tuple[str, int], _Note]:
    """Write this rank's pieces, all but those that are there as noted, and return the notes of all of them. Local."""
    mine, written = share(merge.pieces, comm.rank()), {}

    def work(piece: Piece) -> tuple[_Note, bool]:
        note = notes.get((piece.file, piece.start))
        if note and note.sha256 == hashlib.sha256(read(partial, piece)).hexdigest():
            return note, False
        return _write(merge, partial, piece), True

    size = sum(piece.size for piece in mine)
    with (
        (partial / f"notes-{comm.rank()}.jsonl").open("a") as file,
        tqdm(total=size, desc="merge", unit="B", unit_scale=True, disable=not comm.is_main()) as bar,
        _threads() as threads,
    ):
        for piece, (note, is_new) in zip(mine, threads.map(work, mine), strict=True):
            written[piece.file, piece.start] = note
            if is_new:
                file.write(json.dumps([piece.file, piece.start, note.sha256, note.sums]) + "\n")
                file.flush()
            bar.update(piece.size)
    for name in {piece.file for piece in mine}:
        sync(partial / name)
    return written


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_THREADS, torch.get_num_threads()))


def _write(merge: Merge, partial: Path, piece: Piece) -> _Note:
    """Write a piece. Local."""
    data, sums = merge.merged(piece)
    with (partial / piece.file).open("r+b") as file:
        file.seek(piece.start)
        file.write(data)
    return _Note(hashlib.sha256(data).hexdigest(), sums)


def _check_base(merge: Merge, partial: Path, written: dict[tuple[str, int], _Note]) -> None:
    """Refuse another base than the checkpoint's, by all that was read of it. Collective."""
    places = {name: index for index, name in enumerate(merge.labels)}
    totals = torch.zeros(len(places), dtype=torch.int64)
    for note in written.values():
        for name, value in note.sums.items():
            totals[places[name]] += value
    found = fingerprint_parameters(list(merge.labels.values()), totals)
    with comm.failing_together():
        if found != read_state(merge.checkpoint)["origin"].get(WEIGHTS):
            if comm.is_main():
                shutil.rmtree(partial)
            raise UserError(
                f"model.path: {merge.base} does not hold the weights that {merge.checkpoint} was trained on: "
                "they were changed or damaged since; copy the model again"
            )


def _check_pieces(merge: Merge, partial: Path, written: dict[tuple[str, int], _Note]) -> None:
    """Read another rank's pieces from the disk, and compare them with what it wrote. Collective."""
    hashes = {place: note.sha256 for part in comm.gather(written) for place, note in part.items()}
    with comm.failing_together(), _threads() as threads:
        pieces = share(merge.pieces, comm.rank() + 1)
        found = threads.map(lambda piece: hashlib.sha256(read(partial, piece)).hexdigest(), pieces)
        for piece, sha256 in zip(pieces, found, strict=True):
            if sha256 != hashes[piece.file, piece.start]:
                raise UserError(f"{partial / piece.file} is not what was written to it: mend the disk, and start again")


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    """The SHA-256 of files, each read by one rank. Collective."""
    with comm.failing_together(), _threads() as threads:
        mine = names[comm.rank() :: comm.world_size()]
        found = dict(zip(mine, threads.map(lambda name: file_hash(folder / name), mine), strict=True))
    return {name: value for part in comm.gather(found) for name, value in part.items()}
