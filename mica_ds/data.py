"""Documents to packed training sequences, in which no document sees another."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, interleave_datasets
from transformers import PreTrainedTokenizerBase

from mica_ds import comm
from mica_ds.config import DataSettings
from mica_ds.errors import UserError

_ENDINGS = (".txt", ".md", ".jsonl")


def build_dataset(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    """Read, tokenise, pack and mix: rows of `input_ids`, `labels` and `position_ids`, each `sequence_length` long.

    The order is shuffled by `seed` and the same on every number of ranks. Where the global batch does not divide the
    rows, the first come twice: accelerate (1.15) would repeat as many as the number of ranks asks for. Collective.
    Raises: UserError where a source is missing, unreadable or empty.
    """
    with comm.failing_together():
        corpus = _rows(settings, settings.corpus, "data.corpus", tokenizer)
        if not settings.replay:
            return _whole_batches(corpus.shuffle(seed=seed), settings.global_batch)
        replay = _rows(settings, settings.replay, "data.replay", tokenizer)
    share = settings.replay_fraction
    # The shorter source starts over until the longer one has been seen whole.
    mixed = interleave_datasets(
        [corpus.shuffle(seed=seed), replay.shuffle(seed=seed)],
        probabilities=[1 - share, share],
        seed=seed,
        stopping_strategy="all_exhausted",
    )
    return _whole_batches(mixed, settings.global_batch)


def _whole_batches(rows: Dataset, global_batch: int) -> Dataset:
    steps = -(-len(rows) // global_batch)
    return rows.select([i % len(rows) for i in range(steps * global_batch)])


def digest(rows: Dataset) -> str:
    """SHA-256 of all token ids, in their order: whether two runs learn the same. Local."""
    found = hashlib.sha256()
    for batch in rows.with_format("numpy").iter(batch_size=1000):
        found.update(batch["input_ids"].astype("<i4").tobytes())
    return found.hexdigest()


def count_predicted(rows: Dataset) -> int:
    """The tokens that training predicts: all but padding and the first of each document in a row. Local."""
    batches = rows.select_columns("labels").with_format("numpy").iter(batch_size=1000)
    return sum(int((batch["labels"] != -100).sum()) for batch in batches)


def read_documents(sources: list[Path], key: str) -> list[str]:
    """The texts of files (.txt, .md: one document; .jsonl: one a line under `text`) and of folders of them, sorted.

    Local. Raises: UserError that names `key`, the file and the line.
    """
    documents = []
    for source in sources:
        if not source.exists():
            raise UserError(f"{key}: {source} does not exist")
        files = sorted(f for f in source.rglob("*") if f.suffix in _ENDINGS) if source.is_dir() else [source]
        if not files:
            raise UserError(f"{key}: {source} holds no file that ends in {', '.join(_ENDINGS)}")
        for file in files:
            documents.extend(_read_file(file, key))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{key}: {', '.join(map(str, sources))} holds no text")
    return documents


def read_jsonl(file: Path, key: str) -> list[tuple[str, Any]]:
    """The rows of a jsonl file, each with where it stands (`FILE, line N`). Local. Raises: UserError."""
    rows = []
    for number, line in enumerate(_read_text(file, key).splitlines(), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                rows.append((where, json.loads(line)))
            except ValueError:
                raise UserError(f"{key}: {where} is not JSON") from None
    return rows


def _read_file(file: Path, key: str) -> list[str]:
    if file.suffix not in _ENDINGS:
        raise UserError(f"{key}: {file} does not end in {', '.join(_ENDINGS)}")
    if file.suffix != ".jsonl":
        return [_read_text(file, key)]
    documents = []
    for where, row in read_jsonl(file, key):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f'{key}: {where} has no "text"')
        documents.append(row["text"])
    return documents


def _read_text(file: Path, key: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{key}: {file} is not UTF-8 text") from None


def _rows(settings: DataSettings, sources: list[Path], key: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    tokenised = tokenizer(read_documents(sources, key), return_attention_mask=False)["input_ids"]
    end, length = tokenizer.eos_token_id, settings.sequence_length
    documents = [[*document, end] for document in tokenised]
    together = [documents] if settings.pack else [[document] for document in documents]
    rows = [row for part in together for row in pack(part, length, padding=end)]
    return Dataset.from_list([row for row in rows if any(label != -100 for label in row["labels"])])


def pack(documents: Iterable[list[int]], length: int, padding: int) -> list[dict[str, list[int]]]:
    """Lay documents end to end and cut the line into rows of `length`; the last row is padded.

    `position_ids` start again at 0 with each document: from them transformers (5.23) builds the mask that keeps the
    documents of a row apart. A document's first token is not predicted (label -100): nothing precedes it. Local.
    """
    rows: list[dict[str, list[int]]] = []
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for document in documents:
        while document:
            room = length - len(row["input_ids"])
            piece, document = document[:room], document[room:]
            row["input_ids"] += piece
            row["labels"] += [-100, *piece[1:]]
            row["position_ids"] += range(len(piece))
            if len(row["input_ids"]) == length:
                rows.append(row)
                row = {"input_ids": [], "labels": [], "position_ids": []}
    if row["input_ids"]:
        room = length - len(row["input_ids"])
        row["input_ids"] += [padding] * room
        row["labels"] += [-100] * room
        row["position_ids"] += range(room)
        rows.append(row)
    return rows
