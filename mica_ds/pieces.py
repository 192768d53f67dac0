"""A checkpoint's files as pieces, which ranks and threads share: the header, then rows of tensors, in their order."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mica_ds import comm
from mica_ds.errors import UserError
from mica_ds.weights import Region, read_layout

PIECE = 16 << 20
"""Bytes of a piece, unless a single row has more."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor, or the header, which has no region; in bytes from the file's beginning."""

    region: Region | None
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """Neighbouring bytes of a file."""

    file: str
    rows: tuple[Rows, ...]

    @property
    def start(self) -> int:
        return self.rows[0].start

    @property
    def size(self) -> int:
        return self.rows[-1].stop - self.start


def cut(file: Path) -> Iterator[Piece]:
    """A whole safetensors file as pieces, in order. Local; reads the header."""
    gathered: list[Rows] = []
    for rows in _all_rows(file):
        if gathered and rows.stop - gathered[0].start > PIECE:
            yield Piece(file.name, tuple(gathered))
            gathered = []
        gathered.append(rows)
    yield Piece(file.name, tuple(gathered))


def share(pieces: list[Piece], rank: int) -> list[Piece]:
    """The pieces of a rank (modulo their number): neighbours, and about as many bytes as any other has. Local."""
    size, ranks = sum(piece.size for piece in pieces), comm.world_size()
    chosen, before = [], 0
    for piece in pieces:
        if before * ranks // size == rank % ranks:
            chosen.append(piece)
        before += piece.size
    return chosen


def read(folder: Path, piece: Piece) -> bytearray:
    """The bytes of a piece; read, for pages of a map would count as this process's memory. Local. Raises: UserError."""
    data = bytearray(piece.size)
    try:
        with (folder / piece.file).open("rb") as file:
            file.seek(piece.start)
            length = file.readinto(data)
    except OSError as error:
        raise UserError(f"{folder / piece.file} cannot be read ({error.strerror}): mend the disk") from None
    if length != piece.size:
        raise UserError(f"{folder / piece.file} has become shorter while it was read: start again")
    return data


def _all_rows(file: Path) -> Iterator[Rows]:
    layout = read_layout(file)
    yield Rows(None, 0, layout[0].start if layout else file.stat().st_size)
    for region in layout:
        if region.stop > region.start:
            row = (region.stop - region.start) // (region.shape[0] if region.shape else 1)
            step = max(1, PIECE // row) * row
            for start in range(region.start, region.stop, step):
                yield Rows(region, start, min(start + step, region.stop))
