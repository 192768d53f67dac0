"""The plan against the memory of real runs, and what `train` does where its plan says that the run does not fit."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from mica_ds.config import load_config
from mica_ds.costs import count_costs
from mica_ds.footprint import count_footprint, micro_batch
from mica_ds.plan import GIB, PROCESS, make_plan
from mica_ds.zero import Cluster

from ..conftest import ROOT, start_fresh_ranks, write_config

pytestmark = pytest.mark.dist

PROGRAM = "tests.dist.measured"
CASES = [(ranks, offload, length) for ranks in (1, 2) for offload in ("", "-offload-cpu") for length in (128, 512)]
QUICK = [(2, "-offload-cpu", 128)]
# glibc (2.36) does not reuse a hole for an aligned block of the same size: its heap, where blocks below 32 MiB end up,
# grew by 70 % more than torch ever had live in it, and by another amount each time. Blocks that are mapped one by one
# add nothing; a GPU's allocator has no such heap.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}


@pytest.mark.parametrize(
    ("ranks", "offload", "length"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_memory_grows_as_planned(ranks: int, offload: str, length: int, smollm2: Path, tmp_path: Path) -> None:
    file = write_config(
        tmp_path,
        smollm2,
        adapter={"r": 16},
        data={"sequence_length": length, "global_batch": ranks},
        evaluate={"questions": None, "retention": None},
        # From the third micro-batch on DeepSpeed knows the order of the modules, and gathers ahead.
        train={"per_device_train_batch_size": 1, "max_steps": 3, "save_steps": 1000},
        deepspeed=str(ROOT / f"configs/deepspeed/zero3{offload}.json"),
    )
    config = load_config(file)
    plan = make_plan(config, Cluster(1, ranks, 0, 64 * GIB))
    costs = count_costs(config, plan)
    arguments, variables = ["train", str(file), "capacity=warn"], {"MEASURED": str(tmp_path), **ALLOCATOR}
    if ranks == 1:  # with no room at all, which is warned of
        variables["FREE_MIB"] = "0"
    found = start_fresh_ranks(ranks, arguments, PROGRAM, **variables)
    assert found.codes == [0] * ranks, found.output
    verdict = "warning: plan: it does not fit: " if ranks == 1 else "plan: fits: "
    assert found.outputs[0].count(verdict) == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    notes = [[json.loads(line) for line in (tmp_path / f"{rank}.jsonl").open()] for rank in range(ranks)]
    growth = max(peak - found[0]["before"] for peak, found in zip(summary["peak_rss_bytes"], notes, strict=True))
    loading = max(summary["loading_rss_bytes"])
    planned = plan.need("host", plan.worst("host")) - PROCESS
    print(f"{ranks} {offload or 'none'} {length}: loading {loading / (plan.need('host', 'loading') - PROCESS):.3f}")
    print(f"{ranks} {offload or 'none'} {length}: all {growth / planned:.3f} of {planned >> 20} MiB")
    assert loading == pytest.approx(plan.need("host", "loading") - PROCESS, rel=0.1)
    assert growth == pytest.approx(planned, rel=0.1)
    if ranks > 1:
        received = [found[1]["gathered"] * (ranks - 1) / ranks for found in notes]
        assert received == pytest.approx([costs.gathered] * ranks, rel=0.01)


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """The config of one step whose activations are most of its memory: 8 layers, 8 sequences of 256 tokens."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
    settings = transformers.LlamaConfig(vocab_size=49152, num_hidden_layers=8, tie_word_embeddings=True, **shape)
    transformers.LlamaForCausalLM(settings).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(ROOT / "models/smollm2-135m").save_pretrained(tmp_path / "model")
    return write_config(
        tmp_path,
        tmp_path / "model",
        data={"sequence_length": 256, "global_batch": 8},
        evaluate={"questions": None, "retention": None},
        train={"per_device_train_batch_size": 8, "max_steps": 1},
        deepspeed=str(ROOT / "configs/deepspeed/zero3.json"),
    )


@pytest.mark.slow
def test_what_is_recomputed_is_not_kept(deep: Path, tmp_path: Path) -> None:
    peaks, needs = [], []
    for recomputed in ("false", "true"):
        overrides = [f"train.activation_checkpointing={recomputed}", f"output_dir={tmp_path}/{recomputed}"]
        found = start_fresh_ranks(1, ["train", str(deep), *overrides], "mica_ds", **ALLOCATOR)
        assert found.codes == [0], found.output
        peaks += json.loads((tmp_path / recomputed / "summary.json").read_text())["peak_rss_bytes"]
        config = load_config(deep, overrides)
        counted = count_footprint(config.model, config.adapter, micro_batch(config))
        needs.append(counted.activations + max(counted.logits, counted.layer))
    print(f"kept {peaks[0] >> 20} MiB, recomputed {peaks[1] >> 20} MiB; as planned {(needs[0] - needs[1]) >> 20}")
    assert needs[0] > 2 * needs[1]
    assert peaks[0] - peaks[1] == pytest.approx(needs[0] - needs[1], rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_offloaded_is_not_kept_on_the_gpu(deep: Path, tmp_path: Path) -> None:
    peaks = []
    for offloaded in ("false", "true"):
        overrides = ["train.activation_checkpointing=true", f"model.offload_activations={offloaded}"]
        found = start_fresh_ranks(1, ["train", str(deep), *overrides, f"output_dir={tmp_path}/{offloaded}"], "mica_ds")
        assert found.codes == [0], found.output
        journal = map(json.loads, (tmp_path / offloaded / "journal.jsonl").open())
        values = [entry["values"] for entry in journal if entry["kind"] == "metrics"]
        peaks.append(max(found["device_peak_bytes"] for found in values if "device_peak_bytes" in found))
    layers = 7 * 8 * 256 * 256 * 4  # the inputs of all but the one at work, fp32
    assert peaks[0] - peaks[1] > 0.8 * layers


def test_what_cannot_fit_is_refused_with_what_fits(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    rows = 64
    config = tiny_config(
        data={"global_batch": 2 * rows},
        train={"per_device_train_batch_size": rows},
        evaluate={"questions": None, "retention": None},
    )
    found = start_fresh_ranks(2, ["train", str(config)], PROGRAM, MEASURED=str(tmp_path), FREE_MIB="560")
    assert found.codes == [2, 2], found.output
    (error,) = [line for line in found.output.splitlines() if line.startswith("error: ")]
    assert "it does not fit" in error
    assert "GiB of host memory a rank (loss)" in error
    fitting = re.search(r"the nearest that fits: train.per_device_train_batch_size=(\d+); capacity=warn", error)
    assert fitting, error
    assert 1 < int(fitting[1]) < rows
    assert not (tmp_path / "run" / "config.yaml").exists()
