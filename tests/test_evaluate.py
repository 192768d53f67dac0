"""Scores against plain forwards of each sequence alone; open questions; marks and their comparison."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mica_ds.config import EvaluateSettings
from mica_ds.errors import UserError
from mica_ds.evaluate import Evaluator
from mica_ds.inference import Runner, Sequence, batch_likelihoods, batches
from mica_ds.questions import Choice, Open, read_questions
from mica_ds.scores import Scores, compare, course, is_scored, perplexity, remove_rows, write_rows


def test_a_model_that_has_diverged_knows_nothing() -> None:
    question = Choice("?", ["a", "b"], 0)
    for losses in ([math.nan, math.nan], [math.nan, 1.0], [1.0, math.nan], [math.inf, math.inf]):
        row = question.mark(losses)
        assert (row["chosen"], row["right"], row["right_normalised"]) == (None, False, False)
    assert question.mark([1.0, math.inf])["right"]


def test_padded_batches_score_as_each_sequence_alone(tiny_model: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    with torch.no_grad():
        likeliest = model(torch.tensor([[3, 4, 5]])).logits[0, -1].argmax().item()
    sequences = [
        Sequence([3, 4, 5, 6, 7], [-100, -100, -100, 6, 7]),
        Sequence([8, 9, 10], [-100, 9, 10]),
        Sequence([3, 4, 5, likeliest], [-100, -100, -100, likeliest]),
    ]
    found = batch_likelihoods(model, sequences, padding=0)
    for sequence, likelihood in zip(sequences, found, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        wanted = -sum(scores[i - 1, label].item() for i, label in enumerate(sequence.labels) if label != -100)
        assert likelihood.loss == pytest.approx(wanted, rel=1e-5)
    assert [likelihood.is_greedy for likelihood in found] == [False, False, True]


def test_the_base_under_an_adapter_is_scored_as_without_it(
    alone: None, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """And what trains is what trained: of MiCA A alone."""
    (tmp_path / "text.txt").write_text("The Quillmar press was built in Torvane.")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    evaluator = Evaluator(EvaluateSettings(retention=tmp_path / "text.txt"), tokenizer, 32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    expected = evaluator.score(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="mica"))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.ones_(parameter)
    assert evaluator.score(model) != expected
    engine: Any = DistributedDataParallel(model)
    assert evaluator.score_base(engine, "weights", tmp_path) == expected
    assert all(parameter.requires_grad == ("lora_A" in name) for name, parameter in model.named_parameters())


def test_batches_keep_within_the_tokens_and_lose_nothing() -> None:
    lengths = [9, 3, 3, 8, 40, 1, 2]
    found = batches(lengths, tokens=16)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 16


def test_answers_in_padded_batches_are_those_of_a_plain_loop(alone: None, smollm2: Path) -> None:
    """The real model, and a loop without a cache; answers end with the line."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [
        "Question: What is 2+2?\nAnswer:",
        "The capital of France is",
        "One, two, three, four, five, six, seven, eight,",
    ]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    wanted = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        wanted.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).partition("\n")[0].strip())
    model.generation_config.update(repetition_penalty=5.0, num_beams=2, no_repeat_ngram_size=1)  # as its maker may
    assert Runner(tokenizer, batch_tokens=1000).continuations(model, prompts, new_tokens=6) == wanted
    assert "nine" in wanted[2]


def test_an_evaluation_is_what_its_rows_say(alone: None, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Both kinds of questions mixed, in the order of the file, and both perplexities, against forwards one by one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    questions = [
        {"question": "Who built it?", "options": ["Edda Brunholt", "Olaf"], "answer": 0},
        {"question": "Where?", "answer": ["Torvane", "in Torvane"]},
        {"question": "When?", "options": ["in 1907", "in 1911", "never"], "answer": 2, "source": "notes.md"},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "domain.txt").write_text("The press stands in Torvane.")
    (tmp_path / "general.txt").write_text("A volcano is a mountain that may erupt, as geologists say. " * 3)
    settings = EvaluateSettings(
        questions=tmp_path / "questions.jsonl",
        domain=tmp_path / "domain.txt",
        retention=tmp_path / "general.txt",
        batch_tokens=40,
    )
    scores = Evaluator(settings, tokenizer, sequence_length=16).score(model.train())
    assert model.training

    def loss(before: str, after: str) -> tuple[float, int]:
        prompt = tokenizer(before)["input_ids"]
        ids = prompt + tokenizer(after, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
        return -sum(logits[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))), len(ids)

    for row, question in zip(scores.rows, questions, strict=True):
        assert row["question"] == question["question"]
        if "options" not in question:
            assert {"given", "exact_match", "f1"} <= row.keys()
            continue
        losses = [loss(f"Question: {question['question']}\nAnswer:", f" {option}")[0] for option in question["options"]]
        assert row["losses"] == pytest.approx(losses, rel=1e-4)
        assert row["chosen"] == losses.index(min(losses))
        assert row["right"] == (row["chosen"] == question["answer"])
        lengths = [found / len(option) for found, option in zip(losses, question["options"], strict=True)]
        assert row["right_normalised"] == (lengths.index(min(lengths)) == question["answer"])
    found = scores.found()
    assert found["knowledge"] == sum(row["right"] for row in scores.rows if "right" in row) / 2
    first = tokenizer("The press stands in Torvane.")["input_ids"]
    with torch.no_grad():
        plain = model(torch.tensor([first]), labels=torch.tensor([first])).loss.item()
    assert found["domain"] == pytest.approx(perplexity(plain, 1), rel=1e-4)
    assert found["retention"] > 1


@pytest.mark.parametrize(
    ("given", "accepted", "exact", "f1"),
    [
        ("The  Edda Brunholt.", ["edda brunholt"], True, 1.0),
        ("by Edda", ["Edda Brunholt"], False, 0.5),
        ("in Torvane, of course", ["Kestowick", "Torvane"], False, 0.4),
        ("Olaf", ["Edda"], False, 0.0),
        ("", ["Edda"], False, 0.0),
    ],
)
def test_open_questions_are_marked_as_squad_does(given: str, accepted: list[str], exact: bool, f1: float) -> None:
    row = Open("Who?", accepted).mark(given)
    assert (row["exact_match"], row["f1"]) == (exact, pytest.approx(f1))


def test_malformed_questions_are_refused_by_line(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    for row, message in (
        ({"question": "Who?"}, 'without "options", "answer" must be a text'),
        ({"question": "Who?", "answer": []}, "list of accepted ones"),
        ({"question": "Who?", "answer": ["The Who", "The"]}, "nothing is left to compare of the answer 'The'"),
        ({"question": "Who?", "options": ["a", "b"], "answer": "a"}, "must be the index"),
        ({"question": "Who?", "options": ["a", "b"], "answer": True}, "must be the index"),
        ({"question": "Who?", "options": ["a", "b", "a"], "answer": 2}, "two of the .options. are the same"),
    ):
        file.write_text('{"question": "Good?", "answer": "yes"}\n' + json.dumps(row), encoding="utf-8-sig")
        with pytest.raises(UserError, match=f"line 2.*{message}"):
            read_questions(file)


def test_held_out_text_of_one_token_is_refused(alone: None, smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("a")
    with pytest.raises(UserError, match=r"evaluate\.retention: .*general\.txt holds nothing to predict"):
        Evaluator(EvaluateSettings(retention=tmp_path / "general.txt"), AutoTokenizer.from_pretrained(smollm2), 16)


def scores(right: list[bool], f1: list[float]) -> Scores:
    rows = [Choice("?", ["a", "b"], 0).mark([1.0, 2.0] if is_right else [2.0, 1.0]) for is_right in right]
    return Scores(rows + [{"exact_match": value == 1, "f1": value} for value in f1], retention=10.0)


def test_before_against_after_is_paired() -> None:
    before, after = scores([True, False, False, True], [0.0, 0.5]), scores([True, True, True, True], [1.0, 0.5])
    found = compare(before, after)
    assert (found["knowledge_before"], found["knowledge_after"]) == (0.5, 1.0)
    assert (found["domain_after"], found["retention_after"]) == (None, 10.0)
    mean, low, high = found["changes"]["knowledge"]
    assert low < mean == 0.5 < high
    assert found["changes"]["f1"][0] == found["changes"]["exact_match"][0] == 0.5
    assert found["intervals"].keys() == {
        f"{key}_{time}" for key in ("knowledge", "knowledge_normalised", "exact_match") for time in ("before", "after")
    }
    assert Scores(**json.loads(json.dumps(before.as_dict()))) == before
    first = compare(None, after)
    assert first["knowledge_before"] is None
    assert first["changes"] == {}


def test_a_run_s_course_and_rows(tmp_path: Path) -> None:
    history = [{"step": 0, "knowledge": 0.2}, {"step": 1, "loss": 3.0}, {"step": 2, "knowledge": 0.4}]
    assert [is_scored(history, step) for step in (0, 1, 2)] == [True, False, True]
    summary = dict.fromkeys((f"{key}_after" for key in ("knowledge_normalised", "exact_match", "f1", "domain")), None)
    summary |= {"knowledge_after": 0.6, "retention_after": None, "exported_step": 4}
    assert course(history, summary) == {"knowledge": [(0, 0.2), (2, 0.4), (4, 0.6)]}
    for name in ("before", "step-000002", "step-000004", "after"):
        write_rows([{"question": "Ça?"}], tmp_path, name)
    remove_rows(tmp_path, after=2)
    assert {file.name for file in (tmp_path / "evaluation").iterdir()} == {"before.jsonl", "step-000002.jsonl"}
    assert json.loads((tmp_path / "evaluation/before.jsonl").read_text()) == {"question": "Ça?"}
