"""From documents of every kind to a trained run, on the command line: what is read, said, cached, refused and kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from ..conftest import Finished, start_fresh_ranks, start_ranks
from ..test_documents import CHAT, write_pdf
from .test_bad_input import assert_refused

pytestmark = pytest.mark.dist

QUICK = ["train.max_steps=2", "evaluate.retention=null"]


def write_corpus(folder: Path) -> None:
    """A document or more of each kind, one of them twice, and one that holds a question."""
    folder.mkdir()
    text = "The press in {} was built by Edda Brunholt, who had learnt her trade in the mills of Torvane."
    (folder / "a.txt").write_text(text.format("Arn") * 3)
    (folder / "b.md").write_text(text.format("Arn") * 3)
    (folder / "c.html").write_text(f"<p>{text.format('Brod')}</p>")
    write_pdf(folder / "d.pdf", "Who built press 2?\nNobody can tell.")
    rows: list[dict[str, Any]] = [{"text": text.format(place)} for place in ("Cald", "Dorn", "Eld")]
    (folder / "e.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {"text": " "}, {"messages": CHAT}]))
    pa.parquet.write_table(pa.table({"text": [text.format("Fenn"), text.format("Gath")]}), folder / "f.parquet")
    Dataset.from_list([{"text": text.format("Holm")}]).save_to_disk(folder / "g")


def train(ranks: int, config: Path, *overrides: str) -> Finished:
    return start_ranks(ranks, ["train", str(config), *QUICK, *overrides])


@pytest.mark.exclusive  # after its run a sender has 10 s
def test_documents_of_every_kind(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    corpus, cache, run = tmp_path / "documents", tmp_path / "tokens", tmp_path / "run"
    write_corpus(corpus)
    (corpus / "broken.pdf").write_bytes(b"%PDF-1.4 and no more")
    (corpus / "unread.docx").write_bytes(b"PK")
    sources = [str(corpus), {"path": str(tmp_path / "corpus.txt"), "weight": 2}]
    config = tiny_config(data={"corpus": sources})
    finished = train(2, config, "data.broken=skip")
    assert finished.codes == [0, 0], finished.output
    assert finished.output.count("data: tokenising 8 files of data.corpus") == 1  # by one of two ranks
    assert f"{corpus} (corpus): 11 documents" in finished.output
    assert "left out: 1 empty, 1 broken" in finished.output
    assert f"warning: left out: {corpus}/broken.pdf is damaged" in finished.output
    assert f"warning: {corpus} holds files of endings that are not read: 1 of .docx" in finished.output
    assert f"nearly repeat an earlier one: 1, such as {corpus}/b.md, which repeats {corpus}/a.txt" in finished.output
    assert 'questions that stand in the corpus: 1 of 5, such as "Who built press 2?"' in finished.output
    found = json.loads((run / "data.json").read_text())
    first, second = found["sources"]
    assert (first["documents"], first["chats"], first["empty"], len(first["broken"])) == (11, 1, 1, 1)
    assert first["unread"] == {".docx": 1}
    assert (first["weight"], second["weight"], second["documents"]) == (1, 2, 1)
    assert found["sequences"] >= first["sequences"] + 2 * second["sequences"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (tracked,) = client.search_runs(["1"])
    assert tracked.data.metrics["data_documents"] == 12
    assert tracked.data.metrics["data_tokens"] == first["tokens"] + second["tokens"]
    for key in ("data_broken", "data_unread", "data_empty", "data_near_duplicates", "data_questions_in_corpus"):
        assert tracked.data.metrics[key] == 1, key

    # Tokenised again, on one rank: the same rows, so that the run is over; and then others.
    shutil.rmtree(cache)
    again = train(1, config, "data.broken=skip")
    assert again.codes == [0], again.output
    assert again.output.count("data: tokenising 8 files of data.corpus") == 1
    assert "is finished, with 2 steps" in again.output
    (corpus / "new.pdf").write_bytes(b"%PDF-1.4 and no more")  # which changes no token
    broken = train(1, config, "data.broken=skip")
    assert broken.codes == [0], broken.output
    assert f"warning: left out: {corpus}/new.pdf is damaged" in broken.output
    (corpus / "b.md").write_text("Another text.")
    refused = train(1, config, "data.broken=skip")
    assert_refused(refused, "step-000002 was trained with something else as data, to go by its tokens: set it back")


@pytest.mark.slow
def test_ranks_wait_for_the_tokens_longer_than_their_collectives_may_take(
    tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    arguments = ["0", "mica_ds.tokens._write", "sleep", "train", str(tiny_config()), *QUICK]
    finished = start_fresh_ranks(2, arguments, "tests.dist.faulty", DEEPSPEED_TIMEOUT="1")  # minutes
    assert finished.codes == [0, 0], finished.output
    assert "FAULT" in finished.output
    assert finished.seconds > 75
