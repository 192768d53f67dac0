"""Reading documents: every format, and what is wrong with them."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from mica_ds import documents
from mica_ds.documents import Broken, find_files, read, read_documents, split, unread_files, where, where_all
from mica_ds.errors import UserError

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Edda."}]


def write_pdf(file: Path, *pages: str) -> None:
    """A PDF with a text, or only a line where that is empty, on each page."""
    with matplotlib.rc_context({"pdf.fonttype": 42}), PdfPages(file) as pdf:
        for text in pages:
            figure = Figure()
            if text:
                figure.text(0.1, 0.5, text)
            pdf.savefig(figure)


def test_folders_and_formats_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("second")
    (tmp_path / "a.TXT").write_text("first", encoding="utf-8-sig")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth\\u2028\\ud800", "source": "x"}\n')
    for unread in (
        "ignored.bin",
        "b/one.DOCX",
        "b/two.docx",
        "b/README",
        ".hidden.docx",
        "b/.git/index",
        "b/._notes.txt",
        ".ipynb_checkpoints/notes.md",
    ):
        (tmp_path / unread).parent.mkdir(exist_ok=True)
        (tmp_path / unread).write_bytes(b"\0")
    write_pdf(tmp_path / "d.pdf", "The press stands\nin Torvane.", "", "Built in 1911.")
    page = """<html><head><title>Presses</title><style>p {}</style></head><body><!-- no -->
        <p>Built by <b>Edda</b>
        Brunholt.</p><ul><li>one<li>two</ul><script>alert()</script><pre>a\n  b</pre>&copy; x</body></html>"""
    (tmp_path / "e.html").write_text(page)
    pa.parquet.write_table(pa.table({"text": ["seven", "eight"], "other": [1, 2]}), tmp_path / "f.parquet")
    Dataset.from_list([{"messages": CHAT, "id": 1}]).save_to_disk(tmp_path / "g")
    expected = [
        "first",
        "second",
        "third",
        "fourth\u2028?",
        "The press stands\nin Torvane.\n\nBuilt in 1911.",
        "Presses\nBuilt by Edda Brunholt.\none\ntwo\na\n  b\n© x",
        "seven",
        "eight",
        "Who?\nEdda.",
    ]
    assert read_documents([tmp_path], "data.corpus") == expected
    assert [file.name for file in find_files(tmp_path, "x")] == [
        "a.TXT",
        "two.md",
        "c.jsonl",
        "d.pdf",
        "e.html",
        "f.parquet",
        "g",
    ]
    assert list(unread_files(tmp_path).items()) == [(".docx", 2), ("", 1), (".bin", 1)]
    assert unread_files(tmp_path / "g") == unread_files(tmp_path / "a.TXT") == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}', 'a.jsonl, line 2 has no "text"'),
        ("a.jsonl", b'{"text": "x"}\n\n{', "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 9999, "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl, line 1 is not UTF-8 text"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "a.jsonl, line 1 is malformed: message 1"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "a.jsonl, line 1 has no answer"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            "line 1 is malformed: message 1 holds half",
        ),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8"),
        ("a.pdf", b"x", "a.pdf is damaged, or not what its name says"),
        ("a.parquet", b"PAR1xPAR1", "a.parquet is damaged, or not what its name says"),
        ("a.bin", b"x", "holds no file that ends in"),
        ("a.txt", b" \n", "holds no text"),
    ],
)
def test_a_bad_document_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"data\.corpus") as caught:
        read_documents([tmp_path], "data.corpus")
    assert message in str(caught.value)


def test_sources_that_are_no_texts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.replay: .*nowhere does not exist"):
        read_documents([tmp_path / "nowhere"], "data.replay")
    write_pdf(tmp_path / "scan.pdf", "", "")
    with pytest.raises(UserError, match=r"scan\.pdf holds no text: if its pages are scans, have their text recognised"):
        read_documents([tmp_path / "scan.pdf"], "data.replay")
    pa.parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'a\.parquet has no column "text" or "messages"'):
        read_documents([tmp_path / "a.parquet"], "data.replay")
    both = Dataset.from_list([{"text": "x"}])
    DatasetDict({"train": both, "test": both}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="splits holds a dataset's splits; name one of them: test, train"):
        read_documents([tmp_path / "splits"], "data.replay")
    assert read_documents([tmp_path / "splits" / "test"], "data.replay") == ["x"]


def test_no_folder_is_left_out_unsaid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linked ones are read, but not again and again; one that cannot be read is named."""
    inner = tmp_path / "source" / "inner"
    inner.mkdir(parents=True)
    (inner / "a.txt").write_text("first")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("second")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "source")
    (inner / "linked").symlink_to(tmp_path / "elsewhere")
    (inner / "loop").symlink_to(tmp_path / "source")
    assert read_documents([tmp_path / "source"], "data.corpus") == ["first", "second"]
    scandir = os.scandir

    def denying(folder: Any) -> Any:
        if Path(folder) == inner:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denying)
    with pytest.raises(UserError, match=rf"data\.corpus: {inner} cannot be read: Permission denied"):
        find_files(tmp_path / "source", "data.corpus")


@given(lines=st.lists(st.sampled_from(["{", "", '{"text": "äö"}', '{"text": "a long one"}']), max_size=30))
def test_every_line_is_read_once_however_a_file_is_split(
    lines: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    file.write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BYTES", 7)
        found = [document for part in split(file) for document in read(part)]
        names = [where(file, document.place) for document in found]
        assert where_all(file, [-1, *(document.place for document in found)]) == [str(file), *names]
        places = [int(name.split("line ")[1]) for name in names]
    assert places == [number for number, line in enumerate(lines, start=1) if line]
    assert [isinstance(each, Broken) for each in found] == [line == "{" for line in lines if line]


def test_rows_of_parquet_and_datasets_keep_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"text": f"text {i}"} for i in range(2500)]
    rows[2100]["text"] = None
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1200)
    Dataset.from_list(rows).save_to_disk(tmp_path / "b")
    for file in (tmp_path / "a.parquet", tmp_path / "b"):
        parts = split(file)
        assert len(parts) == 3
        found = [document for part in parts for document in read(part)]
        assert [document.place for document in found] == list(range(2500))
        (broken,) = [document for document in found if isinstance(document, Broken)]
        assert where(file, broken.place) == f"{file}, row 2101"
        assert broken.reason == 'has no "text"'
    whole = [each for part in split(tmp_path / "a.parquet") for each in read(part)]
    monkeypatch.setattr(documents, "_GROUP", 3000)  # bytes: a few hundred rows, and batches in the midst of parts
    for rows_at_once in (97, 1000):
        monkeypatch.setattr(documents, "_ROWS", rows_at_once)
        for file in (tmp_path / "a.parquet", tmp_path / "b"):
            parts = split(file)
            assert max(part.stop - part.start for part in parts) < 400
            assert [each for part in parts for each in read(part)] == whole


def test_a_file_that_cannot_be_cut_for_a_moment_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"text {i}"} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "c")

    def fail(_: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for file in find_files(tmp_path, "data.corpus"):
        with monkeypatch.context() as patch:
            patch.setattr(documents, "_split", fail)
            parts = split(file)
            (unread,) = read(parts[0])
            assert unread == Broken(-1, "cannot be read: Too many open files")
        assert [getattr(each, "text", None) for part in parts for each in read(part)] == [row["text"] for row in rows]


def test_messages_have_no_keys_without_a_value(tmp_path: Path) -> None:
    """Parquet gives each message the keys of all, which templates take for given."""
    call = {"role": "assistant", "content": "", "tool_calls": ["built(press)"]}
    pa.parquet.write_table(pa.table({"messages": [[CHAT[0], call, *CHAT[1:]]]}), tmp_path / "a.parquet")
    ((document,),) = [list(read(part)) for part in split(tmp_path / "a.parquet")]
    assert document.messages == [CHAT[0], call, *CHAT[1:]]
