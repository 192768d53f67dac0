"""The whole chain on each kind of decoder and with each method: two ranks, export, reload by plain peft."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from launch.reload_adapter import main as reload_adapter
from mica_ds.checkpoint import read_history

from ..conftest import ROOT, TINY, start_ranks
from ..test_data import packed
from .test_basis import assert_bases_match

pytestmark = pytest.mark.dist

METHODS = [
    pytest.param("adapter.subspace=principal", marks=pytest.mark.slow),
    "adapter.subspace=random",
    "adapter.method=lora",
]
# Gemma 2 has all that Gemma has.
ARCHITECTURES = [pytest.param(name, marks=[pytest.mark.slow] if name == "gemma" else []) for name in TINY]


def assert_chain(config: Path, run: Path, *overrides: str) -> None:
    """Train on two ranks; then plain peft reloads the export and finds training's logits."""
    finished = start_ranks(2, ["train", str(config), *overrides])
    assert finished.codes == [0, 0], finished.output
    assert "unknown inputs or outputs" not in finished.output  # DeepSpeed's warning of what the head gives
    assert reload_adapter(run) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert len(summary["peak_rss_bytes"]) == 2
    assert summary["retention_after"] < summary["retention_before"]  # it is scored on the corpus itself here


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture(
    architecture: str, tiny_config: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert_chain(tiny_config(architecture), run)
    weights = load_file(tiny_model(architecture) / "model.safetensors")
    is_gpt2 = architecture == "gpt2"
    assert_bases_match(run, weights, transposed=is_gpt2)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, tensor in adapter.items():
        assert tensor.dtype == torch.float32
        if name.endswith("lora_B.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            assert torch.equal(tensor, load_file(run / "basis" / f"{module}.safetensors")[module])
            assert adapter[name.replace("lora_B", "lora_A")].abs().max() > 0


@pytest.mark.parametrize(("architecture", "targets"), {"mamba": "[in_proj]", "gemma4_text": "all-linear"}.items())
def test_rare_architecture_in_bfloat16(
    architecture: str, targets: str, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config(architecture)
    assert_chain(config, tmp_path / "run", "model.dtype=bfloat16", "data.pack=false", f"adapter.targets={targets}")


@pytest.mark.parametrize("override", METHODS)
def test_method(override: str, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    assert_chain(tiny_config(), tmp_path / "run", override)


def test_full_fine_tuning_keeps_what_is_not_trained(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config = tiny_config("apertus")
    assert_chain(config, tmp_path / "run", "adapter.method=full")
    finished = start_ranks(1, ["evaluate", str(config), "adapter.method=full"])
    assert finished.codes == [0], finished.output
    evaluated, summary = (json.loads((tmp_path / "run" / f"{n}.json").read_text()) for n in ("evaluation", "summary"))
    assert evaluated["retention"] == pytest.approx(summary["retention_after"], rel=1e-4)


def test_bfloat16_with_checkpoints_and_gradient_checkpointing(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    options = ["train.gradient_checkpointing=true", "train.save_strategy=steps", "train.save_steps=2"]
    assert_chain(tiny_config(), tmp_path / "run", "model.dtype=bfloat16", *options)
    checkpoints = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-000002", "step-000004"]


def test_the_other_verbs_after_training(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config, run = tiny_config(), tmp_path / "run"
    assert start_ranks(1, ["train", str(config)]).codes == [0]
    summary = json.loads((run / "summary.json").read_text())
    exported = load_file(run / "adapter" / "adapter_model.safetensors")
    finished = start_ranks(3, ["evaluate", str(config)])
    assert finished.codes == [0, 0, 0], finished.output
    evaluated = json.loads((run / "evaluation.json").read_text())
    assert evaluated["checkpoint"] == "step-000004"
    assert evaluated["knowledge"] == summary["knowledge_after"]
    assert evaluated["retention"] == pytest.approx(summary["retention_after"], rel=1e-4)
    refused = start_ranks(1, ["export", str(config), "adapter.r=2"])
    assert refused.codes == [2]
    assert "was trained with adapter.r=4, but now it is 2" in refused.output
    for file in (run / "adapter").iterdir():
        file.unlink()
    assert start_ranks(1, ["export", str(config)]).codes == [0]
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(exported[name], again[name]) for name in exported)
    afresh = ["train.max_steps=2", "resume=never"]  # a shorter run in the same folder
    assert start_ranks(1, ["train", str(config), *afresh]).codes == [0]
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("name", [pytest.param("zero3", marks=pytest.mark.slow), "zero3-multinode"])
def test_the_other_deepspeed_jsons(name: str, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    settings = json.loads((ROOT / "configs" / "deepspeed" / f"{name}.json").read_text())
    if "zero_hpz_partition_size" in settings["zero_optimization"]:
        settings["zero_optimization"]["zero_hpz_partition_size"] = 2  # the ranks here are fewer than a node's GPUs
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    assert_chain(tiny_config(), tmp_path / "run", f"deepspeed={tmp_path}/deepspeed.json")


def test_the_first_loss_is_plain_pytorchs(
    tiny_config: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """One step over rows with several documents: the mean over all predicted tokens, documents apart."""
    documents = [f"Press {i} stands in hall {i} of the plant.\n" for i in range(9)]
    config = tiny_config()
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    corpus = f"data.corpus=[{tmp_path}/corpus.jsonl]"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    rows = packed([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in documents], 32, 2)
    assert len(rows) == 4  # the global batch
    finished = start_ranks(2, ["train", str(config), corpus, "train.max_steps=1"])
    assert finished.codes == [0, 0], finished.output
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    with torch.no_grad():
        # With a cache transformers ignores the position ids' restarts (5.23).
        inputs = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        loss = model(**inputs, use_cache=False).loss.item()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["final_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])  # the head's weight is the embedding's, and is its own
def test_all_weights_train_as_in_plain_pytorch(
    architecture: str, tiny_config: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each step over the same rows, in two micro-batches a rank, whose logits take two tiles each."""
    config, length = tiny_config(architecture, evaluate={"questions": None, "retention": None}), 256
    text = "".join(f"The Quillmar press {i} was built in Torvane in {1900 + i * 7 % 90}. " for i in range(46))
    (tmp_path / "corpus.txt").write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(architecture))
    rows = packed([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]], length, 2)
    assert len(rows) == 4  # the global batch
    options = [f"data.sequence_length={length}", "adapter.method=full", "train.max_steps=3"]
    options += ["train.per_device_train_batch_size=1", "train.learning_rate=1e-3"]
    finished = start_ranks(2, ["train", str(config), *options])
    assert finished.codes == [0, 0], finished.output
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=3)
    expected = []
    for _ in range(3):
        loss = model(**{key: torch.tensor([row[key] for row in rows]) for key in rows[0]}, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.zero_grad()
        expected += [loss.item(), norm.item()]
    logged = [entry for entry in read_history(tmp_path / "run" / "checkpoints" / "step-000003") if "loss" in entry]
    found = [entry[key] for entry in logged for key in ("loss", "grad_norm")]
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_head_can_carry_an_adapter(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    targets = "adapter.targets=[q_proj, down_proj, lm_head]"
    assert_chain(tiny_config("qwen3"), tmp_path / "run", targets, "data.sequence_length=256")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert adapter["base_model.model.lm_head.lora_A.weight"].abs().max() > 0


def test_embeddings_can_carry_an_adapter(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    assert_chain(tiny_config(), tmp_path / "run", "adapter.targets=[embed_tokens, q_proj, down_proj]")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition("lora_")[2] for name in adapter} == {
        "A.weight",
        "B.weight",
        "embedding_A",
        "embedding_B",
    }
