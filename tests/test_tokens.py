"""The token cache: made once, whole or not at all, keyed by content and tokenizer, mapped."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mica_ds import contents, documents, encoding, tokens, workers
from mica_ds.errors import UserError
from mica_ds.files import locked
from mica_ds.tokens import Tokens, open_tokens

from .conftest import ROOT, SMOLLM2, environment, start

pytestmark = pytest.mark.usefixtures("alone")

CHAT = [{"role": "user", "content": "Who built the press?"}, {"role": "assistant", "content": "Edda Brunholt."}]


@pytest.fixture
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Texts, chats, and an empty row, in several files; old enough for their times to be trusted."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows: list[dict[str, Any]] = [{"text": f"The press {i} stands in Torvane. " * (i % 7)} for i in range(100)]
    rows[50] = {"messages": CHAT}
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(20):
        (folder / f"b{i:02}.txt").write_text(f"Press {i} was built by Edda Brunholt, in {1900 + i}.")
    return folder


def test_a_long_text_is_tokenised_in_pieces(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"Line {i} tells of press {i * 7919 % 104729}.\n" for i in range(300)) + "no end of line " * 20
    (tmp_path / "long.txt").write_text(text)
    monkeypatch.setattr(encoding, "_TEXT", 1000)
    assert "".join(encoding._pieces(text)) == text
    found = open_tokens(tmp_path / "long.txt", "data.corpus", tokenizer, tmp_path / "cache", False)
    assert found.ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert found.words.tolist() == [*encoding.hash_words(text), 0]


@pytest.fixture
def opened(source: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Tokens]:
    def open_(may_skip: bool = False, cache: Path = tmp_path / "cache") -> Tokens:
        return open_tokens(source, "data.corpus", tokenizer, cache, may_skip)

    return open_


def test_what_is_cached_is_what_was_read(
    opened: Callable[..., Tokens], source: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = opened()
    texts = [text for text in documents.read_documents([source], "x") if text != "Who built the press?\nEdda Brunholt."]
    assert found.manifest["documents"] == len(texts) + 1 == len(found.starts) - 1
    assert found.manifest["empty"] == 15
    assert found.manifest["tokens"] == len(found.ids) == len(found.is_learnt) == found.starts[-1]
    pieces = [found.ids[a:b].tolist() for a, b in zip(found.starts[:-1], found.starts[1:], strict=True)]
    (chat,) = [i for i, is_chat in enumerate(found.origins[:, 2]) if is_chat]
    assert pieces.pop(chat) == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert pieces == [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    learnt = found.is_learnt[found.starts[chat] : found.starts[chat + 1]]
    assert 0 < learnt.sum() < len(learnt) / 3
    assert found.name(chat) == f"{source}/a.jsonl, line 51"
    assert found.name(len(pieces)) == f"{source}/b19.txt"


def test_processes_make_the_same(
    opened: Callable[..., Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = opened(cache=tmp_path / "other")
    monkeypatch.setattr(workers, "_LARGE", 0)
    monkeypatch.setattr(workers, "_BATCH", 3000)
    monkeypatch.setattr(documents, "_BYTES", 3000)
    together = opened()
    assert together.manifest == alone.manifest
    for name in tokens._COLUMNS:
        assert (together.folder / name).read_bytes() == (alone.folder / name).read_bytes()


def test_nothing_is_read_again_until_it_changes(
    opened: Callable[..., Tokens],
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unexpected(*_: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(contents, "_SETTLED", -1)
    first = opened()
    with monkeypatch.context() as patch:
        patch.setattr(workers, "encode", unexpected)
        patch.setattr("hashlib.file_digest", unexpected)
        assert opened().manifest == first.manifest
    os.utime(source / "a.jsonl", (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(workers, "encode", unexpected)
        assert opened().folder == first.folder  # its content is the same
    (source / "b00.txt").write_text((source / "b00.txt").read_text().replace("0", "1"))
    assert opened().manifest["digest"] != first.manifest["digest"]
    tokenizer.chat_template = "{# other #}" + str(tokenizer.chat_template)
    folders = {opened().folder, first.folder}
    assert len(folders) == 2
    assert capsys.readouterr().out.count("data: tokenising 21 files of data.corpus") == 3


def test_a_cache_that_is_lost_or_damaged_is_made_again(opened: Callable[..., Tokens]) -> None:
    first = opened()
    content = (first.folder / "ids").read_bytes()
    (first.folder / "ids").write_bytes(content[:-4])
    assert (opened().folder / "ids").read_bytes() == content
    host, gone = socket.gethostname(), subprocess.Popen(["true"])
    gone.wait()
    writers = f"{host}-{gone.pid}", f"{host}-{os.getppid()}", f"{host}-2-{gone.pid}", f"other-{gone.pid}"
    for writer in writers:
        first.folder.with_name(f"{first.folder.name}.{writer}.partial").mkdir()
    (first.folder / "manifest.json").unlink()
    assert opened().manifest == first.manifest
    left = {folder.name.split(".")[1] for folder in first.folder.parent.glob("*.partial")}
    assert left == set(writers[1:])  # a job here that lives, and those of other hosts


def test_an_interrupted_write_leaves_nothing(
    opened: Callable[..., Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = workers.encode, iter(range(100))
    monkeypatch.setattr(workers, "_BATCH", 1000)

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(workers, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened()
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} <= {".lock", ".json"}
    assert opened().manifest["documents"] == 105


def test_what_changes_while_it_is_read_is_not_cached(
    opened: Callable[..., Tokens], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the half of a file that another program was writing would stand in the cache for the whole of it."""
    encode, file = workers.encode, source / "b00.txt"
    content = file.read_text()

    def disturbed(*arguments: Any) -> Any:
        file.write_text(content[:9])
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "encode", disturbed)
        with pytest.raises(UserError, match=r"data\.corpus: a file was changed while it was read"):
            opened()
    assert {each.suffix for each in (tmp_path / "cache").iterdir()} <= {".lock", ".json"}
    file.write_text(content)
    assert opened().manifest["documents"] == 105
    assert opened().ids.tolist() == opened(cache=tmp_path / "other").ids.tolist()


def test_a_process_leaves_the_signals_of_a_run_to_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_end_with_parent", lambda: None)
    monkeypatch.setattr(workers, "_tokenizer", None, raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    numbers = signal.SIGINT, signal.SIGUSR1, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    try:
        workers._start_process(None)  # type: ignore[arg-type]
        found = [signal.getsignal(number) for number in numbers]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert found == [signal.SIG_IGN, signal.SIG_IGN, before[2]]


def test_one_of_two_jobs_waits_for_the_other(
    opened: Callable[..., Tokens], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = opened().folder
    (folder / "manifest.json").unlink()
    with locked(folder.with_name(f"{folder.name}.lock")):
        other = threading.Thread(target=opened)
        other.start()
        said, deadline = "", time.monotonic() + 60
        while "another job tokenises data.corpus" not in said and time.monotonic() < deadline:
            time.sleep(0.05)
            said += capsys.readouterr().out
        assert other.is_alive()
        assert not (folder / "manifest.json").exists()
    other.join()
    assert (folder / "manifest.json").exists()


def test_what_is_broken_is_refused_or_left_out(opened: Callable[..., Tokens], source: Path) -> None:
    whole = opened()
    (source / "a.jsonl").write_text((source / "a.jsonl").read_text() + '\n{"text": 3}\n{')
    (source / "c.pdf").write_bytes(b"%PDF-1.4 and no more")
    with pytest.raises(UserError, match=r'data\.corpus: .*a\.jsonl, line 101 has no "text"; .*data\.broken=skip'):
        opened()
    found = opened(may_skip=True)
    assert [line.removeprefix(f"{source}/").split(", or")[0] for line in found.broken()] == [
        'a.jsonl, line 101 has no "text"',
        "a.jsonl, line 102 is not JSON",
        "c.pdf is damaged",
    ]
    assert found.manifest["digest"] == whole.manifest["digest"]
    with pytest.raises(UserError, match="line 101"):
        opened()  # though it is in the cache now


def test_a_cache_that_another_node_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_VISIBLE", 0)
    with pytest.raises(UserError, match=r"data\.cache: .* is not seen on .* storage that all ranks share"):
        tokens._open(tmp_path / "elsewhere", [])


def test_a_chat_without_a_template_is_refused(
    opened: Callable[..., Tokens], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template \(chat_template\.jinja\), which rows with"):
        opened(may_skip=True)


def write_corpus(folder: Path, lines: int) -> str:
    """Texts, and a chat, with which what is learnt has to be looked at."""
    folder.mkdir()
    with (folder / "a.jsonl").open("w") as file:
        file.write(json.dumps({"messages": CHAT}) + "\n")
        for i in range(lines):
            file.write(json.dumps({"text": f"Press {i % 1000} of {i % 999} stands in Torvane. " * 20}) + "\n")
    return str(folder / "a.jsonl")


@pytest.mark.parametrize(("lines", "batch"), [(400, 1 << 16), pytest.param(40_000, 1 << 20, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("smollm2")
def test_memory_does_not_grow_with_the_corpus(lines: int, batch: int, tmp_path: Path) -> None:
    sources = [write_corpus(tmp_path / str(number), factor * lines) for number, factor in enumerate((1, 1, 4))]
    finished = start([sys.executable, "-m", "tests.corpus_memory", str(SMOLLM2), str(batch), *sources])
    assert finished.codes == [0], finished.output
    (tokens_of_small, small), (tokens_of_large, large) = json.loads(finished.output.splitlines()[-1])
    more = tokens_of_large - tokens_of_small
    assert more > 200 * 3 * lines
    assert large - small < 4 * more  # a token takes 36 bytes and more in a Python list, and 8 as an int64


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_the_processes_of_a_killed_rank_end(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "0", 50_000)  # large enough for processes
    program = [sys.executable, "-m", "tests.corpus_memory", str(SMOLLM2), str(1 << 18), source]
    rank = subprocess.Popen(program, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(words.stat().st_size for words in (tmp_path / "0" / "cache").glob("*.partial/words")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started = psutil.Process(rank.pid).children(recursive=True)
    rank.kill()
    rank.wait()
    assert len(started) >= len(os.sched_getaffinity(0))
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []
