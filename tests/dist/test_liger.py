"""Liger's fused loss in training's place for it, under ZeRO-3: on the CPU by Triton's interpreter."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mica_ds.checkpoint import read_history

from ..conftest import ROOT, Finished, start_fresh_ranks
from .fused import CALLED

LIGER = ROOT / ".venv/liger"
MISSING = "install --no-deps --target .venv/liger liger-kernel==0.8.5 triton==3.9.0"
pytestmark = [pytest.mark.dist, pytest.mark.skipif(not LIGER.is_dir(), reason=f".venv/bin/python -m pip {MISSING}")]

# The interpreter (triton 3.9) runs the loss alone, without a cap.
LOSS = "train.liger_kernel_config={fused_linear_cross_entropy: true, rope: false, rms_norm: false, swiglu: false}"


def train(config: Path, folder: Path, *overrides: str, **variables: str) -> Finished:
    arguments = [f"output_dir={folder}", "evaluate.questions=null", "evaluate.retention=null", *overrides]
    return start_fresh_ranks(
        2, ["train", str(config), *arguments], "tests.dist.fused", PYTHONPATH=f"{LIGER}:{ROOT}", **variables
    )


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_history(folder / "checkpoints/step-000002") if "loss" in entry]


@pytest.mark.parametrize(
    ("overrides", "micro_batches"),
    [
        ([], 1),
        pytest.param(["adapter.method=full"], 1, marks=pytest.mark.slow),
        pytest.param(["data.sequence_parallel=2", "data.pack=false"], 2, marks=pytest.mark.slow),
    ],
)
def test_it_gives_the_losses_of_the_tiled_one(
    overrides: list[str], micro_batches: int, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config(train={"max_steps": 2})
    liger = ["train.use_liger_kernel=true", LOSS, *overrides]
    finished = train(config, tmp_path / "liger", *liger, TRITON_INTERPRET="1")
    assert finished.codes == [0, 0], finished.output
    assert finished.output.count(CALLED) == 2 * 2 * micro_batches  # ranks and steps
    finished = train(config, tmp_path / "tiled", *overrides)
    assert finished.codes == [0, 0], finished.output
    assert CALLED not in finished.output
    assert len(losses(tmp_path / "tiled")) == 2
    assert losses(tmp_path / "liger") == pytest.approx(losses(tmp_path / "tiled"), rel=1e-5)


@pytest.mark.parametrize(
    ("architecture", "override", "message"),
    [
        ("gpt2", "adapter.r=4", "Liger has no fused loss for gpt2 models"),
        ("llama", "train.liger_kernel_config={fused_linear_cross_entropy: false}", "the logits would be whole"),
        ("llama", "adapter.targets=[q_proj, lm_head]", "Liger leaves out the output head's adapter"),
    ],
)
def test_what_it_would_not_compute_is_refused(
    architecture: str, override: str, message: str, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    arguments = ["train.use_liger_kernel=true", override]
    finished = train(tiny_config(architecture), tmp_path / "run", *arguments, TRITON_INTERPRET="1")
    assert finished.codes == [2, 2]
    assert message in finished.output
