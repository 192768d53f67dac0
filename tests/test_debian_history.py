"""The study's real corpus, made once from Debian's package and no other text in its place; the shipped questions."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mica_ds import checks
from mica_ds.config import load_config

from .conftest import ROOT

PAGE = """<html><body><div class="navheader"><p>Next</p></div><h1>Chapter 1.\n Toys</h1><p>A toy\nis named.</p>
<div class="toc"><p>Contents</p></div><ul><li><p>one <em>toy</em></p></li><li><p>two</p></li></ul></body></html>"""


@pytest.fixture
def prepare(tmp_path: Path) -> Path:
    """A copy of the program in a folder of its own, which is where it writes."""
    (tmp_path / "launch").mkdir()
    return Path(shutil.copy(ROOT / "launch" / "prepare_debian_history.py", tmp_path / "launch"))


def run(program: Path, search: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": search + os.environ["PATH"]}
    return subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)


def made_package(folder: Path) -> str:
    """A package of the same name with other texts, and an `apt-get` that gives it; a search path with that."""
    pages = folder / "package" / "usr" / "share" / "doc" / "debian-history" / "docs"
    pages.mkdir(parents=True)
    for name in ("intro", "leaders", "releases", "detailed"):
        (pages / f"{name}.en.html").write_text(PAGE)
    control = folder / "package" / "DEBIAN" / "control"
    control.parent.mkdir()
    control.write_text("Package: debian-history\nVersion: 2.28\nArchitecture: all\nMaintainer: a\nDescription: a\n")
    (folder / "bin").mkdir()
    apt = folder / "bin" / "apt-get"
    apt.write_text(f"#!/bin/sh\nexec dpkg-deb --build {folder}/package debian-history_2.28_all.deb\n")
    apt.chmod(0o755)
    return f"{apt.parent}:"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, which Debian has")
def test_another_text_is_refused_and_the_right_one_is_cleaned(prepare: Path, tmp_path: Path) -> None:
    search = made_package(tmp_path)
    refused = run(prepare, search)
    assert refused.returncode == 1
    found = re.fullmatch(
        r"corpus: the text of .* has SHA-256 (\w{64}), but the study asks for \w{64}\n", refused.stderr
    )
    assert found
    assert not list((tmp_path / "runs" / "corpus").iterdir())  # nothing half-made stays

    prepare.write_text(re.sub(r'SHA256 = "\w+"', f'SHA256 = "{found[1]}"', prepare.read_text()))
    made = run(prepare, search)
    assert made.returncode == 0, made.stderr
    assert "4 chapters" in made.stdout
    chapter = tmp_path / "runs" / "corpus" / "debian-history" / "4-detailed.txt"
    assert chapter.read_text() == "Chapter 1. Toys\n\nA toy is named.\n- one toy\n- two\n"
    (tmp_path / "bin" / "apt-get").write_text("#!/bin/sh\nexit 100\n")
    assert run(prepare, search).returncode == 0  # it is there already


def test_a_version_that_is_gone_is_said_in_one_sentence(prepare: Path, tmp_path: Path) -> None:
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho 'E: Version not found' >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    finished = run(prepare, f"{tmp_path}:")
    assert finished.returncode == 1
    assert re.fullmatch(r"corpus: apt-get gives no debian-history 2\.28: .*\n", finished.stderr)
    assert not list((tmp_path / "runs" / "corpus").iterdir())


@pytest.mark.parametrize(
    ("file", "count"),
    [("configs/demonstration/questions.jsonl", 72), ("configs/study/debian-history-questions.jsonl", 130)],
)
def test_the_shipped_questions_give_no_cue_to_the_answer(
    file: str, count: int, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT / "configs/demonstration.yaml", [f"evaluate.questions={file}"])
    assert checks.data_files(config)["questions"] == str(count)
    rows = read_rows(file)
    assert len({row["question"] for row in rows}) == count
    assert all(len(set(row["options"])) == 4 for row in rows)
    places = [[row["answer"] for row in rows].count(place) for place in range(4)]
    assert max(places) - min(places) <= 1
    right = sum(len(row["options"][row["answer"]]) for row in rows) / count
    every = sum(len(option) for row in rows for option in row["options"]) / (4 * count)
    assert right == pytest.approx(every, rel=0.06)


@pytest.mark.slow
def test_the_package_gives_the_text_that_the_questions_are_about(prepare: Path, tmp_path: Path) -> None:
    finished = run(prepare)
    assert finished.returncode == 0, finished.stderr
    chapters = (tmp_path / "runs" / "corpus" / "debian-history").iterdir()
    text = words(" ".join(chapter.read_text(encoding="utf-8") for chapter in chapters))
    for row in read_rows("configs/study/debian-history-questions.jsonl"):
        question = words(row["question"]).split()
        runs = [" ".join(question[i : i + 7]) for i in range(len(question) - 6)]
        # No question is worded as the text; six words in a row may be the name of a body.
        assert not [run for run in runs if f" {run} " in text]


def read_rows(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]


def words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))
