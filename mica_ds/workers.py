"""The processes that read and tokenise the files of a source, a batch at a time; a small source needs none."""

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mica_ds import comm, process
from mica_ds.documents import PDF, Part, split, stored_bytes
from mica_ds.encoding import Encoded, encode
from mica_ds.errors import UserError

_BATCH = 4 << 20  # bytes that a process reads and tokenises at once
_LARGE = 32 << 20  # bytes from which processes are worth the seconds that their start takes
_tokenizer: PreTrainedTokenizerBase  # of a process that tokenises


@dataclass
class _Batch:
    """Parts that are read together."""

    numbers: list[int] = field(default_factory=list)
    """Of the file of each part."""
    parts: list[Part] = field(default_factory=list)
    size: int = 0
    """Bytes."""


def encode_files(
    files: list[Path], key: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], Encoded]]:
    """The documents of all files in their order, in batches, each with the numbers of its parts' files. Local.

    Raises: UserError where a process was killed, or the tokenizer has no template for a chat.
    """
    sizes = list(map(stored_bytes, files))
    work = sum(size * (PDF if file.suffix.lower() == ".pdf" else 1) for file, size in zip(files, sizes, strict=True))
    comm.say(f"data: tokenising {len(files)} files of {key}, {sum(sizes):,} bytes; the other ranks wait")
    batches = _batches(files, sizes)
    if work < _LARGE:
        yield from ((batch.numbers, encode(batch.parts, tokenizer)) for batch in batches)
        return
    workers = process.cores()
    # Spawned: a fork would copy the locks of the threads that gloo, CUDA and tokenizers run here.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_process, (tokenizer,))
    try:
        with tqdm(total=sum(sizes), desc="tokenising", unit="B", unit_scale=True) as bar:
            waiting: deque[tuple[_Batch, Future[Encoded]]] = deque()
            for batch in itertools.chain(batches, itertools.repeat(None)):
                if batch:
                    waiting.append((batch, pool.submit(_encode, batch.parts)))
                elif not waiting:
                    break
                if batch is None or len(waiting) > 2 * workers:  # these keep them busy, and more would fill the memory
                    done, future = waiting.popleft()
                    yield done.numbers, future.result()
                    bar.update(done.size)
    except BrokenProcessPool:
        raise UserError(f"{key}: a process that reads documents was killed, perhaps for lack of memory") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _batches(files: list[Path], sizes: list[int]) -> Iterator[_Batch]:
    batch = _Batch()
    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        cut = split(file)
        for part in cut:
            batch.numbers.append(number)
            batch.parts.append(part)
            batch.size += size // len(cut)
            if batch.size >= _BATCH:
                yield batch
                batch = _Batch()
    if batch.parts:
        yield batch


def _start_process(tokenizer: PreTrainedTokenizerBase) -> None:
    """What a process keeps; it ends with the rank that has started it, however that ends."""
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core
    # SLURM and a terminal send these to all processes, but mean the rank. The pool itself uses SIGTERM.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _encode(parts: list[Part]) -> Encoded:
    return encode(parts, _tokenizer)
