"""Packing, mixing, and the order of the sequences."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, interleave_datasets
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from mica_ds.config import Source
from mica_ds.data import Sequences, Texts, _shuffled, cut_rows, make_row, mix
from mica_ds.documents import read_documents
from mica_ds.tokens import Tokens

from .conftest import ATTENTIONS

PADDING = -1


def tokens_of(documents: list[list[int]], chats: list[int] | None = None) -> Tokens:
    """What the cache would hold of some documents; of the chats, by number, the last third is learnt."""
    lengths = [len(document) for document in documents]
    learnt = [
        number not in (chats or []) or 3 * place >= 2 * size
        for number, size in enumerate(lengths)
        for place in range(size)
    ]
    origins = np.array([[0, -1, number in (chats or [])] for number in range(len(documents))])
    return Tokens(
        folder=Path(),
        files=[],
        manifest={"chats": len(chats or []), "digest": str(documents)},
        ids=np.array([token for document in documents for token in document], dtype=np.int32),
        is_learnt=np.array(learnt, dtype=np.bool_),
        starts=np.cumsum([0, *lengths]),
        words=np.empty(0),
        signatures=np.empty(0),
        origins=origins,
    )


def packed(documents: list[list[int]], length: int, padding: int = PADDING, **how: Any) -> list[dict[str, list[int]]]:
    tokens = tokens_of(documents, how.get("chats"))
    rows = cut_rows(tokens, length, how.get("pack", True))
    return [{key: row.tolist() for key, row in make_row(tokens, b, e, length, padding).items()} for b, e in rows]


@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12), length=st.integers(3, 16), pack=st.booleans())
def test_packing_keeps_every_token_in_order_and_apart(lengths: list[int], length: int, pack: bool) -> None:
    counter = iter(range(10_000))
    documents = [[next(counter) for _ in range(size)] for size in lengths]
    starts = {document[0] for document in documents}
    rows = packed(documents, length, pack=pack)
    assert {len(values) for row in rows for values in row.values()} == {length}
    predicts_nothing = {document[-1] for document in documents if pack is False and len(document) % length == 1}
    if pack and sum(lengths) % length == 1:
        predicts_nothing = {documents[-1][-1]}
    expected = [i for document in documents for i in document if i not in predicts_nothing]
    assert [i for row in rows for i in row["input_ids"] if i != PADDING] == expected
    for row in rows:
        assert pack or len(starts & set(row["input_ids"])) <= 1
        for place, (token, label, position) in enumerate(
            zip(row["input_ids"], row["labels"], row["position_ids"], strict=True)
        ):
            begins = place == 0 or token in starts or (token == PADDING and row["input_ids"][place - 1] != PADDING)
            assert (position == 0) == begins
            assert label == (-100 if begins or token == PADDING else token)
            assert begins or position == row["position_ids"][place - 1] + 1


@given(lengths=st.lists(st.integers(3, 30), min_size=2, max_size=12), length=st.integers(4, 16), data=st.data())
def test_a_chat_is_not_cut_where_it_fits_and_learnt_in_its_answers(
    lengths: list[int], length: int, data: st.DataObject
) -> None:
    counter = iter(range(10_000))
    documents = [[next(counter) for _ in range(size)] for size in lengths]
    chats = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
    rows = packed(documents, length, chats=chats)
    seen = [token for row in rows for token in row["input_ids"] if token != PADDING]
    assert seen == sorted(set(seen))
    for number in chats:
        document = documents[number]
        holding = [row for row in rows if set(document) & set(row["input_ids"])]
        assert len(holding) == 1 or len(document) > length
        learnt = {label for row in rows for label in row["labels"] if label in document}
        assert learnt <= set(document[-(len(document) + 2) // 3 :])
        assert document[-1] in learnt or len(document) > length
    assert all(any(label != -100 for label in row["labels"]) for row in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mica_ds.data._predicts", lambda tokens, rows: np.ones(len(rows), dtype=np.bool_))
        all_rows = packed(documents, length, chats=chats)
    assert rows == [row for row in all_rows if any(label != -100 for label in row["labels"])]


@pytest.mark.parametrize("pack", [True, False])
def test_rows_are_cut_without_a_copy_of_every_token(pack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_of([[1] * 1000] * 1000, chats=[500])
    whole = cut_rows(tokens, 256, pack)
    monkeypatch.setattr("mica_ds.data._AT_ONCE", 768)  # three rows, and fewer documents than there are
    tracemalloc.start()
    rows = cut_rows(tokens, 256, pack)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.tolist() == whole.tolist()
    assert peak < len(tokens.ids)  # 8 bytes each as an int64


@pytest.mark.parametrize(("architecture", "attention"), ATTENTIONS)
def test_packed_documents_do_not_see_each_other(
    architecture: str, attention: str, tiny_model: Callable[[str], Path]
) -> None:
    """Two rows of a micro-batch, cut at different places, of which a second has a document that goes on."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model(architecture), dtype=torch.float32, attn_implementation=attention
    ).eval()
    documents = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19], [20, 21, 22, 23, 24], [25, 26, 27, 28]]
    pieces = [*documents[:2], documents[2][:4], documents[2][4:], *documents[3:]]
    rows = packed(documents, length=12, padding=0)
    assert len(rows) == 2
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits.flatten(0, 1)
        alone = torch.cat([model(torch.tensor([piece])).logits[0] for piece in pieces])
        unseparated = model(batch["input_ids"], use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(unseparated, alone, atol=1e-3)  # so that the test can fail


@pytest.mark.parametrize("share", [0.12, 0.9])
@pytest.mark.parametrize("sizes", [(1, 327), (1500, 200), (7, 7)])
def test_replay_is_mixed_in_as_datasets_does_it(sizes: tuple[int, int], share: float) -> None:
    corpus, replay = np.arange(sizes[0]), 10_000 + np.arange(sizes[1])
    expected = interleave_datasets(
        [Dataset.from_dict({"row": rows}) for rows in (corpus, replay)],
        probabilities=[1 - share, share],
        seed=3,
        stopping_strategy="all_exhausted",
    )["row"]
    found = mix(corpus, replay, share, seed=3)
    assert found.tolist() == list(expected)


def texts(rows: int, weight: float) -> Texts:
    tokens = tokens_of([[100 * rows + i, 1] for i in range(rows)])
    return Texts(Source(path=Path("x"), weight=weight), "corpus", tokens, cut_rows(tokens, 8, pack=False))


def test_weights_say_how_often_each_sequence_comes() -> None:
    order = _shuffled([texts(10, 1), texts(20, 2.5), texts(30, 0.5), texts(3, 0.01)], seed=1)
    counts = np.bincount(order, minlength=63)
    assert set(counts[:10]) == {1}
    assert sorted(counts[10:30]) == [2] * 10 + [3] * 10
    assert sorted(counts[30:60]) == [0] * 15 + [1] * 15
    assert sum(counts[60:]) == 1  # not lost whole
    assert order.tolist() == _shuffled([texts(10, 1), texts(20, 2.5), texts(30, 0.5), texts(3, 0.01)], 1).tolist()
    assert order.tolist() != sorted(order.tolist())
    assert _shuffled([texts(10, 1)], 5).tolist() == list(Dataset.from_dict({"n": range(10)}).shuffle(seed=5)["n"])


def test_rows_are_found_in_their_source() -> None:
    sources = [texts(3, 1), texts(5, 1), texts(2, 1)]
    sequences = Sequences(sources, np.array([9, 0, 2, 3, 7, 8]), 8, padding=0)
    assert [row["input_ids"][0] for row in sequences.__getitems__(list(range(6)))] == [201, 300, 302, 500, 504, 200]
    assert all(value.dtype == np.int64 for value in sequences[0].values())
    other = Sequences(sources, np.array([0, 9, 2, 3, 7, 8]), 8, padding=0)
    assert sequences.digest() == Sequences(sources, np.array([9, 0, 2, 3, 7, 8]), 8, 0).digest()
    assert sequences.digest() != other.digest()


def test_the_demonstration_is_what_it_says(smollm2: Path) -> None:
    from .conftest import ROOT

    data = ROOT / "configs/demonstration"
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    handbook = read_documents([data / "handbook"], "data.corpus")
    assert sum(text.count("\n## ") for text in handbook[:1]) == 24  # a chapter speaks of every entity
    assert len(read_documents([data / "retention.jsonl"], "evaluate.retention")) == 40
    replay = set(read_documents([data / "replay.jsonl"], "data.replay"))
    assert not replay & set(read_documents([data / "retention.jsonl"], "evaluate.retention"))
    assert sum(len(tokenizer(text)["input_ids"]) for text in handbook) > 10_000
