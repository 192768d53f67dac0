"""Documents out of files: what a source holds, and its texts, a part at a time."""

import bisect
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mica_ds.chat import ChatError, chat_text
from mica_ds.errors import UserError
from mica_ds.extract import UnusableError, extract

ENDINGS = (".txt", ".md", ".html", ".htm", ".pdf", ".jsonl", ".parquet")
PDF = 10
"""So much longer than others takes a byte of PDF to read."""
_DATASET = "state.json", "dataset_info.json"  # what `save_to_disk` of datasets leaves in a folder
_SPLITS = "dataset_dict.json"
_BYTES = 8 << 20  # of a jsonl file that are read at once
_GROUP = 32 << 20  # bytes of a parquet's row group; for each part it is decoded from its start, so not fewer
_ROWS = 1000  # of a saved dataset or a parquet file at a time, at most


@dataclass(frozen=True)
class Part:
    """What is read at once: a file, or of one with many rows a stretch."""

    file: Path
    """Or the folder of a saved dataset."""
    start: int = 0
    """Of jsonl the byte in or before the first line, of parquet and a dataset the row."""
    stop: int = 0
    """-1: all of a file that could not be cut."""


@dataclass(frozen=True)
class Document:
    """A text, or a chat with what is said in it."""

    place: int
    """Of a row in its file (for jsonl its first byte), -1 where the file is one document."""
    text: str
    messages: Any = None


@dataclass(frozen=True)
class Broken:
    """A file or row that cannot be read."""

    place: int
    reason: str
    """As said after its name: `is not JSON`."""


def find_files(source: Path, key: str) -> list[Path]:
    """The files and saved datasets that a source means. Local. Raises: UserError where there are none."""
    try:
        if not source.exists():
            raise UserError(f"{key}: {source} does not exist")
        found = source_files(source, _refuse)
    except OSError as error:
        raise UserError(f"{key}: {error.filename} cannot be read: {error.strerror}") from None
    if not found:
        raise UserError(f"{key}: {source} holds no file that ends in {', '.join(ENDINGS)}, and is no saved dataset")
    for file in found:
        if (file / _SPLITS).exists():
            splits = sorted(folder.name for folder in file.iterdir() if folder.is_dir())
            raise UserError(f"{key}: {file} holds a dataset's splits; name one of them: {', '.join(splits)}")
        if not file.is_dir() and file.suffix.lower() not in ENDINGS:
            raise UserError(f"{key}: {file} does not end in {', '.join(ENDINGS)}")
    return found


def source_files(source: Path, on_error: Callable[[OSError], None] | None = None) -> list[Path]:
    """The files that a source means: itself, or of a folder those that can be read, sorted. Local.

    The folder of a saved dataset stands for its files. Links to folders are followed, but none is entered twice; hidden
    files and folders are left out.
    `on_error` is called where a folder cannot be listed, which is left out otherwise.
    """
    if not source.is_dir() or _is_dataset(source):
        return [source]
    found = []
    for datasets, files in _walk(source, on_error):
        found += [*datasets, *(file for file in files if file.suffix.lower() in ENDINGS)]
    return sorted(found)


def unread_files(source: Path) -> dict[str, int]:
    """How many files of a folder have an ending that is not read (`.docx`, or none), by ending. Local.

    The most first.
    """
    if not source.is_dir() or _is_dataset(source):
        return {}
    found = Counter(file.suffix.lower() for _, files in _walk(source, None) for file in files)
    return {ending: found[ending] for ending in sorted(found, key=lambda e: (-found[e], e)) if ending not in ENDINGS}


def _walk(source: Path, on_error: Callable[[OSError], None] | None) -> Iterator[tuple[list[Path], list[Path]]]:
    """The saved datasets and the files of each folder in a folder, itself included; none that is hidden."""
    seen = set()
    for name, folders, files in os.walk(source, onerror=on_error, followlinks=True):
        folder = Path(name)
        if (real := folder.resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        datasets = [inner for inner in folders if _is_dataset(folder / inner)]
        folders[:] = [inner for inner in folders if inner not in datasets]
        yield [folder / inner for inner in datasets], [folder / file for file in files if not file.startswith(".")]


def _refuse(error: OSError) -> NoReturn:
    raise error


def stored_files(file: Path) -> list[Path]:
    """The file itself, or those of a saved dataset, sorted. Local."""
    return sorted(inner for inner in file.iterdir() if inner.is_file()) if file.is_dir() else [file]


def stored_bytes(file: Path) -> int:
    """The size of a file or a saved dataset; 0 of what cannot be looked at, whose reading tells why. Local."""
    try:
        return sum(inner.stat().st_size for inner in stored_files(file))
    except OSError:
        return 0


def _is_dataset(folder: Path) -> bool:
    return all((folder / name).exists() for name in _DATASET) or (folder / _SPLITS).exists()


def split(file: Path) -> list[Part]:
    """The parts of a file, in their order: none is large unless one document is. Local.

    A file that cannot be cut is one part, whose reading cuts it, or tells what is wrong.
    """
    try:
        return _split(file)
    except Exception:
        return [Part(file, stop=-1)]


def _split(file: Path) -> list[Part]:
    if file.is_dir():
        rows = len(_open_dataset(file))
        step = max(1, min(_ROWS, rows * _GROUP // max(stored_bytes(file), 1)))
        return [Part(file, start, min(start + step, rows)) for start in range(0, rows, step)]
    if file.suffix.lower() == ".jsonl":
        size = file.stat().st_size
        return [Part(file, start, start + _BYTES) for start in range(0, size, _BYTES)]
    if file.suffix.lower() == ".parquet":
        return list(_parquet_parts(file))
    return [Part(file)]


def read(part: Part) -> Iterator[Document | Broken]:
    """The documents of a part, empty ones included, and what is broken in it. Local."""
    try:
        for each in _split(part.file) if part.stop < 0 else [part]:
            yield from _read(each)
    except MemoryError:
        raise  # which says nothing of the file
    except UnicodeDecodeError:
        yield Broken(-1, "is not UTF-8 text")
    except UnusableError as error:
        yield Broken(-1, str(error))
    except OSError as error:
        yield Broken(-1, f"cannot be read: {error.strerror or error}")
    except Exception as error:  # whatever pypdf, pyarrow or datasets may raise where a file is damaged
        yield Broken(-1, f"is damaged, or not what its name says: {' '.join(str(error).split()) or repr(error)}")


def _read(part: Part) -> Iterator[Document | Broken]:
    if part.file.is_dir():
        yield from map(_row, _dataset_rows(part))
    elif part.file.suffix.lower() == ".jsonl":
        yield from map(_row, _jsonl_rows(part))
    elif part.file.suffix.lower() == ".parquet":
        yield from map(_row, _parquet_rows(part))
    else:
        yield Document(-1, _clean(extract(part.file)))


def where(file: Path, place: int) -> str:
    """How to name a document or what is broken: `FILE`, `FILE, line N` or `FILE, row N`. Local."""
    return where_all(file, [place])[0]


def where_all(file: Path, places: list[int]) -> list[str]:
    """The same of several places of a file, in rising order, for which it is read once. Local."""
    if max(places, default=-1) < 0 or file.suffix.lower() != ".jsonl" or file.is_dir():
        return [str(file) if place < 0 else f"{file}, row {place + 1}" for place in places]
    found, line, done = [], 1, 0
    with file.open("rb") as opened:
        for place in places:
            while done < place and (piece := opened.read(min(place - done, _BYTES))):
                line, done = line + piece.count(b"\n"), done + len(piece)
            found.append(str(file) if place < 0 else f"{file}, line {line}")
    return found


def refusal(key: str, file: Path, place: int, reason: str) -> UserError:
    """What to raise where something is broken and must not be skipped. Local."""
    return UserError(f"{key}: {where(file, place)} {reason}; mend or remove it, or set data.broken=skip")


def read_documents(sources: list[Path], key: str) -> list[str]:
    """The texts of all documents of some sources that are small, in order, without empty ones. Local.

    Of a chat what is said in it. Raises: UserError that names `key`, the file and the line where one is broken.
    """
    texts = []
    for source in sources:
        for file in find_files(source, key):
            for document in (document for part in split(file) for document in read(part)):
                if isinstance(document, Broken):
                    raise UserError(f"{key}: {where(file, document.place)} {document.reason}")
                texts.append(document.text)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{key}: {', '.join(map(str, sources))} holds no text")
    return texts


def read_jsonl(file: Path, key: str) -> list[tuple[str, Any]]:
    """The rows of a jsonl file, each with where it stands (`FILE, line N`). Local. Raises: UserError."""
    rows = []
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                rows.append((f"{file}, line {number}", json.loads(line)))
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{key}: {file} is not UTF-8 text") from None
    except (ValueError, RecursionError):  # the latter of what is nested too deep
        raise UserError(f"{key}: {file}, line {number} is not JSON") from None
    return rows


def _row(found: tuple[int, Any]) -> Document | Broken:
    """A row that holds `text` or `messages`."""
    place, row = found
    if isinstance(row, Broken):
        return row
    if isinstance(row, dict) and row.get("messages") is not None:
        messages = row["messages"]
        if isinstance(messages, list):  # parquet and datasets give each message the keys of all
            messages = [
                {key: value for key, value in message.items() if value is not None}
                if isinstance(message, dict)
                else message
                for message in messages
            ]
        try:
            return Document(place, chat_text(messages), messages)
        except ChatError as error:
            return Broken(place, str(error))
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return Document(place, _clean(row["text"]))
    return Broken(place, 'has no "text"')


def _clean(text: str) -> str:
    """Without halves of surrogate pairs, which JSON and PDF may hold, and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _jsonl_rows(part: Part) -> Iterator[tuple[int, Any]]:
    """The lines that begin within the part."""
    with part.file.open("rb") as opened:
        if part.start:  # the line that reaches into this part belongs to the one before
            opened.seek(part.start - 1)
            opened.readline()
        while (place := opened.tell()) < part.stop and (line := opened.readline()):
            try:
                if text := line.decode("utf-8-sig").strip():
                    yield place, json.loads(text)
            except UnicodeDecodeError:
                yield place, Broken(place, "is not UTF-8 text")
            except (ValueError, RecursionError):  # the latter of what is nested too deep
                yield place, Broken(place, "is not JSON")


def _parquet_parts(file: Path) -> Iterator[Part]:
    """A row group each, or some of its rows: writers may put all rows into one."""
    described, first = _open_parquet(file).metadata, 0
    for group in map(described.row_group, range(described.num_row_groups)):
        rows = range(first, first + group.num_rows, max(1, group.num_rows * _GROUP // max(group.total_byte_size, 1)))
        yield from (Part(file, start, min(start + rows.step, rows.stop)) for start in rows)
        first = rows.stop


def _parquet_rows(part: Part) -> Iterator[tuple[int, Any]]:
    file = _open_parquet(part.file)
    if not {"text", "messages"} & set(file.schema_arrow.names):
        raise UnusableError('has no column "text" or "messages"')
    columns = [name for name in ("text", "messages") if name in file.schema_arrow.names]
    ends = list(itertools.accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)))
    group = bisect.bisect_right(ends, part.start)
    first = ends[group - 1] if group else 0
    for batch in file.iter_batches(min(_ROWS, part.stop - part.start), row_groups=[group], columns=columns):
        rows = range(max(first, part.start), min(first + len(batch), part.stop))
        yield from zip(rows, batch.slice(rows.start - first, len(rows)).to_pylist() if rows else [], strict=True)
        first += len(batch)
        if first >= part.stop:
            return


def _dataset_rows(part: Part) -> Iterator[tuple[int, Any]]:
    dataset = _open_dataset(part.file)
    if not {"text", "messages"} & set(dataset.column_names):
        raise UnusableError('has no column "text" or "messages"')
    dataset = dataset.select_columns([name for name in ("text", "messages") if name in dataset.column_names])
    yield from enumerate(dataset.select(range(part.start, part.stop)), start=part.start)


def _open_parquet(file: Path) -> Any:
    from pyarrow.parquet import ParquetFile  # as below: not every corpus needs it

    return ParquetFile(file, memory_map=True)


def _open_dataset(folder: Path) -> Any:
    from datasets import load_from_disk  # a second, which a corpus of files need not wait for

    return load_from_disk(str(folder))
