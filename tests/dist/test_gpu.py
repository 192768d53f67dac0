"""Training on one GPU: it gives what the CPU gives, with and without offload, and goes on with what that has saved."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

from mica_ds.fingerprint import mixed_sum

from ..conftest import ROOT, start_fresh_ranks, write_nvme_settings
from .test_resume import STEPS, Run, write

pytestmark = [
    pytest.mark.dist,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PLAIN = ROOT / "configs/deepspeed/zero3.json"


@pytest.fixture(scope="module")
def config(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("config"), tiny_model("llama"))


@pytest.fixture(scope="module")
def on_the_cpu(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run on two ranks without a GPU."""
    run = Run(config, tmp_path_factory.mktemp("cpu") / "run")
    train(run, 2, f"deepspeed={PLAIN}", DS_ACCELERATOR="cpu")
    return run


def train(run: Run, ranks: int, *overrides: str, **variables: str) -> None:
    arguments = ["train", str(run.config), f"output_dir={run.folder}", *overrides]
    finished = start_fresh_ranks(ranks, arguments, "mica_ds", **variables)
    assert finished.codes == [0] * ranks, finished.output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_the_same_as_on_the_cpu(offload: str, dtype: str, config: Path, on_the_cpu: Run, tmp_path: Path) -> None:
    deepspeed = PLAIN if offload == "none" else PLAIN.with_name("zero3-offload-cpu.json")
    if offload == "nvme":
        if CUDA_HOME is None:
            pytest.skip("install CUDA's toolkit: DeepSpeed compiles its NVMe offload against it")
        deepspeed = write_nvme_settings(tmp_path, 4_000_000)
    run = Run(config, tmp_path / "run")
    # A cache of its own: the base model's scores would come from there.
    train(run, 1, f"deepspeed={deepspeed}", f"model.dtype={dtype}", f"data.cache={tmp_path}/tokens")
    accuracy = 1e-4 if dtype == "float32" else 1e-2
    assert run.losses() == pytest.approx(on_the_cpu.losses(), rel=accuracy)
    before, after = on_the_cpu.summary(), run.summary()
    for key in ("retention_before", "retention_after"):
        assert math.log(after[key]) == pytest.approx(math.log(before[key]), rel=accuracy)
    journal = map(json.loads, (run.folder / "journal.jsonl").open())
    metrics = [entry["values"] for entry in journal if entry["kind"] == "metrics"]
    found = {key: value for values in metrics for key, value in values.items()}
    assert found["device_peak_bytes"] > 0
    assert any(key.endswith("/gpu_0_memory_usage_megabytes") for key in found)


def test_it_goes_on_with_what_the_cpu_has_saved(config: Path, on_the_cpu: Run, tmp_path: Path) -> None:
    run = Run(config, tmp_path / "run").take(on_the_cpu, 8)
    train(run, 1)
    assert run.checkpoints() == [f"step-{step:06d}" for step in range(8, STEPS + 1)]
    assert run.losses() == pytest.approx(on_the_cpu.losses(), rel=1e-4)
    again = Run(config, tmp_path / "again").take(run, 15)
    train(again, 2, f"deepspeed={PLAIN}", DS_ACCELERATOR="cpu")
    assert again.losses() == pytest.approx(on_the_cpu.losses(), rel=1e-4)


def test_ligers_kernels(config: Path, on_the_cpu: Run, tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel", reason="install liger-kernel==0.8.5")
    run = Run(config, tmp_path / "run")
    train(run, 1, "train.use_liger_kernel=true")
    assert run.losses() == pytest.approx(on_the_cpu.losses(), rel=1e-4)


@pytest.mark.parametrize("start", [0, 7])
def test_a_fingerprint_is_the_same_wherever_the_weight_lies(start: int) -> None:
    values = torch.randn(300 * (1 << 16) + 3).bfloat16()
    assert int(mixed_sum(values.cuda(), start)) == int(mixed_sum(values, start))


def test_a_rank_without_a_gpu_of_its_own_is_told(config: Path, tmp_path: Path) -> None:
    ranks = torch.cuda.device_count() + 1
    arguments = ["train", str(config), f"output_dir={tmp_path}/run"]
    finished = start_fresh_ranks(ranks, arguments, "mica_ds", LOCAL_WORLD_SIZE=str(ranks))
    assert finished.codes == [2] * ranks, finished.output
    assert f"sees {ranks - 1} of its GPUs: start one rank a GPU" in finished.output
