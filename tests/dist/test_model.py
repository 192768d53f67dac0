"""Partitions filled straight from the checkpoint: the model's perplexity under ZeRO-3 is plain transformers' own."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ..conftest import start_ranks

pytestmark = pytest.mark.dist


def several_files(source: Path, folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def bare_decoder(source: Path, folder: Path) -> None:
    """The checkpoint of the decoder alone, whose names lack the prefix `model.`."""
    weights = load_file(source / "model.safetensors")
    stripped = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(stripped, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder)


@pytest.mark.parametrize("make", [several_files, bare_decoder])
def test_the_loaded_model_is_the_stored_one(
    make: Callable[[Path, Path], None],
    tiny_model: Callable[[str], Path],
    tiny_config: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source, folder = tiny_model("llama"), tmp_path / "model"
    folder.mkdir()
    make(source, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    config = tiny_config(model={"path": str(folder)}, data={"sequence_length": 1024})
    finished = start_ranks(2, ["evaluate", str(config)])
    assert finished.codes == [0, 0], finished.output
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["checkpoint"] is None
    ids = torch.tensor([tokenizer((tmp_path / "corpus.txt").read_text())["input_ids"]])
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        loss = plain(ids, labels=ids).loss.item()
    assert found["retention"] == pytest.approx(math.exp(loss), rel=1e-4)
