"""Losses where the ranks' token counts differ, and where the ranks share each sequence, also after a resume."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mica_ds.checkpoint import read_history

from ..conftest import start_ranks, write_config
from .test_resume import Run

pytestmark = pytest.mark.dist

STEPS, EPOCH = 10, 5  # steps of a run and of an epoch
SHARED = "data.sequence_parallel=2"
OPEN = ["Who?", "Who built the press in Torvane, and for whom was it built there?"]  # one is padded beside the other
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "at once": (1, ["train.per_device_train_batch_size=4"]),
    "accumulated": (2, []),
    "shared": (2, [SHARED]),
    "shared in two groups": (4, [SHARED]),
    "recomputed": (2, ["train.activation_checkpointing=true", "model.offload_activations=true"]),
}


@pytest.fixture(scope="module")
def config(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for documents of 2 to 31 tokens, each in a sequence of its own."""
    folder = tmp_path_factory.mktemp("ragged")
    sentence = "The Quillmar press was built in Torvane by Edda Brunholt and ran for years"
    texts = [" ".join(sentence.split()[: 1 + 5 * i % 14]) for i in range(4 * EPOCH)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = write_config(
        folder,
        tiny_model("llama"),
        data={"corpus": [str(folder / "corpus.jsonl")], "pack": False},
        train={"max_steps": STEPS, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "save_steps": 1},
        checkpoint={"keep": STEPS},
        evaluate={"retention": None},
    )
    with (folder / "questions.jsonl").open("a") as file:
        file.writelines(f"\n{json.dumps({'question': q, 'answer': 'Edda'})}" for q in OPEN)
    return config


@pytest.fixture(scope="module")
def runs(config: Path) -> dict[str, Run]:
    """Four sequences of very different length a step, divided among the ranks in each of the ways."""
    runs = {name: Run(config, config.parent / name) for name in LAYOUTS}
    for name, (ranks, overrides) in LAYOUTS.items():
        # The base model's scores go from one run to another alone, so that each other one makes its own.
        known = name == "recomputed"
        cache = config.parent / ("accumulated" if known else name)
        finished = runs[name].train(ranks, *overrides, f"data.cache={cache}/tokens")
        assert finished.codes == [0] * ranks, finished.output
        assert ("the base model's scores are known" in finished.output) == known
    return runs


def history(run: Run) -> list[float]:
    entries = [entry for entry in read_history(run.checkpoint(STEPS)) if "loss" in entry]
    assert len(entries) == STEPS
    return [entry[key] for entry in entries for key in ("loss", "grad_norm")]


def test_ragged_micro_batches_and_shared_sequences_give_the_losses_of_one_rank(runs: dict[str, Run]) -> None:
    expected = history(runs["at once"])
    for name, run in runs.items():
        assert history(run) == pytest.approx(expected, rel=1e-4), name


def test_all_weights_train_alike_in_each_way(config: Path, tmp_path: Path) -> None:
    found = []
    for name in ("at once", "shared", "recomputed"):
        ranks, overrides = LAYOUTS[name]
        run = Run(config, tmp_path / name)
        settings = ["adapter.method=full", "train.learning_rate=1e-3", "evaluate.questions=null"]
        finished = run.train(ranks, *overrides, *settings)
        assert finished.codes == [0] * ranks, finished.output
        found.append(history(run))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_ranks_that_share_sequences_score_as_one_rank(runs: dict[str, Run]) -> None:
    for file in ("before.jsonl", "after.jsonl"):
        scored = [(runs[name].folder / "evaluation" / file).read_text() for name in ("at once", "shared")]
        expected, found = ([json.loads(line) for line in text.splitlines()] for text in scored)
        assert len(expected) == len(found) == 5 + len(OPEN)
        for one, other in zip(expected, found, strict=True):
            assert one.get("losses", []) == pytest.approx(other.get("losses", []), rel=1e-3)
            if file == "before.jsonl":  # of one and the same model
                assert one.get("given") == other.get("given")
    shared = runs["shared"]  # scored again, by a rank that has no other to share with
    scored = start_ranks(1, ["evaluate", str(shared.config), f"output_dir={shared.folder}", SHARED])
    assert scored.codes == [0], scored.output
    found = json.loads((shared.folder / "evaluation.json").read_text())
    assert found["checkpoint"] == f"step-{STEPS:06d}"
    assert found["knowledge_after"] == shared.summary()["knowledge_after"]


def test_the_base_model_is_scored_once(runs: dict[str, Run]) -> None:
    first, second = runs["accumulated"], runs["recomputed"]
    answers = [(run.folder / "evaluation/before.jsonl").read_bytes() for run in (first, second)]
    assert answers[0] == answers[1]
    for key in ("knowledge_before", "retention_before"):
        assert first.summary()[key] == second.summary()[key]


def test_activations_are_computed_again_and_offloaded(runs: dict[str, Run]) -> None:
    micro_batches, layers = 2 * STEPS, 2
    for name, times in (("accumulated", 1), ("recomputed", 2)):
        for rank in range(2):
            notes = runs[name].notes / f"{rank}.layers"
            steps = [int(line) for line in notes.read_text().splitlines()]
            assert sum(step > 0 for step in steps) == times * layers * micro_batches  # before, the plan has counted
            assert notes.with_suffix(".offloads").exists() == (name == "recomputed")


def test_the_rate_counts_no_padding(runs: dict[str, Run]) -> None:
    labels = [label for rows in runs["accumulated"].seen().values() for row in rows for label in row["labels"]]
    predicted = sum(label != -100 for label in labels)
    assert 0 < predicted < len(labels) / 2
    for run in runs.values():
        assert run.summary()["tokens_per_second"] * run.summary()["train_seconds"] == pytest.approx(predicted)


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        ("shared", 2, "shared"),  # goes on into the next epoch
        ("shared", EPOCH + 2, "accumulated"),
        ("accumulated", EPOCH + 2, "shared"),
    ],
)
def test_shared_sequences_go_on(before: str, step: int, after: str, runs: dict[str, Run], tmp_path: Path) -> None:
    run = Run(runs[before].config, tmp_path / "run").take(runs[before], step)
    ranks, overrides = LAYOUTS[after]
    finished = run.train(ranks, *overrides)
    assert finished.codes == [0] * ranks, finished.output
    assert history(run) == pytest.approx(history(runs["at once"]), rel=1e-4)
    parts = 2 if SHARED in overrides else 1
    expected = runs["accumulated"].seen()
    seen = run.seen(parts)
    assert sorted(seen) == list(range(step + 1, STEPS + 1))
    for number, rows in seen.items():
        assert [row["input_ids"] for row in rows] == [row["input_ids"] for row in expected[number]]
    run.assert_nothing_read_again()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.pack=true", "sdpa would let the documents of a sequence see one another"),
        ("data.sequence_length=33", "does not divide the 33 tokens"),
        ("model.attention=flash_attention_2", "model.attention=flash_attention_2"),
    ],
)
def test_what_sequences_cannot_be_shared_is_refused(override: str, message: str, config: Path, tmp_path: Path) -> None:
    finished = start_ranks(2, ["train", str(config), f"output_dir={tmp_path}", SHARED, override])
    assert finished.codes == [2, 2], finished.output
    assert message in finished.outputs[0]
