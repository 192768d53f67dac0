"""Drafted questions: whole sentences, gaps that can be filled from the documents, and documents without them."""

import heapq
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mica_ds.draft import (
    GAP,
    SourceText,
    check_absent,
    draft_questions,
    most_open,
    read_sources,
    without_sentences,
)
from mica_ds.errors import UserError
from mica_ds.questions import Choice, read_questions

from .conftest import ROOT, start_ranks

TEXT = """# Presses of the North

The Quillmar press was built in
Torvane by Edda Brunholt. It ran for 12 years.

- The Oldmar press was built in Kestowick by Olaf Tinnerby.
- The Newmar press was built in Larnbrook by Tora Windahl.
2. The Longmar press was built in Wenlisk by Sven Askeby! See below.

| press | town |
The Shortmar press was moved in 1907 by Ada Trent, and closed in 1911.
The Widemar press was moved in 1921. The Thinmar press was moved in 1930. The Flatmar press was moved in 1941.
"""


def test_gaps_are_filled_by_terms_of_the_same_kind() -> None:
    drafts = draft_questions([SourceText(Path("presses.md"), TEXT)], 100, seed=1)
    by_sentence = {draft["sentence"]: draft for draft in drafts}
    built = by_sentence["The Quillmar press was built in Torvane by Edda Brunholt."]  # over a line's end
    assert built["question"] == f"What belongs in the gap? The Quillmar press was built in Torvane by {GAP}."
    assert set(built["options"]) == {"Edda Brunholt", "Olaf Tinnerby", "Tora Windahl", "Sven Askeby"}
    assert built["options"][built["answer"]] == "Edda Brunholt"
    year = by_sentence["The Widemar press was moved in 1921."]
    assert set(year["options"]) <= {"1907", "1911", "1921", "1930", "1941"}
    assert year["options"][year["answer"]] == "1921"
    assert not any(sentence.startswith("It ") or "|" in sentence for sentence in by_sentence)
    assert draft_questions([SourceText(Path("presses.md"), TEXT)], 2, seed=1) == drafts[:2]


def test_the_handbook_gives_questions_for_a_person_to_correct(tmp_path: Path) -> None:
    documents = read_sources([ROOT / "configs/demonstration/handbook"], may_skip=False)
    drafts = draft_questions(documents, 60, seed=1)
    assert len(drafts) == 60
    assert len({draft["sentence"] for draft in drafts}) == 60
    texts = {str(document.file): " ".join(document.text.split()) for document in documents}
    for draft in drafts:
        assert draft["sentence"] in texts[draft["source"]]
        assert len(set(draft["options"])) == len(draft["options"]) == 4
        for i, option in enumerate(draft["options"]):
            assert any(re.search(rf"\b{re.escape(option)}\b", text) for text in texts.values())
            assert (option in draft["sentence"]) == (i == draft["answer"])
        filled = draft["question"].replace(GAP, draft["options"][draft["answer"]])
        assert filled.endswith(draft["sentence"])
    assert {draft["answer"] for draft in drafts} == {0, 1, 2, 3}
    assert len({draft["source"] for draft in drafts}) == 7  # all files but the two of questions with short answers
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, drafts)))
    assert read_questions(file) == [Choice(d["question"], d["options"], d["answer"]) for d in drafts]


@pytest.mark.usefixtures("alone")
def test_what_is_empty_or_broken_is_left_out_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{\n{"text": " "}\n{"text": "two"}')
    with pytest.raises(UserError, match=r"data\.corpus: .*b\.jsonl, line 2 is not JSON; .*data\.broken=skip"):
        read_sources([tmp_path], may_skip=False)
    found = read_sources([tmp_path], may_skip=True)
    assert found == [SourceText(tmp_path / "b.jsonl", text) for text in ("one", "two")]
    assert f"left out: {tmp_path}/b.jsonl, line 2 is not JSON" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no text"):
        read_sources([tmp_path / "a.txt"], may_skip=True)


def test_documents_without_what_is_asked() -> None:
    documents = [SourceText(Path("presses.md"), TEXT), SourceText(Path("copy.md"), "Note. " + TEXT)]
    drafts = draft_questions(documents, 100, seed=1)
    texts = [row["text"] for row in without_sentences(documents, drafts)]
    for text, document in zip(texts, documents, strict=True):
        assert not any(draft["sentence"] in " ".join(text.split()) for draft in drafts)
        assert "It ran for 12 years." in text
        assert set(text.split()) < set(document.text.split())
    assert without_sentences(documents, []) == [{"text": document.text} for document in documents]


def test_chats_stay_chats_without_what_is_asked(tmp_path: Path) -> None:
    lines = [line.strip("- ") for line in TEXT.splitlines() if line.startswith("- ")]
    chat = [{"role": "user", "content": "What is new"}, {"role": "assistant", "content": " ".join(lines)}]
    rows = [{"messages": chat}, {"text": TEXT}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = read_sources([tmp_path], may_skip=False)
    drafts = draft_questions(documents, 100, seed=1)
    assert set(lines) <= {draft["sentence"] for draft in drafts}  # not "What is new The Oldmar press …"
    told, text = without_sentences(documents, drafts)
    assert [message["role"] for message in told["messages"]] == ["user", "assistant"]
    assert told["messages"][0] == chat[0]
    assert not any(line in message["content"] for line in lines for message in told["messages"])
    assert text.keys() == {"text"}


def test_no_more_drafts_are_made_than_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [SourceText(Path(f"{i}.md"), TEXT.replace("mar press", f"mar{i} press")) for i in range(5)]
    all_of_them, made = draft_questions(documents, 100, seed=1), list[tuple[object, ...]]()
    nsmallest = heapq.nsmallest
    monkeypatch.setattr(heapq, "nsmallest", lambda *asked: made.append(asked) or nsmallest(*asked))
    assert draft_questions(documents, 7, seed=1) == all_of_them[:7]
    assert {draft["source"] for draft in all_of_them[:5]} == {f"{i}.md" for i in range(5)}
    assert len(made) == 7


def test_no_file_is_written_over(tmp_path: Path) -> None:
    corrected, absent = tmp_path / "corrected.jsonl", tmp_path / "absent.jsonl"
    corrected.write_text("{}")
    check_absent([absent])
    with pytest.raises(UserError, match=r"corrected\.jsonl exists, perhaps with a person's corrections"):
        check_absent([absent, corrected])
    with pytest.raises(UserError, match=r"absent\.jsonl cannot hold both the questions and the documents"):
        check_absent([absent, absent])


def test_the_most_open_ones_are_kept_whether_right_or_wrong() -> None:
    drafts = [{"n": i} for i in range(4)]
    losses = [[1.0, 9.0], [5.0, 5.1], [9.0, 1.0], [700.0, 700.5]]
    assert most_open(drafts, losses, 2) == [{"n": 1}, {"n": 3}]
    assert most_open(drafts, losses, 9) == drafts


@pytest.mark.dist
def test_the_verb_drafts_ranks_and_holds_out(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config = tiny_config(data={"corpus": [str(ROOT / "configs/demonstration/handbook")]})
    files = [tmp_path / "drafts.jsonl", tmp_path / "held-out.jsonl"]
    options = ["-o", str(files[0]), "--held-out", str(files[1]), "--number", "5", "--by-model"]
    finished = start_ranks(1, ["questions", str(config), *options])
    assert finished.codes == [0], finished.output
    drafts, texts = ([json.loads(line) for line in file.open()] for file in files)
    documents = read_sources([ROOT / "configs/demonstration/handbook"], may_skip=False)
    assert len(drafts) == 5
    assert all(draft in draft_questions(documents, 15, seed=42) for draft in drafts)
    assert texts == without_sentences(documents, drafts)


@pytest.mark.parametrize("text", ["no names here, only small words and more of them.", "Two words."])
def test_texts_without_terms_give_none(text: str) -> None:
    assert draft_questions([SourceText(Path("a.txt"), text)], 9, seed=0) == []
