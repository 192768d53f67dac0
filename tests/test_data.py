"""Packing, and the reading of documents."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from mica_ds.data import pack, read_documents
from mica_ds.errors import UserError

from .conftest import TINY

PADDING = -1


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), length=st.integers(2, 16))
def test_packing_keeps_every_token_in_order_and_apart(lengths: list[int], length: int) -> None:
    counter = iter(range(10_000))
    documents = [[next(counter) for _ in range(size)] for size in lengths]
    starts = {document[0] for document in documents}
    rows = pack(documents, length, PADDING)
    assert {len(values) for row in rows for values in row.values()} == {length}
    assert [i for row in rows for i in row["input_ids"] if i != PADDING] == [i for d in documents for i in d]
    for row in rows:
        for place, (token, label, position) in enumerate(
            zip(row["input_ids"], row["labels"], row["position_ids"], strict=True)
        ):
            begins = place == 0 or token in starts or (token == PADDING and row["input_ids"][place - 1] != PADDING)
            assert (position == 0) == begins
            assert label == (-100 if begins or token == PADDING else token)
            assert begins or position == row["position_ids"][place - 1] + 1


@pytest.mark.parametrize("architecture", TINY)
def test_packed_documents_do_not_see_each_other(architecture: str, tiny_model: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.float32).eval()
    documents = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]]
    row = pack(documents, length=12, padding=0)[0]
    with torch.no_grad():
        packed = model(**{key: torch.tensor([row[key]]) for key in ("input_ids", "position_ids")}, use_cache=False)
        alone = torch.cat([model(torch.tensor([document])).logits[0] for document in documents])
        unseparated = model(torch.tensor([row["input_ids"]]), use_cache=False)
    torch.testing.assert_close(packed.logits[0], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(unseparated.logits[0], alone, atol=1e-3)  # so that the test can fail


def test_folders_and_formats_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "source": "x"}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert read_documents([tmp_path], "data.corpus") == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}', 'a.jsonl, line 2 has no "text"'),
        ("a.jsonl", b"{", "a.jsonl, line 1 is not JSON"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8"),
        ("a.pdf", b"x", "holds no file that ends in"),
        ("a.txt", b" \n", "holds no text"),
    ],
)
def test_a_bad_document_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"data\.corpus") as caught:
        read_documents([tmp_path], "data.corpus")
    assert message in str(caught.value)


def test_a_source_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.replay: .*nowhere does not exist"):
        read_documents([tmp_path / "nowhere"], "data.replay")


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
