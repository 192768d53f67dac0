"""Lint, types, and the floors of the house."""

import subprocess

import pytest

from .conftest import ROOT, environment

CHECKS = ["ruff check .", "ruff format --check .", "mypy mica_ds", "lint-imports"]


@pytest.mark.parametrize("command", CHECKS)
def test_check(command: str) -> None:
    finished = subprocess.run(command.split(), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
