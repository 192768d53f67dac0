"""Parts of documents to token ids, words and signatures: what is computed once and cached. Runs in processes."""

import functools
import re
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mica_ds.chat import ChatError, encode_chat
from mica_ds.documents import Broken, Document, Part, read

SHINGLE = 5
"""Words in a row that a signature is made of."""
SIGNATURE = 64
"""Numbers of a MinHash signature."""
COLUMNS = ("ids", "is_learnt", "lengths", "words", "signatures", "origins")
_TEXT = 1 << 20  # characters that are tokenised at once: a tokenizer's own results take a hundred times as much
_END = np.uint32(0)  # no word's hash
_AT_ONCE = 1 << 16  # shingles, of which datasketch makes a table with SIGNATURE columns
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Encoded:
    """The documents of some parts, one after the other."""

    ids: np.ndarray
    """int32; a text ends with the tokenizer's eos_token."""
    is_learnt: np.ndarray
    """bool, a token: all of a text, of a chat the answers."""
    lengths: np.ndarray
    """int64, tokens of each document."""
    words: np.ndarray
    """uint32, a hash of each word; a 0 ends a document."""
    signatures: np.ndarray
    """uint32 (documents, SIGNATURE)."""
    origins: np.ndarray
    """int64 (documents, 3): the number of its part, its place in it, and whether it is a chat."""
    empty: int = 0
    """Documents without text, left out."""
    broken: list[tuple[int, Broken]] = field(default_factory=list)
    """Each with the number of its part."""


def encode(parts: list[Part], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Read and tokenise some parts. Local. Raises: UserError where the tokenizer has no template for a chat."""
    done: list[Encoded] = []
    kept: list[tuple[int, Document]] = []
    broken, empty, size = [], 0, 0
    for number, part in enumerate(parts):
        for found in read(part):
            if isinstance(found, Broken):
                broken.append((number, found))
            elif not found.text.strip():
                empty += 1
            else:
                kept.append((number, found))
                size += len(found.text)
            if size >= _TEXT:
                done.append(_encode(kept, tokenizer))
                kept, size = [], 0
    done.append(_encode(kept, tokenizer))
    joined = {name: np.concatenate([getattr(each, name) for each in done]) for name in COLUMNS}
    refused = [fault for each in done for fault in each.broken]
    return Encoded(**joined, empty=empty, broken=sorted([*broken, *refused], key=lambda fault: fault[0]))


def _encode(documents: list[tuple[int, Document]], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Documents, each with the number of its part, tokenised at once."""
    pieces = [_pieces(document.text) for _, document in documents]
    texts = [first for (first, *_), (_, document) in zip(pieces, documents, strict=True) if document.messages is None]
    encoded = iter(tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else [])
    ids, is_learnt, origins, words, broken = [], [], [], [], []
    for (number, document), (_, *others) in zip(documents, pieces, strict=True):
        if document.messages is None:
            tokens = [np.array(without_end(next(encoded), tokenizer), dtype=np.int32)]
            tokens += [np.array(_go_on(tokenizer, piece), dtype=np.int32) for piece in others]
            ids.append(np.concatenate([*tokens, [tokenizer.eos_token_id]]))
            is_learnt.append(np.ones(len(ids[-1]), dtype=np.bool_))
        else:
            try:
                chat, learnt = encode_chat(document.messages, tokenizer)
            except ChatError as error:
                broken.append((number, Broken(document.place, str(error))))
                continue
            ids.append(np.array(chat))
            is_learnt.append(np.array(learnt, dtype=np.bool_))
        origins.append((number, document.place, document.messages is not None))
        words.append(np.concatenate([np.array(hash_words(piece), dtype=np.uint32) for piece in _pieces(document.text)]))
    return Encoded(
        ids=np.concatenate([np.empty(0, np.int32), *ids], dtype=np.int32),
        is_learnt=np.concatenate([np.empty(0, np.bool_), *is_learnt]),
        lengths=np.array([len(tokens) for tokens in ids], dtype=np.int64),
        words=np.concatenate([np.empty(0, np.uint32), *(np.append(theirs, _END) for theirs in words)]),
        signatures=np.array([signature(theirs) for theirs in words], dtype=np.uint32).reshape(-1, SIGNATURE),
        origins=np.array(origins, dtype=np.int64).reshape(-1, 3),
        broken=broken,
    )


def without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text that goes on: some tokenizers end each with their eos_token. Local."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _pieces(text: str) -> list[str]:
    """A text in pieces of some _TEXT characters, cut after a line: a large one whole would take too much memory."""
    pieces, start = [], 0
    while len(text) - start > _TEXT:
        end = text.find("\n", start + _TEXT) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if start < len(text) else pieces


def _go_on(tokenizer: PreTrainedTokenizerBase, piece: str) -> list[int]:
    return tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def hash_words(text: str) -> list[int]:
    """32 bits of each word of a text, whatever its case and punctuation, never 0. Local."""
    return [_hash_word(word) for word in re.findall(r"\w+", text.lower())]


@functools.lru_cache(1 << 16)
def _hash_word(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) or 1


def hash_ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """64 bits of each n words in a row, uint64 (words - n + 1). Local."""
    windows = max(len(words) - n + 1, 0)
    total = np.zeros(windows, dtype=np.uint64)
    for i in range(n):
        total = total * _MULTIPLIER + words[i : i + windows]  # modulo 2⁶⁴
    return total ^ (total >> np.uint64(31))


def signature(words: np.ndarray) -> np.ndarray:
    """The MinHash of a document's shingles, uint32 (SIGNATURE,); all zero where it has fewer words. Local."""
    shingles = np.unique(hash_ngrams(words.astype(np.uint64), SHINGLE) >> np.uint64(32))
    if not len(shingles):
        return np.zeros(SIGNATURE, dtype=np.uint32)
    minhash = _empty_minhash().copy()
    for start in range(0, len(shingles), _AT_ONCE):
        minhash.update_batch(shingles[start : start + _AT_ONCE])
    return minhash.hashvalues


@functools.cache
def _empty_minhash() -> Any:
    from datasketch import MinHash  # half a second, which a run from the cache need not wait for

    return MinHash(SIGNATURE, hashfunc=int, scheme="affine32")
