"""A program for the tests: tokenises sources, reads all their sequences, and prints the peaks of its own memory.

Own memory is what Linux counts as anonymous: pages of mapped files belong to the page cache, which gives them up.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mica_ds import comm, data, documents, encoding, overlap, workers
from mica_ds.config import DataSettings, Source


def own_memory() -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def peak_of(work: Callable[[], Any]) -> tuple[Any, int]:
    """What a work returns, and how many bytes above the beginning its own memory was at its highest."""
    before = peak = own_memory()
    is_over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.005):
            peak = max(peak, own_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    result = work()
    is_over.set()
    watching.join()
    return result, peak - before


def read_all(source: Path, tokenizer: Any) -> int:
    """Tokenise a source, compare its documents, and read every sequence; returns the number of tokens."""
    settings = DataSettings(corpus=[Source(path=source)], sequence_length=256, cache=source.parent / "cache")
    dataset = data.build_dataset(settings, tokenizer, seed=1)
    (texts,) = dataset.texts
    overlap.near_duplicates([texts.tokens.signatures])
    overlap.contained(["who built the press that stands in Torvane"], [texts.tokens.words])
    return sum(len(dataset[i]["input_ids"]) for i in range(len(dataset)))


def main(model: Path, batch: int, sources: list[Path]) -> None:
    comm.start()
    documents._BYTES = workers._BATCH = encoding._TEXT = data._AT_ONCE = overlap._AT_ONCE = batch
    tokenizer = AutoTokenizer.from_pretrained(model)
    read_all(sources[0], tokenizer)  # what libraries keep from their first use is not the corpus
    found = [peak_of(lambda source=source: read_all(source, tokenizer)) for source in sources[1:]]  # type: ignore[misc]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [Path(source) for source in sys.argv[3:]])
