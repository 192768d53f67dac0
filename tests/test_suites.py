"""Standard suites by the real lm-eval, against its own wrapper of transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mica_ds.config import EvaluateSettings
from mica_ds.errors import UserError
from mica_ds.inference import Runner
from mica_ds.suites import compare_suites, load_suites, score_suites

from .suites import write_hellaswag

lm_eval = pytest.importorskip("lm_eval", reason="install mica_ds[suites]")


def test_a_suite_is_marked_as_lm_eval_itself_does(
    alone: None, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    folder = tiny_model("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = EvaluateSettings(suites=["hellaswag"], suites_data=write_hellaswag(tmp_path / "data"))
    suites = load_suites(settings)
    marks = score_suites(suites, Runner(tokenizer, 100), model, tmp_path, "base")
    plain = lm_eval.evaluator.evaluate(HFLM(pretrained=model, tokenizer=tokenizer), suites["hellaswag"])
    samples = plain["samples"]["hellaswag"]
    assert marks["hellaswag"] == {mark: [sample[mark] for sample in samples] for mark in ("acc", "acc_norm")}
    found = compare_suites({}, marks)["hellaswag"]["acc_norm"]
    assert found["after"] == pytest.approx(plain["results"]["hellaswag"]["acc_norm,none"])
    assert found["questions"] == 7
    assert found["interval_after"][0] < found["after"] < found["interval_after"][1]
    rows = [json.loads(line) for line in (tmp_path / "evaluation/base-hellaswag.jsonl").open()]
    for row, sample in zip(rows, samples, strict=True):
        ours, theirs = (torch.tensor([found[0] for found in a["filtered_resps"]]) for a in (row, sample))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert compare_suites(marks, marks)["hellaswag"]["acc"]["change"][0] == 0


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        pytest.param(
            "truthfulqa_mc1", "the data of truthfulqa_mc1 is not below .* or in the hub's cache", marks=pytest.mark.slow
        ),
        ("helaswag", "lm-eval knows no helaswag"),
    ],
)
def test_what_is_not_here_is_one_sentence(alone: None, suite: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_suites(EvaluateSettings(suites=[suite], suites_data=tmp_path))
