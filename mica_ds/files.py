"""Files that are whole or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path, writer: str = "") -> Iterator[Path]:
    """Gives a path to write to, which takes the file's place at the end and is removed at an error. Local.

    `writer` tells apart those that may write one file at once. Nothing is flushed to the disk: after a power cut the
    file may be the earlier one, or empty.
    """
    partial = file.with_name(f"{file.name}{writer and f'.{writer}'}.partial")
    try:
        yield partial
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
