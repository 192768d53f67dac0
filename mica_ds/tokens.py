"""The token cache: each source is read and tokenised once, by the processes of one rank, and mapped by all.

A cache entry is a folder named by a SHA-256 of the contents of a source's files and of the tokenizer. It appears whole
or not at all, and serves every sequence length, run and job. What its files hold is `encoding.Encoded`, end to end.
"""

import errno
import hashlib
import itertools
import json
import operator
import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mica_ds import comm
from mica_ds.contents import hash_files
from mica_ds.documents import find_files, refusal, stored_files, where, where_all
from mica_ds.encoding import SIGNATURE
from mica_ds.errors import UserError
from mica_ds.files import locked, partial, remove_abandoned, sync
from mica_ds.workers import encode_files

_VERSION = 3
"""Of what an entry holds: another one makes all entries anew."""
_MANIFEST = "manifest.json"
_COLUMNS = {  # the files of an entry
    "ids": np.dtype(np.int32),
    "is_learnt": np.dtype(np.bool_),
    "starts": np.dtype(np.int64),
    "words": np.dtype(np.uint32),
    "signatures": np.dtype((np.uint32, SIGNATURE)),
    "origins": np.dtype((np.int64, 3)),
}
_VISIBLE = 90  # seconds after which a network file system shows to all nodes what one has written


@dataclass(frozen=True)
class Tokens:
    """A source in the cache, mapped into memory."""

    folder: Path
    files: list[Path]
    """On rank 0, elsewhere none."""
    manifest: dict[str, Any]
    ids: np.ndarray
    """int32, all documents end to end."""
    is_learnt: np.ndarray
    """bool, a token."""
    starts: np.ndarray
    """int64 (documents + 1): where each document begins, and where the last ends."""
    words: np.ndarray
    signatures: np.ndarray
    origins: np.ndarray
    """int64 (documents, 3): the number of its file, its place in it, and whether it is a chat."""

    def name(self, document: int) -> str:
        """Where a document stands. Local, on rank 0."""
        file, place, _ = self.origins[document].tolist()
        return where(self.files[file], place)

    def broken(self) -> list[str]:
        """What was left out, and why, by file and place. Local, on rank 0."""
        found: list[str] = []
        for number, rows in itertools.groupby(sorted(self.manifest["broken"]), operator.itemgetter(0)):
            _, places, reasons = zip(*rows, strict=True)
            names = where_all(self.files[number], list(places))
            found += [f"{name} {reason}" for name, reason in zip(names, reasons, strict=True)]
        return found


def open_tokens(source: Path, key: str, tokenizer: PreTrainedTokenizerBase, cache: Path, may_skip: bool) -> Tokens:
    """The tokens of a source, from the cache or into it. Collective, though rank 0 alone reads documents.

    The others wait for as long as it takes. `may_skip` leaves out what is broken. Raises: UserError where the source
    holds no text, something in it is broken, or the cache cannot be written or is not shared.
    """
    folder, files = cache, []
    with comm.failing_together():
        if comm.is_main():
            files = find_files(source, key)
            folder = cache / _entry(files, tokenizer, cache)
            _fill(folder, files, key, tokenizer, may_skip)
    folder = comm.gather(folder)[0]
    with comm.failing_together():
        tokens = _open(folder, files)
        if tokens.manifest["broken"] and not may_skip and comm.is_main():
            number, place, reason = min(tokens.manifest["broken"])
            raise refusal(key, files[number], place, reason)
        if tokens.manifest["documents"] == 0:
            raise UserError(f"{key}: {source} holds no text")
    return tokens


def _entry(files: list[Path], tokenizer: PreTrainedTokenizerBase, cache: Path) -> str:
    """The name of the entry for some files: their contents and kinds in their order, not their names."""
    state = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    about = [_VERSION, state, tokenizer.chat_template, tokenizer.eos_token_id]
    found = hashlib.sha256(json.dumps(about).encode())
    contents = hash_files([inner for file in files for inner in stored_files(file)], cache / "files.json")
    for file in files:
        found.update(
            " ".join([file.suffix.lower(), *(contents[inner] for inner in stored_files(file))]).encode() + b"\n"
        )
    return found.hexdigest()[:32]


def _fill(folder: Path, files: list[Path], key: str, tokenizer: PreTrainedTokenizerBase, may_skip: bool) -> None:
    """Make an entry where there is none. Local, on rank 0."""
    if _is_whole(folder):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{folder.name}.lock")
        with locked(lock, lambda: comm.say(f"data: another job tokenises {key} into {folder}; waiting for it")) as held:
            if _is_whole(folder):
                return
            remove_abandoned(folder.parent)
            if held:  # otherwise another job may have made it whole just now
                shutil.rmtree(folder, ignore_errors=True)
            unfinished = partial(folder)
            unfinished.mkdir(exist_ok=True)
            try:
                _write(unfinished, files, key, tokenizer, may_skip)
                if _entry(files, tokenizer, folder.parent) != folder.name:
                    raise UserError(f"{key}: a file was changed while it was read; start again when all are written")
                for path in unfinished.iterdir():
                    sync(path)
                os.replace(unfinished, folder)
            except OSError:
                if not _is_whole(folder):  # without locks, another job may have been faster
                    raise
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOMEM, errno.EAGAIN):  # of a process that could not be started
            raise
        raise UserError(f"data.cache: {folder.parent} cannot be written: {error.strerror or error}") from None


def _write(folder: Path, files: list[Path], key: str, tokenizer: PreTrainedTokenizerBase, may_skip: bool) -> None:
    manifest: dict[str, Any] = {"documents": 0, "tokens": 0, "words": 0, "empty": 0, "chats": 0, "broken": []}
    hashes = [hashlib.sha256() for _ in range(3)]
    outputs = {name: (folder / name).open("wb") for name in _COLUMNS}
    try:
        outputs["starts"].write(np.zeros(1, np.int64).tobytes())
        for numbers, found in encode_files(files, key, tokenizer):
            for part, broken in found.broken:
                if not may_skip:
                    raise refusal(key, files[numbers[part]], broken.place, broken.reason)
                manifest["broken"].append([numbers[part], broken.place, broken.reason])
            starts = manifest["tokens"] + np.cumsum(found.lengths)
            found.origins[:, 0] = np.array(numbers, dtype=np.int64)[found.origins[:, 0]]
            columns = {**vars(found), "starts": starts}
            for name, dtype in _COLUMNS.items():
                outputs[name].write(np.ascontiguousarray(columns[name], dtype=dtype.base).tobytes())
            for digest, values in zip(hashes, (found.ids, found.is_learnt, starts), strict=True):
                digest.update(values.tobytes())
            manifest["documents"] += len(found.lengths)
            manifest["tokens"] += len(found.ids)
            manifest["words"] += int(np.count_nonzero(found.words))
            manifest["chats"] += int(found.origins[:, 2].sum())
            manifest["empty"] += found.empty
    finally:
        for output in outputs.values():
            output.close()
    manifest["digest"] = hashlib.sha256(b"".join(digest.digest() for digest in hashes)).hexdigest()
    manifest["bytes"] = {name: (folder / name).stat().st_size for name in _COLUMNS}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))


def _is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in manifest["bytes"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _open(folder: Path, files: list[Path]) -> Tokens:
    deadline = time.monotonic() + _VISIBLE
    while not _is_whole(folder):
        if time.monotonic() > deadline:
            raise UserError(
                f"data.cache: {folder}, which rank 0 has written, is not seen on {socket.gethostname()}: "
                "it must be on storage that all ranks share"
            )
        time.sleep(1)
    columns = {name: _map(folder / name, dtype) for name, dtype in _COLUMNS.items()}
    return Tokens(folder, files, json.loads((folder / _MANIFEST).read_text()), **columns)


def _map(file: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if file.stat().st_size == 0:  # which cannot be mapped
        return np.empty((0, *dtype.shape), dtype.base)
    return np.memmap(file, dtype.base, mode="r").reshape(-1, *dtype.shape)
