"""MiCA on documents, merged; then LoRA on dialogues with the merged model: one config after the other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..conftest import ROOT, start_ranks, write_config, write_first_layers

pytestmark = pytest.mark.dist

CHATS = ROOT / "configs" / "demonstration" / "chat.jsonl"


def chats() -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in CHATS.read_text().splitlines()]


def answer_loss(model: Any, tokenizer: Any) -> float:
    """The mean loss over what the assistant says, by plain transformers."""
    losses = []
    for messages in chats():
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True)["input_ids"]
                ids = tokenizer.apply_chat_template(messages[: turn + 1])["input_ids"]
                labels = [-100] * len(asked) + ids[len(asked) :]
                with torch.no_grad():
                    losses.append(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item())
    return sum(losses) / len(losses)


def test_documents_then_dialogues(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "dialogues").mkdir()
    (tmp_path / "notes").mkdir()
    base = write_first_layers(smollm2, tmp_path / "base")
    short: dict[str, Any] = {"evaluate": {"questions": None, "retention": None}}
    train = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2}
    first = write_config(tmp_path / "documents", base, train=train, **short)
    merged = tmp_path / "documents" / "run" / "merged"
    finished = start_ranks(1, ["train", str(first)])
    assert finished.codes == [0], finished.output
    exported = start_ranks(1, ["export", str(first), "--format", "merged"])
    assert exported.codes == [0], exported.output
    assert f"export: {merged}" in exported.output
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    probe = load_file(first.parent / "run" / "probe.safetensors")
    with torch.no_grad():
        error = (model(input_ids=probe["input_ids"]).logits - probe["logits"]).abs().max()
    assert error < 1e-4 * probe["logits"].abs().max()

    shipped = yaml.safe_load((ROOT / "configs/demonstration-chat.yaml").read_text())
    sections = {
        "adapter": shipped["adapter"],
        "data": {**shipped["data"], "sequence_length": 128, "global_batch": 2},
        "train": {
            **shipped["train"],
            "max_steps": 4,
            "learning_rate": 2e-2,
            "warmup_steps": 0,
        },  # a cut model is far off
    }
    second = write_config(tmp_path / "dialogues", merged, **sections, **short)
    watch = json.dumps({"folder": str(tmp_path / "notes")})
    finished = start_ranks(1, ["train", str(second)], "tests.dist.watched", WATCH=watch)
    assert finished.codes == [0], finished.output
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert_answers_alone_were_learnt(tmp_path / "notes" / "0.jsonl", tokenizer)
    before = answer_loss(model, tokenizer)
    tuned = PeftModel.from_pretrained(model, second.parent / "run" / "adapter").eval()
    assert answer_loss(tuned, tokenizer) < 0.95 * before


def assert_answers_alone_were_learnt(notes: Path, tokenizer: Any) -> None:
    """In all rows that were trained on, what is predicted is what the assistant says, with the mark that ends it."""
    found = set[str]()
    for line in notes.read_text().splitlines():
        batch = json.loads(line)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            runs: list[list[int]] = [[]]
            for token, learnt in zip(ids, labels, strict=True):
                assert learnt in (token, -100)
                if learnt != -100:
                    runs[-1].append(token)
                elif runs[-1]:
                    runs.append([])
            found |= {tokenizer.decode(run) for run in runs if run}
    said = {
        f"{message['content']}<|im_end|>\n"
        for messages in chats()
        for message in messages
        if message["role"] == "assistant"
    }
    assert len(found & said) > 5
    for text in found - said:  # rows are cut at their length
        assert any(text in whole for whole in said)
