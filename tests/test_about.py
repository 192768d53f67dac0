"""What a run was made by: the commit, and whether files differ from it."""

import subprocess
from pathlib import Path

import pytest

from mica_ds import about


def test_the_commit_is_known_and_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(about, "__file__", str(tmp_path / "about.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert not any(key.startswith("git.") for key in about.about())  # no repository

    def git(*command: str) -> str:
        author = ["-c", "user.name=Edda", "-c", "user.email=edda@torvane"]
        return subprocess.run(
            ["git", *author, *command], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "--quiet")
    (tmp_path / "about.py").touch()
    git("add", "about.py")
    git("commit", "--quiet", "--message", "one")
    commit = git("rev-parse", "HEAD").strip()
    found = about.about()
    assert (found["git.commit"], found["git.dirty"]) == (commit, "false")
    (tmp_path / "about.py").write_text("changed")
    found = about.about()
    assert (found["git.commit"], found["git.dirty"]) == (commit, "true")


def test_the_job_is_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    found = about.about()
    assert (found["slurm.job_id"], found["slurm.job_nodelist"]) == ("7", "n[1-2]")
