"""What files hold, as a SHA-256 of each, which is computed again only where a file has changed."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from mica_ds.files import file_hash, remove_abandoned, replace_text

_SETTLED = 2  # seconds that a file must be old for its times to tell whether it has changed


def hash_files(files: list[Path], index: Path) -> dict[Path, str]:
    """The SHA-256 of each file, from the index where its size and times are those that stand there. Local.

    Of a file that cannot be read, why.
    """
    known: dict[str, list[Any]] = {}
    with suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(index.read_text()))
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda file: _look(file, known), files))
    fresh = {str(file.absolute()): looks for file, looks in zip(files, found, strict=True) if looks[0] is not None}
    if any(known.get(file) != looks for file, looks in fresh.items()):
        with suppress(OSError):  # one that cannot be written serves all the same
            index.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(index.parent)
            replace_text(index, json.dumps(known | fresh), is_shared=True)
    return {file: looks[-1] for file, looks in zip(files, found, strict=True)}


def _look(file: Path, known: dict[str, list[Any]]) -> list[Any]:
    """Size, times and SHA-256; no size where that must not be remembered."""
    try:
        state = file.stat()
        looks = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        before = known.get(str(file.absolute()))
        if before and before[:3] == looks:
            return before
        content = file_hash(file)
    except OSError as error:
        return [None, f"unreadable: {error.strerror}"]
    # A file that is written to while we look may keep its times.
    is_settled = time.time() - max(state.st_mtime, state.st_ctime) > _SETTLED
    return [*looks, content] if is_settled else [None, content]
