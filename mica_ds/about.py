"""What a run was made by: versions, commit, job and machines."""

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

_SHOWN = ("mica_ds", "torch", "deepspeed", "transformers", "peft", "numpy", "accelerate", "datasets", "mlflow")
_JOB = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID")


def environment() -> str:
    """All installed distributions, a line each, as `pip freeze` writes them. Local."""
    found = {f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def about() -> dict[str, str]:
    """What may differ between the starts of one run: versions, commit, job. Local."""
    facts = {"version.python": platform.python_version()}
    facts |= {f"version.{name}": importlib.metadata.version(name) for name in _SHOWN}
    facts |= {key.lower().replace("_", ".", 1): os.environ[key] for key in _JOB if key in os.environ}
    return facts | _commit()


def _commit() -> dict[str, str]:
    """The commit that this package is of, and whether files differ from it; nothing without git."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    with suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", Path(__file__).name)  # a virtual environment may lie in another repository
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    return {}
