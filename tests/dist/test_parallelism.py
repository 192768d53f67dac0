"""Losses where the ranks' token counts differ, and where the ranks share each sequence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mica_ds.checkpoint import read_history

from ..conftest import Finished, start_ranks

pytestmark = pytest.mark.dist

STEPS = 6


def write_ragged(write: Callable[..., Path]) -> Path:
    """A config for documents of 2 to 31 tokens, each in a sequence of its own."""
    train = {"max_steps": STEPS, "per_device_train_batch_size": 1, "learning_rate": 1e-2}
    config = write(data={"pack": False}, train=train)
    words = "The Quillmar press was built in Torvane by Edda Brunholt and ran for years ".split()
    texts = [" ".join(words[: 1 + 5 * i % 14]) for i in range(20)]
    (config.parent / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return config


def history(run: Path) -> list[float]:
    checkpoint = max((run / "checkpoints").iterdir())
    entries = [entry for entry in read_history(checkpoint) if "loss" in entry]
    assert len(entries) == STEPS
    return [entry[key] for entry in entries for key in ("loss", "grad_norm")]


def run(ranks: int, config: Path, *overrides: str) -> Finished:
    overrides = (f"data.corpus=[{config.parent}/corpus.jsonl]", *overrides)
    return start_ranks(ranks, ["train", str(config), *overrides])


def test_ragged_micro_batches_and_shared_sequences_give_the_losses_of_one_rank(
    tiny_config: Callable[..., Path],
) -> None:
    """Four sequences of very different length a step: at once on one rank; one by one, and two at a time, on two."""
    config = write_ragged(tiny_config)
    losses = {}
    for name, ranks, overrides in [
        ("at once", 1, ["train.per_device_train_batch_size=4"]),
        ("accumulated", 2, []),
        ("shared", 2, ["data.sequence_parallel=2"]),
        ("recomputed", 2, ["train.activation_checkpointing=true", "model.offload_activations=true"]),
    ]:
        finished = run(ranks, config, f"output_dir={config.parent}/{name}", *overrides)
        assert finished.codes == [0] * ranks, finished.output
        losses[name] = history(config.parent / name)
    assert losses["accumulated"] == pytest.approx(losses["at once"], rel=1e-4)
    assert losses["shared"] == pytest.approx(losses["at once"], rel=1e-4)
    assert losses["recomputed"] == pytest.approx(losses["at once"], rel=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.pack=true", "sdpa would let the documents of a sequence see one another"),
        ("data.sequence_length=33", "does not divide the 33 tokens"),
        ("model.attention=flash_attention_2", "model.attention=flash_attention_2"),
    ],
)
def test_what_sequences_cannot_be_shared_is_refused(
    override: str, message: str, tiny_config: Callable[..., Path]
) -> None:
    finished = run(2, write_ragged(tiny_config), "data.sequence_parallel=2", override)
    assert finished.codes == [2, 2], finished.output
    assert message in finished.outputs[0]
