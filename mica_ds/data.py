"""Documents to packed training sequences, in which no document sees another."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, interleave_datasets
from transformers import PreTrainedTokenizerBase

from mica_ds import comm
from mica_ds.chat import ChatError, chat_text, encode_chat
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


def read_documents(sources: list[Path], key: str) -> list[str]:
    """The texts of files (.txt, .md: one document; .jsonl: one a line under `text`) and of folders of them, sorted.

    Of a chat (a line with `messages`) what is said in it. Local. Raises: UserError that names `key`, file and line.
    """
    texts = []
    for where, document in _read_sources(sources, key):
        with _named(where):
            texts.append(document if isinstance(document, str) else chat_text(document))
    return texts


def _read_sources(sources: list[Path], key: str) -> list[tuple[str, Any]]:
    """Each document with where it stands: its text, or what a row has for `messages`."""
    documents: list[tuple[str, Any]] = []
    for source in sources:
        if not source.exists():
            raise UserError(f"{key}: {source} does not exist")
        files = source_files(source)
        if not files:
            raise UserError(f"{key}: {source} holds no file that ends in {', '.join(_ENDINGS)}")
        for file in files:
            documents.extend(_read_file(file, key))
    documents = [document for document in documents if not isinstance(document[1], str) or document[1].strip()]
    if not documents:
        raise UserError(f"{key}: {', '.join(map(str, sources))} holds no text")
    return documents


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Say which chat is wrong."""
    try:
        yield
    except ChatError as error:
        raise UserError(f"{where} {error}") from None


def source_files(source: Path) -> list[Path]:
    """The files that a source means: itself, or of a folder those that can be read, sorted. Local."""
    return sorted(f for f in source.rglob("*") if f.suffix in _ENDINGS) if source.is_dir() else [source]


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


def _read_file(file: Path, key: str) -> list[tuple[str, Any]]:
    if file.suffix not in _ENDINGS:
        raise UserError(f"{key}: {file} does not end in {', '.join(_ENDINGS)}")
    if file.suffix != ".jsonl":
        return [(f"{key}: {file}", _read_text(file, key))]
    documents = []
    for where, row in read_jsonl(file, key):
        if isinstance(row, dict) and "messages" in row:
            documents.append((f"{key}: {where}", row["messages"]))
        elif isinstance(row, dict) and isinstance(row.get("text"), str):
            documents.append((f"{key}: {where}", row["text"]))
        else:
            raise UserError(f'{key}: {where} has no "text"')
    return documents


def _read_text(file: Path, key: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{key}: {file} is not UTF-8 text") from None


def _rows(settings: DataSettings, sources: list[Path], key: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    end, length = tokenizer.eos_token_id, settings.sequence_length
    documents: list[list[int]] = []
    labels: list[list[int]] = []
    for where, document in _read_sources(sources, key):
        if isinstance(document, str):
            ids = [*tokenizer(document, return_attention_mask=False)["input_ids"], end]
            is_learnt = [True] * len(ids)
        else:
            with _named(where):
                ids, is_learnt = encode_chat(document, tokenizer)
        documents.append(ids)
        labels.append([token if learnt else -100 for token, learnt in zip(ids, is_learnt, strict=True)])
    if settings.pack:
        rows = pack(documents, length, end, labels)
    else:
        alone = zip(documents, labels, strict=True)
        rows = [row for ids, theirs in alone for row in pack([ids], length, end, [theirs])]
    return Dataset.from_list([row for row in rows if any(label != -100 for label in row["labels"])])


def pack(
    documents: list[list[int]], length: int, padding: int, labels: list[list[int]] | None = None
) -> list[dict[str, list[int]]]:
    """Lay documents end to end and cut the line into rows of `length`; the last row is padded.

    `position_ids` start again at 0 with each document: from them transformers (5.23) builds the mask that keeps the
    documents of a row apart. A document's first token is not predicted (label -100): nothing precedes it. `labels` are
    each document's, where they are not its tokens. Local.
    """
    rows: list[dict[str, list[int]]] = []
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for document, theirs in zip(documents, labels or documents, strict=True):
        while document:
            room = length - len(row["input_ids"])
            piece, document = document[:room], document[room:]
            row["input_ids"] += piece
            row["labels"] += [-100, *theirs[1:room]]
            row["position_ids"] += range(len(piece))
            theirs = theirs[room:]
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
