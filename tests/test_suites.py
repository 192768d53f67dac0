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

from .suites import write_hellaswag, write_mmlu, write_truthfulqa

lm_eval = pytest.importorskip("lm_eval", reason="launch/setup.sh installs lm-eval")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What datasets converts stays here: it knows a repository by its README.md, whatever its files hold."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


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

    (task,) = suites["hellaswag"]["tasks"].values()
    task.set_config("num_fewshot", 2)  # as many a suite has it: examples drawn at random, the same for both
    asked = []
    for name in ("base", "checkpoint"):
        score_suites(suites, Runner(tokenizer, 1000), model, tmp_path, name)
        asked.append([json.loads(row)["arguments"] for row in (tmp_path / f"evaluation/{name}-hellaswag.jsonl").open()])
    assert asked[0] == asked[1]
    assert len({arguments[0][0].split("Edda")[1] for arguments in asked[0]}) > 1


@pytest.mark.parametrize(
    "sizes",
    [
        {"truthfulqa_mc1": 3, "truthfulqa_mc2": 3, "mmlu_global_facts": 4},
        pytest.param({"mmlu_other": sum(range(1, 14))}, marks=pytest.mark.slow),  # subjects of different sizes
    ],
)
def test_truthfulqa_and_mmlu_are_marked_as_lm_eval_itself_does(
    sizes: dict[str, int], alone: None, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """On made data in their formats, one of them with marks between 0 and 1."""
    from lm_eval.models.huggingface import HFLM

    write_truthfulqa(tmp_path / "data")
    write_mmlu(tmp_path / "data")
    folder = tiny_model("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    suites = load_suites(EvaluateSettings(suites=list(sizes), suites_data=tmp_path / "data"))
    marks = score_suites(suites, Runner(tokenizer, 1000), model, tmp_path, "base")
    found = compare_suites(marks, marks)
    for name, size in sizes.items():
        assert found[name]["acc"]["questions"] == size
        assert ("interval_after" in found[name]["acc"]) == (name != "truthfulqa_mc2")
        plain = lm_eval.evaluator.evaluate(HFLM(pretrained=model, tokenizer=tokenizer), suites[name], bootstrap_iters=0)
        assert found[name]["acc"]["after"] == pytest.approx(plain["results"][name]["acc,none"], rel=1e-4)


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
