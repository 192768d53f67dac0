"""Scores against a plain forward of each sequence alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mica_ds.config import EvaluateSettings
from mica_ds.data import read_jsonl
from mica_ds.evaluate import Sequence, _batch_losses, _batches, read_questions

from .conftest import ROOT


def test_padded_batches_score_as_each_sequence_alone(tiny_model: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    sequences = [Sequence([3, 4, 5, 6, 7], [-100, -100, -100, 6, 7]), Sequence([8, 9, 10], [-100, 9, 10])]
    found = _batch_losses(model, sequences, padding=0)
    for sequence, loss in zip(sequences, found, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        wanted = -sum(scores[i - 1, label].item() for i, label in enumerate(sequence.labels) if label != -100)
        assert loss == pytest.approx(wanted, rel=1e-5)


def test_batches_keep_within_the_tokens_and_lose_nothing() -> None:
    lengths = [9, 3, 3, 8, 40, 1, 2]
    batches = _batches(lengths, tokens=16)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 16


@pytest.mark.parametrize(
    ("file", "count"),
    [("configs/demonstration/questions.jsonl", 72), ("configs/study/debian-history-questions.jsonl", 130)],
)
def test_the_shipped_questions_give_no_cue_to_the_answer(file: str, count: int, smollm2: Path) -> None:
    settings = EvaluateSettings(questions=ROOT / file)
    assert len(read_questions(settings, AutoTokenizer.from_pretrained(smollm2))) == count
    rows = [row for _, row in read_jsonl(ROOT / file, "evaluate.questions")]
    assert len({row["question"] for row in rows}) == count
    assert all(len(set(row["options"])) == 4 for row in rows)
    places = [[row["answer"] for row in rows].count(place) for place in range(4)]
    assert max(places) - min(places) <= 1
    right = sum(len(row["options"][row["answer"]]) for row in rows) / count
    every = sum(len(option) for row in rows for option in row["options"]) / (4 * count)
    assert right == pytest.approx(every, rel=0.06)
