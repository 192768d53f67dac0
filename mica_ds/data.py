"""Cached tokens to training sequences, in which no document sees another, in an order that follows from the seed."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mica_ds import comm
from mica_ds.config import DataSettings, Source
from mica_ds.errors import UserError
from mica_ds.tokens import Tokens, open_tokens

_BLOCK = 1000  # choices between corpus and replay that are drawn at once
_AT_ONCE = 1 << 18  # tokens whose labels are counted, and documents that are packed


@dataclass(frozen=True)
class Texts:
    """A source of the config, as training sees it."""

    source: Source
    purpose: str
    """`corpus` or `replay`."""
    tokens: Tokens
    rows: np.ndarray
    """int64 (rows, 2): where each sequence begins and ends among the tokens."""


class Sequences(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Rows of `input_ids`, `labels` and `position_ids`, int64, each `length` long, read when asked for."""

    def __init__(self, texts: list[Texts], order: np.ndarray, length: int, padding: int) -> None:
        """`order` holds numbers of rows, counted through all the texts. Local."""
        self.texts, self._order, self._length, self._padding = texts, order, length, padding
        self._ends = np.cumsum([len(each.rows) for each in texts])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self._order[index]
        number = int(np.searchsorted(self._ends, row, side="right"))
        texts = self.texts[number]
        begin, end = texts.rows[row - self._ends[number]]  # counted from the end of its texts, so negative
        return make_row(texts.tokens, begin, end, self._length, self._padding)

    def __getitems__(self, indices: list[int]) -> list[dict[str, np.ndarray]]:
        return [self[index] for index in indices]

    def digest(self) -> str:
        """SHA-256 of all token ids, what of them is learnt, and their order: whether two runs learn the same. Local.

        From what the cache knows of its tokens, so that they are not read.
        """
        about = [[each.tokens.manifest["digest"] for each in self.texts], self._length]
        found = hashlib.sha256(json.dumps(about).encode())
        for rows in (*(each.rows for each in self.texts), self._order):
            found.update(rows.astype("<i8").tobytes())
        return found.hexdigest()


def build_dataset(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> Sequences:
    """Tokenise what is not cached, pack and mix.

    Each sequence of a source comes `weight` times (of a fraction a random part), all are shuffled by `seed`, and replay
    is mixed in: the shorter of the two starts over until the longer one has been seen whole. The order is the same on
    every number of ranks. Where the global batch does not divide the rows, the first come twice: accelerate (1.15)
    would repeat as many as the number of ranks asks for. Collective.
    Raises: UserError where a source is missing, broken or empty.
    """
    corpus = [_open(settings, source, "corpus", tokenizer) for source in settings.corpus]
    share = settings.replay_fraction
    replay = [_open(settings, source, "replay", tokenizer) for source in settings.replay] if share else []
    order = _shuffled(corpus, seed)
    if replay:
        first = sum(len(texts.rows) for texts in corpus)
        order = mix(order, first + _shuffled(replay, seed), share, seed)
    steps = -(-len(order) // settings.global_batch)
    order = np.resize(order, steps * settings.global_batch)
    return Sequences([*corpus, *replay], order, settings.sequence_length, tokenizer.eos_token_id)


def _open(settings: DataSettings, source: Source, purpose: str, tokenizer: PreTrainedTokenizerBase) -> Texts:
    tokens = open_tokens(source.path, f"data.{purpose}", tokenizer, settings.cache, settings.broken == "skip")
    with comm.failing_together():
        rows = cut_rows(tokens, settings.sequence_length, settings.pack)
        if not len(rows):
            raise UserError(f"data.{purpose}: {source.path} holds nothing to predict")
    return Texts(source, purpose, tokens, rows)


def _shuffled(texts: list[Texts], seed: int) -> np.ndarray:
    """The rows of some sources, each as often as its weight says, counted through all of them."""
    found, first = [], 0
    for number, each in enumerate(texts):
        rows = len(each.rows)
        wanted = max(1, round(each.source.weight * rows))
        whole, rest = divmod(wanted, rows)
        part = np.random.default_rng([seed, number]).permutation(rows)[:rest]
        found += [first + np.tile(np.arange(rows), whole), first + part]
        first += rows
    order = np.concatenate(found)
    return order[np.random.default_rng(seed).permutation(len(order))]


def mix(corpus: np.ndarray, replay: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draw from the two in turn, replay with the probability `share`, until each has been seen whole. Local."""
    random = np.random.default_rng(seed)
    drawn = np.empty(0, dtype=np.int64)
    while (drawn == 0).sum() < len(corpus) or (drawn == 1).sum() < len(replay):
        missing = max((len(corpus) - (drawn == 0).sum()) / (1 - share), (len(replay) - (drawn == 1).sum()) / share)
        blocks = [random.choice(2, _BLOCK, p=[1 - share, share]) for _ in range(1 + int(missing) // _BLOCK)]
        drawn = np.concatenate([drawn, *blocks])
    last = max(np.flatnonzero(drawn == which)[len(rows) - 1] for which, rows in enumerate((corpus, replay)))
    drawn = drawn[: last + 1]
    order = np.empty_like(drawn)
    for which, rows in enumerate((corpus, replay)):
        order[drawn == which] = np.resize(rows, (drawn == which).sum())
    return order


def cut_rows(tokens: Tokens, length: int, pack: bool) -> np.ndarray:
    """Where sequences of at most `length` tokens begin and end, int64 (rows, 2). Local.

    Packed, documents are laid end to end and the line is cut where a sequence is full; a chat that would fit into one
    of its own begins another instead of being cut. Not packed, each document begins its own. Rows that would predict
    nothing are left out.
    """
    starts = np.asarray(tokens.starts)
    if not pack:
        rows = _pieces(starts[:-1], starts[1:], length)
    elif not tokens.manifest["chats"]:
        rows = _pieces(starts[:1], starts[-1:], length)
    else:
        cuts = np.fromiter(_cuts(tokens, length), dtype=np.int64)
        rows = np.stack([cuts[:-1], cuts[1:]], axis=1)
        rows = rows[rows[:, 1] > rows[:, 0]]
    return rows[_predicts(tokens, rows)]


def _cuts(tokens: Tokens, length: int) -> Iterator[int]:
    """Where rows begin that cut no chat which would fit into one, and where the last one ends."""
    begin = int(tokens.starts[0])
    yield begin
    for first in range(0, len(tokens.origins), _AT_ONCE):
        bounds = itertools.pairwise(tokens.starts[first : first + _AT_ONCE + 1].tolist())
        chats = tokens.origins[first : first + _AT_ONCE, 2].tolist()
        for (start, stop), is_chat in zip(bounds, chats, strict=True):
            if is_chat and start > begin and stop - start <= length < stop - begin:
                begin = start
                yield begin
            while stop - begin >= length:
                begin += length
                yield begin
    yield int(tokens.starts[-1])


def _pieces(starts: np.ndarray, stops: np.ndarray, length: int) -> np.ndarray:
    """Each stretch of tokens, cut from its start into rows."""
    number = -(-(stops - starts) // length)
    first = np.repeat(np.cumsum(number) - number, number)
    begins = np.repeat(starts, number) + length * (np.arange(number.sum()) - first)
    return np.stack([begins, np.minimum(begins + length, np.repeat(stops, number))], axis=1)


def _predicts(tokens: Tokens, rows: np.ndarray) -> np.ndarray:
    """Which rows have a label, where they follow one another without a gap."""
    if not tokens.manifest["chats"]:  # a text has two tokens at least, so any two in a row predict
        return rows[:, 1] - rows[:, 0] > 1
    number = max(1, _AT_ONCE // int((rows[:, 1] - rows[:, 0]).max()))
    labels = np.empty(len(rows), dtype=np.int64)
    for first in range(0, len(rows), number):  # reduceat (numpy 2.4) makes an int64 of each token it is given
        some = rows[first : first + number]
        learnt = tokens.is_learnt[some[0, 0] : some[-1, 1]]
        labels[first : first + number] = np.add.reduceat(learnt, some[:, 0] - some[0, 0], dtype=np.int64)
    firsts = np.union1d(rows[:, 0], tokens.starts[:-1])
    firsts = firsts[tokens.is_learnt[firsts]]  # which nothing precedes
    return labels > np.bincount(np.searchsorted(rows[:, 0], firsts, side="right") - 1, minlength=len(rows))


def make_row(tokens: Tokens, begin: int, end: int, length: int, padding: int) -> dict[str, np.ndarray]:
    """One sequence, padded to `length`. Local.

    `position_ids` start again at 0 with each document, and with a piece that goes on from the row before: from them
    transformers (5.23) builds the mask that keeps the documents of a row apart. The first token of each is not
    predicted (label -100): nothing precedes it.
    """
    first, last = np.searchsorted(tokens.starts, [begin + 1, end])
    starts = np.concatenate([[begin], tokens.starts[first:last], [end]])
    places = np.arange(begin, end) - np.repeat(starts[:-1], np.diff(starts))
    ids = tokens.ids[begin:end].astype(np.int64)
    labels = np.where((places > 0) & tokens.is_learnt[begin:end], ids, -100)
    room = length - (end - begin)
    return {
        "input_ids": np.concatenate([ids, np.full(room, padding)]),
        "labels": np.concatenate([labels, np.full(room, -100)]),
        "position_ids": np.concatenate([places, np.arange(room)]),
    }
