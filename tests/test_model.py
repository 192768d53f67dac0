"""Model folders of strangers: their code is not run, and what is no language model is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mica_ds.adapter import attach_adapter, factor_name, target_modules
from mica_ds.config import AdapterSettings, ModelSettings
from mica_ds.errors import UserError
from mica_ds.model import load_skeleton, load_tokenizer, read_model_config
from mica_ds.shards import weight_shape


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


def test_a_model_with_a_loss_of_its_own_is_refused(folder: Path) -> None:
    change(folder / "config.json", model_type="trocr")
    with pytest.raises(UserError, match="holds a trocr model, which is not trained by its next token"):
        read_model_config(folder)
    change(folder / "config.json", model_type="bamba", z_loss_coefficient=0.1, mamba_n_heads=4, mamba_d_head=20)
    with pytest.raises(UserError, match="set its z_loss_coefficient to 0"):
        read_model_config(folder)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"hidden_size": "abc"}, "Field 'hidden_size' expected int"),
        ({"hidden_size": None}, "Field 'hidden_size' expected int"),
        ({"num_attention_heads": 3}, r"hidden size \(40\) is not a multiple"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"dtype": "nonsense"}, "nonsense"),
        ({"rope_scaling": 7}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "none", "factor": 2.0}}, "KeyError: 'none'"),
        ({"hidden_act": "none"}, "KeyError: 'none'"),
        ({"vocab_size": -1}, "dimension"),
    ],
)
def test_settings_of_no_model_are_refused(entries: dict[str, Any], reason: str, folder: Path) -> None:
    change(folder / "config.json", **entries)
    with pytest.raises(UserError, match=rf"config.json is not usable: .*{reason}"):
        load_skeleton(ModelSettings(path=folder))


def test_mica_trains_a_alone_also_where_peft_casts_the_factors(tiny_model: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.bfloat16)
    adapter = AdapterSettings(method="mica", r=4, alpha=8, targets=["embed_tokens", "q_proj"])
    modules = target_modules(model, adapter)
    factors = {}
    for name, module in modules.items():
        rows, columns = weight_shape(module)
        factors[factor_name(name, module, "A")] = torch.zeros(4, columns)
        factors[factor_name(name, module, "B")] = torch.randn(rows, 4)
    attached = attach_adapter(model, modules, adapter, factors)

    def trained() -> set[str]:
        return {name.rpartition("lora_")[2] for name, p in attached.named_parameters() if p.requires_grad}

    assert trained() == {"A.default.weight", "embedding_A.default"}
    with attached.disable_adapter():  # as the base is scored
        assert not trained()
    assert trained() == {"A.default.weight", "embedding_A.default"}
