"""A merged model: the base checkpoint's own files again, with (alpha / r) B A added to what the adapter is on.

The files are cut into pieces. A piece is read from the base, added to in fp32, rounded once to the stored
dtype, and written to the same place of a file of the same length: so headers, order and all other bytes are the
base's. Any number of ranks and threads share the pieces, those of one file too, and only a few are in memory. Each is
noted with the SHA-256 of what was written; an interrupted export goes on with those that are not on the disk as noted.
"""

import hashlib
import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from mica_ds import comm
from mica_ds.adapter import factor_name, stored_targets
from mica_ds.checkpoint import factor_files
from mica_ds.config import Config, fixed_settings
from mica_ds.errors import UserError
from mica_ds.files import file_hash
from mica_ds.fingerprint import WEIGHTS, fingerprint_parameters, label, mixed_sum
from mica_ds.meter import peak_rss, rss
from mica_ds.model import DTYPES, load_skeleton
from mica_ds.pieces import PIECE, Piece, cut, read, share
from mica_ds.shelf import STATE, check_origin, put_in_place, read_state, sync, writing
from mica_ds.weights import StoredTensor, open_checkpoint, stored_tensor

MANIFEST = "merge.json"
_THREADS = 4
# Elements that are added to at a time: in fp32 they stay in a core's cache, six times as fast as a whole piece.
_BLOCK = 1 << 19
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}


@dataclass(frozen=True)
class _Delta:
    """What is added to one stored matrix."""

    A: StoredTensor
    B: StoredTensor
    is_transposed: bool
    scale: float

    def add_to(self, W_MN: torch.Tensor, first: int) -> None:
        """Add to these rows of the stored matrix, in place; the first of them is row `first`. Local."""
        A_RI, B_OR = _whole(self.A), _whole(self.B)
        left_MR, right_RN = (A_RI.T, B_OR.T) if self.is_transposed else (B_OR, A_RI)
        for start in range(0, len(W_MN), step := max(1, _BLOCK // W_MN.shape[1])):
            W_PN = W_MN[start : start + step]
            exact_PN = W_PN.to(torch.float32, copy=True)
            left_PR = left_MR[first + start : first + start + len(W_PN)]
            W_PN.copy_(exact_PN.addmm_(left_PR, right_RN, alpha=self.scale))


@dataclass
class _Note:
    """What is known of a piece once it is written."""

    sha256: str
    sums: dict[str, int]
    """For each parameter in it its share of the base's fingerprint."""


class _Plan:
    """What is merged with what: the same on all ranks. Local; reads the headers of the files. Raises: UserError."""

    def __init__(self, config: Config, checkpoint: Path) -> None:
        self.base, self.checkpoint = config.model.path, checkpoint
        self.dtype = DTYPES[config.model.dtype]
        stored = open_checkpoint(self.base)
        skeleton = load_skeleton(config.model)
        self.names: dict[tuple[str, str], str] = {}
        self.labels: dict[str, str] = {}
        for name, parameter in skeleton.named_parameters():
            tensor = stored_tensor(name, stored, skeleton.base_model_prefix, tuple(parameter.shape))
            self.names[tensor.file.name, tensor.key] = name
            self.labels[name] = label(name, tuple(parameter.shape), self.dtype)
        self.deltas = _deltas(config, checkpoint, skeleton, stored)
        self.files = sorted({tensor.file.name for tensor in stored.values()})
        self.pieces = [piece for file in self.files for piece in cut(self.base / file)]
        for piece in self.pieces:
            for rows in piece.rows:
                if rows.region and (piece.file, rows.region.key) in self.names and rows.region.dtype not in _STORED:
                    raise UserError(
                        f"model.path: {rows.region.key} in {self.base / piece.file} is stored as {rows.region.dtype}, "
                        f"to which nothing can be added: merge into the model in one of {', '.join(_STORED)}"
                    )
        self.size = sum(piece.size for piece in self.pieces)

    @property
    def others(self) -> list[Path]:
        """What belongs to the model besides its weights: config, tokenizer, licence."""
        return [
            file
            for file in sorted(self.base.iterdir())
            if file.is_file()
            and file.suffix not in _OTHER_WEIGHTS
            and (not file.name.endswith(".index.json") or file.name == "model.safetensors.index.json")
            and file.name not in (MANIFEST, ".gitattributes")
        ]

    @property
    def origin(self) -> dict[str, Any]:
        """What a merged model, or half of one, must agree with to be this one."""
        stats = {file.name: file.stat() for file in (*(self.base / name for name in self.files), *self.others)}
        return {
            "base": str(self.base.absolute()),
            "base_files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "checkpoint": str(self.checkpoint.absolute()),
            "checkpoint_sha256": file_hash(self.checkpoint / STATE),  # it holds the hashes of its other files
            "piece": PIECE,
        }


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
        plan = _Plan(config, checkpoint)
        origin = plan.origin
    origin = comm.gather(origin)[0]  # a node's own copy of the base has other times
    target = config.output_dir / "merged"
    if _is_whole(target, origin):
        comm.say(f"merge: {target} is whole already, and as it was written")
        return target
    partial = target.with_name(f"{target.name}.partial")
    with comm.failing_together():
        if comm.is_main():
            with writing(partial):
                _prepare(partial, plan, origin)
    notes = _read_notes(partial)
    comm.barrier()  # all have read before any writes more
    with comm.failing_together(), writing(partial):
        written = _write_share(plan, partial, notes)
    kept = sum(comm.gather(sum(notes.get(place) is note for place, note in written.items())))
    _check_base(plan, partial, written)
    _check_pieces(plan, partial, written)
    hashes = _hashes(partial, [*plan.files, *(file.name for file in plan.others)])
    grown = max(comm.gather(peak_rss() - before))
    with comm.failing_together():
        if comm.is_main():
            with writing(partial):
                for file in partial.glob("notes-*.jsonl"):
                    file.unlink()
                (partial / MANIFEST).write_text(json.dumps({**origin, "files": hashes}, indent=1))
                for file in partial.iterdir():
                    sync(file)
                put_in_place(partial, target)
    seconds = time.perf_counter() - started
    if kept:
        comm.say(f"merge: {kept} of {len(plan.pieces)} pieces were there already")
    comm.say(
        f"merge: {plan.size / 1e9:.2f} GB in {seconds:.1f} s ({plan.size / 1e9 / seconds:.2f} GB/s), "
        f"memory of a rank up by at most {grown / 2**30:.2f} GiB"
    )
    return target


def _deltas(
    config: Config, checkpoint: Path, skeleton: PreTrainedModel, stored: dict[str, StoredTensor]
) -> dict[tuple[str, str], _Delta]:
    """What is added, by file and key of the stored matrix."""
    factors = open_checkpoint(checkpoint, factor_files(checkpoint))
    scale = config.adapter.alpha / config.adapter.r
    uses = [id(parameter) for _, parameter in skeleton.named_parameters(remove_duplicate=False)]
    found = {}
    for target in stored_targets(skeleton, config.adapter, stored):
        name, module = target.matrix.name, skeleton.get_submodule(target.matrix.name)
        if uses.count(id(module.weight)) > 1:
            raise UserError(
                f"adapter.targets: {name} shares its weight with another module, which would change with it in a "
                "merged model: use the adapter as it is"
            )
        A, B = (factors[factor_name(name, module, factor)] for factor in "AB")
        found[target.tensor.file.name, target.tensor.key] = _Delta(A, B, target.matrix.is_transposed, scale)
    return found


def _whole(tensor: StoredTensor) -> torch.Tensor:
    return tensor.read(0, math.prod(tensor.shape)).view(tensor.shape)


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


def _prepare(partial: Path, plan: _Plan, origin: dict[str, Any]) -> None:
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
    needed = plan.size + sum(file.stat().st_size for file in plan.others)
    if room < needed:
        if not there:
            partial.rmdir()
        raise UserError(
            f"{partial.parent} has room for {room / 1e9:.2f} GB, but the merged model takes {needed / 1e9:.2f}: "
            "make room, and start again"
        )
    for file in plan.others:
        shutil.copyfile(file, partial / file.name)
    for name in plan.files:
        with (partial / name).open("ab") as opened:
            opened.truncate((plan.base / name).stat().st_size)
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


def _write_share(plan: _Plan, partial: Path, notes: dict[tuple[str, int], _Note]) -> dict[tuple[str, int], _Note]:
    """Write this rank's pieces, all but those that are there as noted, and return the notes of all of them. Local."""
    mine, written = share(plan.pieces, comm.rank()), {}

    def work(piece: Piece) -> tuple[_Note, bool]:
        note = notes.get((piece.file, piece.start))
        if note and note.sha256 == hashlib.sha256(read(partial, piece)).hexdigest():
            return note, False
        return _write(plan, partial, piece), True

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


def _write(plan: _Plan, partial: Path, piece: Piece) -> _Note:
    """Read a piece of the base, add to it, and write it. Local."""
    data, sums = read(plan.base, piece), {}
    for rows in piece.rows:
        place = (piece.file, rows.region.key) if rows.region else None
        if place not in plan.names or rows.region is None:
            continue
        dtype = _STORED[rows.region.dtype]
        count = (rows.stop - rows.start) // dtype.itemsize
        values = torch.frombuffer(data, dtype=dtype, count=count, offset=rows.start - piece.start)
        first = (rows.start - rows.region.start) // dtype.itemsize
        sums[plan.names[place]] = int(mixed_sum(values.to(plan.dtype), first))
        if place in plan.deltas:
            columns = rows.region.shape[1]
            plan.deltas[place].add_to(values.view(-1, columns), first // columns)
    with (partial / piece.file).open("r+b") as file:
        file.seek(piece.start)
        file.write(data)
    return _Note(hashlib.sha256(data).hexdigest(), sums)


def _check_base(plan: _Plan, partial: Path, written: dict[tuple[str, int], _Note]) -> None:
    """Refuse another base than the checkpoint's, by all that was read of it. Collective."""
    places = {name: index for index, name in enumerate(plan.labels)}
    totals = torch.zeros(len(places), dtype=torch.int64)
    for note in written.values():
        for name, value in note.sums.items():
            totals[places[name]] += value
    found = fingerprint_parameters(list(plan.labels.values()), totals)
    with comm.failing_together():
        if found != read_state(plan.checkpoint)["origin"].get(WEIGHTS):
            if comm.is_main():
                shutil.rmtree(partial)
            raise UserError(
                f"model.path: {plan.base} does not hold the weights that {plan.checkpoint} was trained on: "
                "they were changed or damaged since; copy the model again"
            )


def _check_pieces(plan: _Plan, partial: Path, written: dict[tuple[str, int], _Note]) -> None:
    """Read another rank's pieces from the disk, and compare them with what it wrote. Collective."""
    hashes = {place: note.sha256 for part in comm.gather(written) for place, note in part.items()}
    with comm.failing_together(), _threads() as threads:
        pieces = share(plan.pieces, comm.rank() + 1)
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
