"""Model folders of strangers: their code is not run, and what is no language model is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mica_ds.config import ModelSettings
from mica_ds.errors import UserError
from mica_ds.model import load_skeleton, load_tokenizer, read_model_config


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny Llama, to be changed."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_code_beside_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    (folder / "theirs.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    model = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    change(folder / "config.json", auto_map=model)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.Tokenizer", "theirs.Tokenizer"]})
    settings = ModelSettings(path=folder)
    assert load_skeleton(settings).config.model_type == "llama"  # by transformers' own code
    assert load_tokenizer(settings).eos_token_id is not None
    change(folder / "config.json", model_type="theirs")
    with pytest.raises(UserError, match=r"config.json is not usable: .*custom code"):
        read_model_config(folder)
    assert not mark.exists()


def test_what_is_no_language_model_is_refused(folder: Path) -> None:
    change(folder / "config.json", model_type="t5")
    with pytest.raises(UserError, match="holds a t5 model, which is no causal language model"):
        read_model_config(folder)
