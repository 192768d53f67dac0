"""One progress bar over the work of all ranks, on rank 0, without a collective: the ranks share a counter."""

import itertools
import sys
import threading

from tqdm import tqdm

from mica_ds import comm, factor
from mica_ds.shards import Matrix

# One number that all ranks share: failures, solved matrices and their costs (ms), in one count a matrix.
_FAILED, _ONE = 1 << 50, 1 << 34


class Progress:
    """One bar on rank 0 over the matrices of all ranks, with the time left by their costs; a context manager."""

    _calls = itertools.count()

    def __init__(self, matrices: list[Matrix], r: int) -> None:
        self._key = f"bases-{next(self._calls)}"  # the same on all ranks: they call in step
        self._r = r
        self._matrices = len(matrices)
        self._total = sum(map(self._cost, matrices))
        self._state = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def advance(self, matrix: Matrix) -> None:
        """Count a solved matrix. Local."""
        self._state = comm.count(self._key, _ONE + self._cost(matrix))

    def fail(self) -> None:
        """Tell all ranks that one has failed. Local."""
        self._state = comm.count(self._key, _FAILED)

    def has_failed(self) -> bool:
        """Whether any rank had failed when this one last counted. Local."""
        return self._state >= _FAILED

    def _cost(self, matrix: Matrix) -> int:
        return 1 + int(1e3 * factor.cost(matrix.shape, self._r))

    def _show(self) -> None:
        interval = 0.5 if sys.stderr.isatty() else 10.0  # a log is not a terminal
        layout = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
        with tqdm(total=self._total, desc="bases", bar_format=layout) as bar:
            while True:
                is_over = self._is_over.wait(interval)
                solved, cost = divmod(comm.count(self._key) % _FAILED, _ONE)
                bar.set_description_str(f"bases: {solved}/{self._matrices} matrices", refresh=False)
                bar.n = cost
                bar.refresh()
                if is_over:
                    return

    def __enter__(self) -> "Progress":
        if comm.is_main():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if comm.is_main():
            self._thread.join()
