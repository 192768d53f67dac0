"""Evaluation of one run by 1, 2 and 3 ranks: the same scores, the best checkpoint, and the end of patience."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mica_ds.best import ranked_steps
from mica_ds.config import load_config
from mica_ds.journal import Reader

from ..conftest import start_ranks, write_config
from ..suites import write_hellaswag
from .test_resume import Run

pytestmark = pytest.mark.dist

STEPS, PATIENCE, BOUND = 12, 2, 1.035
OPEN = [
    {"question": "Where is the press?", "answer": ["Torvane", "in Torvane"]},
    {"question": "Who?", "answer": "Edda"},
]


@pytest.fixture(scope="module")
def run(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ranks, stopped at a step whose evaluation is due; one rank goes on until patience ends. Runs once."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(
        folder,
        tiny_model("llama"),
        evaluate={
            "retention": str(folder / "general.txt"),
            "domain": str(folder / "corpus.txt"),
            "every": 2,
            "max_forgetting": BOUND,
            "patience": PATIENCE,
            "batch_tokens": 64,
        },
        train={"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 50},
        checkpoint={"export": "best", "keep": 1},
    )
    (folder / "general.txt").write_text("Volcanoes erupt where molten rock finds a way through the crust. " * 4)
    with (folder / "questions.jsonl").open("a") as file:
        file.writelines(f"\n{json.dumps(question)}" for question in OPEN)
    run = Run(config, folder / "run")
    stopped = run.train(2, signal=[signal.SIGUSR1, 2])
    assert stopped.codes == [os.EX_TEMPFAIL] * 2, stopped.output
    assert run.checkpoints() == ["step-000002"]
    shutil.copytree(run.folder / "evaluation", folder / "first")
    finished = run.train(1)
    assert finished.codes == [0], finished.output
    assert "were no better than the best: training stops" in finished.output
    assert "instead of the last" in finished.output
    return run


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.open()]


def assert_same(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """But for the last digits of losses."""
    for one, other in zip(some, others, strict=True):
        assert one | {"losses": None} == other | {"losses": None}
        assert one.get("losses", []) == pytest.approx(other.get("losses", []), rel=1e-4)


def history(run: Run, step: int) -> list[dict[str, float]]:
    return json.loads((run.checkpoint(step) / "trainer_state.json").read_text())["log_history"]


def test_the_base_model_is_scored_as_by_plain_transformers(run: Run) -> None:
    folder = load_config(run.config).model.path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = rows(run.folder / "evaluation/before.jsonl")
    assert_same(found, rows(run.folder.parent / "first/before.jsonl"))  # of the first start
    questions = rows(run.folder.parent / "questions.jsonl")
    assert [row["question"] for row in found] == [question["question"] for question in questions]
    for row, question in zip(found, questions, strict=True):
        prompt = tokenizer(f"Question: {question['question']}\nAnswer:")["input_ids"]
        if "options" not in question:
            ids = list(prompt)
            for _ in range(16):
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            given = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
            assert row["given"] == given.partition("\n")[0].strip()
            continue
        losses = []
        for option in question["options"]:
            ids = prompt + tokenizer(f" {option}", add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
            with torch.no_grad():
                losses.append(model(torch.tensor([ids]), labels=labels).loss.item() * (len(ids) - len(prompt)))
        assert row["losses"] == pytest.approx(losses, rel=1e-4)
        assert row["right"] == (losses.index(min(losses)) == question["answer"])


def test_it_stops_when_patience_ends_and_exports_the_best(run: Run) -> None:
    summary = run.summary()
    log = history(run, summary["steps"])
    scored = {entry["step"]: entry for entry in log if "knowledge" in entry}
    assert list(scored) == list(range(0, summary["steps"] + 1, 2))  # the one that was due at the signal, too
    lines = [line for line in Reader(run.folder).read() if line and "retention" in line.get("values", {})]
    assert {line["step"]: line["values"] | {"step": line["step"]} for line in lines} == scored
    best, *_ = ranked_steps(log, load_config(run.config).evaluate)
    assert summary["exported_step"] == best < summary["steps"] < STEPS
    assert sum(step > best for step in scored) == PATIENCE
    assert scored[best]["retention"] <= BOUND * scored[0]["retention"] < max(e["retention"] for e in scored.values())
    assert run.checkpoints() == [f"step-{best:06d}", f"step-{summary['steps']:06d}"]
    for measure in ("knowledge", "exact_match", "domain", "retention"):
        assert summary[f"{measure}_before"] == scored[0][measure]
        assert summary[f"{measure}_after"] == pytest.approx(scored[best][measure], rel=1e-4)
    adapter = load_file(run.folder / "adapter/adapter_model.safetensors")
    stored = load_file(run.checkpoint(best) / "model-00001.safetensors")
    assert all(adapter[name].equal(tensor) for name, tensor in stored.items())
    probe = load_file(run.folder / "probe.safetensors")  # of what was trained last, with the best put in its place
    base = AutoModelForCausalLM.from_pretrained(load_config(run.config).model.path, dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(base, run.folder / "adapter", low_cpu_mem_usage=True)
    with torch.no_grad():
        logits = reloaded(input_ids=probe["input_ids"]).logits
    assert (logits - probe["logits"]).abs().max() <= 1e-4 * logits.abs().max()
    names = {"before", "after", *(f"step-{step:06d}" for step in scored if step)}
    assert {file.stem for file in (run.folder / "evaluation").iterdir()} == names
    assert_same(rows(run.folder / "evaluation/after.jsonl"), rows(run.folder / f"evaluation/step-{best:06d}.jsonl"))
    page = (run.folder / "report.html").read_text()
    assert f"is step {best} of {summary['steps']}, the best one" in page


@pytest.mark.slow
def test_a_run_that_patience_ended_is_not_trained_again(run: Run) -> None:
    again = run.train(1)
    assert again.codes == [0], again.output
    assert f"is finished, with {run.summary()['steps']} steps" in again.output


def test_patience_that_would_have_ended_at_a_signal_ends_a_step_later(run: Run, tmp_path: Path) -> None:
    """Of two micro-batches, where the first start's two ranks had one each."""
    other = Run(run.config, tmp_path / "run")
    nothing_is_learnt = ["evaluate.patience=1", "train.learning_rate=1e-9"]
    stopped = other.train(2, *nothing_is_learnt, signal=[signal.SIGUSR1, 4])
    assert stopped.codes == [os.EX_TEMPFAIL] * 2, stopped.output
    finished = other.train(1, *nothing_is_learnt)
    assert finished.codes == [0], finished.output
    assert "training stops" in finished.output
    assert other.summary()["steps"] == 5
    assert len(other.seen()[5]) == 2


def test_three_ranks_score_other_questions_and_suites(run: Run) -> None:
    """The base model has to be scored anew: under the adapter, on more ranks than there are batches of answers."""
    pytest.importorskip("lm_eval", reason="launch/setup.sh installs lm-eval")
    folder = run.folder.parent
    more = folder / "more.jsonl"
    more.write_text((folder / "questions.jsonl").read_text() + '\n{"question": "When?", "answer": "1907"}')
    data = write_hellaswag(folder / "data")
    shutil.rmtree(run.folder / "basis")  # the checkpoint holds all that is needed
    overrides = [f"output_dir={run.folder}", f"evaluate.questions={more}"]
    overrides += ["evaluate.suites=[hellaswag]", f"evaluate.suites_data={data}"]
    finished = start_ranks(3, ["evaluate", str(run.config), *overrides])
    assert finished.codes == [0] * 3, finished.output
    found, summary = json.loads((run.folder / "evaluation.json").read_text()), run.summary()
    assert found["checkpoint"] == f"step-{summary['exported_step']:06d}"
    assert not (run.folder / "basis").exists()
    for measure in ("knowledge", "domain", "retention"):
        for time in ("before", "after"):
            assert found[f"{measure}_{time}"] == pytest.approx(summary[f"{measure}_{time}"], rel=1e-4)
    assert found["changes"]["knowledge"] == summary["changes"]["knowledge"]
    for name, other in (("base", "before"), ("checkpoint", "after")):
        answered = rows(run.folder / f"evaluation/{name}.jsonl")
        assert_same(answered[:-1], rows(run.folder / f"evaluation/{other}.jsonl"))
        marked = rows(run.folder / f"evaluation/{name}-hellaswag.jsonl")
        assert len(marked) == 7
    suite = found["suites"]["hellaswag"]["acc_norm"]
    assert suite["after"] == sum(row["acc_norm"] for row in marked) / 7
    assert suite["change"][1] <= suite["change"][0] == pytest.approx(suite["after"] - suite["before"])
    assert "hellaswag (acc_norm)" in finished.output
