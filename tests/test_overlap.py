"""Near-duplicate documents, and questions that stand in the corpus."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mica_ds import overlap
from mica_ds.documents import read_documents
from mica_ds.draft import draft_questions, read_sources, without_sentences, write_jsonl
from mica_ds.encoding import SHINGLE, hash_ngrams, hash_words, signature
from mica_ds.overlap import contained, near_duplicates
from mica_ds.questions import read_statements

from .conftest import ROOT

WORDS = [f"word{i}" for i in range(5000)]


def signatures(texts: list[str]) -> np.ndarray:
    return np.stack([signature(np.array(hash_words(text))) for text in texts])


def stream(*texts: str) -> np.ndarray:
    return np.array([value for text in texts for value in (*hash_words(text), 0)], dtype=np.uint32)


def jaccard(one: str, other: str) -> float:
    a, b = (set(zip(*(text.split()[i:] for i in range(SHINGLE)), strict=False)) for text in (one, other))
    return len(a & b) / len(a | b)


def test_copies_are_found_and_others_are_not() -> None:
    random.seed(0)
    texts = [" ".join(random.choices(WORDS, k=random.randint(30, 400))) for _ in range(300)]
    expected = {}
    for copy_of, replaced in [(3, 0), (3, 0), (40, 1), (7, 2), (90, 60)]:
        words = texts[copy_of].split()
        for place in range(replaced):
            words[place * len(words) // max(replaced, 1)] = "other"
        similarity = jaccard(texts[copy_of], " ".join(words))
        assert not 0.7 < similarity < 0.9  # so that the judgement is clear
        if similarity > 0.9:
            expected[len(texts)] = copy_of
        texts.append(" ".join(words).upper() + "!")
    texts += ["too short", "too short"]
    assert len(expected) == 4
    assert near_duplicates([signatures(texts)]) == expected
    assert near_duplicates([signatures(texts[:100]), signatures(texts[100:])]) == expected
    assert near_duplicates([signatures(["too short"])]) == {}


@given(data=st.data())
def test_containment_is_the_share_of_ngrams(data: st.DataObject) -> None:
    letters = st.sampled_from("abc")
    texts = data.draw(st.lists(st.lists(letters, max_size=30).map(" ".join), min_size=1, max_size=4))
    questions = data.draw(st.lists(st.lists(letters, max_size=12).map(" ".join), max_size=5))

    def grams(text: str, n: int) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    expected = []
    for question in questions:
        n = min(overlap.NGRAM, len(question.split()))
        asked = grams(question, n)
        there = asked & set().union(*(grams(text, n) for text in texts))
        expected.append(len(there) / len(asked) if n >= overlap.SHORTEST else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_AT_ONCE", 5)
        assert contained(questions, [stream(*texts[:2]), stream(*texts[2:])]) == expected


def test_ngrams_hardly_collide() -> None:
    words = np.arange(1, 200_001, dtype=np.uint64)
    assert len(np.unique(hash_ngrams(words, 8))) == 200_000 - 7
    assert len(hash_ngrams(words[:3], 8)) == 0


def test_the_demonstration_asks_in_its_own_words() -> None:
    folder: Path = ROOT / "configs/demonstration"
    statements = [statement for _, statement in read_statements(folder / "questions.jsonl")]
    found = contained(statements, [stream(*read_documents([folder / "handbook"], "x"))])
    assert max(share for share in found if share is not None) < overlap.CONTAINED


@pytest.mark.parametrize("has_sentences", [True, False])
def test_drafts_stand_in_the_documents_until_their_sentences_are_held_out(has_sentences: bool, tmp_path: Path) -> None:
    documents = read_sources([ROOT / "configs/demonstration/handbook"], may_skip=False)
    drafts = draft_questions(documents, 100, seed=1)
    assert {5, 6, 7, 8, 9} <= {len(hash_words(draft["sentence"])) for draft in drafts}
    kept = [{key: draft[key] for key in draft if has_sentences or key != "sentence"} for draft in drafts]
    write_jsonl(kept, tmp_path / "drafts.jsonl")
    questions = read_statements(tmp_path / "drafts.jsonl")
    assert [question for question, _ in questions] == [draft["question"] for draft in drafts]
    left = [row["text"] for row in without_sentences(documents, drafts)]
    for texts, number in (([each.text for each in documents], 100), (left, 0)):
        shares = contained([statement for _, statement in questions], [stream(*texts)])
        assert sum(share is not None and share > overlap.CONTAINED for share in shares) == number
