"""Packing is refused where documents would see each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mica_ds.config import load_config
from mica_ds.errors import UserError
from mica_ds.packing import check_packing, check_separation

from .conftest import ATTENTIONS


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("architecture", "attention"), ATTENTIONS)
def test_decoders_keep_documents_apart(
    architecture: str,
    attention: str,
    dtype: torch.dtype,
    tiny_model: Callable[[str], Path],
    tiny_config: Callable[..., Path],
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model(architecture), dtype=dtype, attn_implementation=attention
    )
    model.config.use_cache = False  # as the Trainer sets it
    config = load_config(tiny_config())
    check_separation(model, config)

    def blind(**inputs: Any) -> Any:
        return type(model).forward(model, **{key: value for key, value in inputs.items() if key != "position_ids"})

    model.config.use_cache = True  # with which transformers (5.23) does not look at the positions
    with pytest.raises(UserError, match="sees the one before it"):
        check_separation(model, config)
    model.config.use_cache = False
    model.forward = blind
    with pytest.raises(UserError, match=r"sees the one before it; set data\.pack=false"):
        check_separation(model, config)
    check_separation(model, load_config(tiny_config(), ["data.pack=false"]))


@pytest.mark.usefixtures("alone")
def test_a_recurrent_model_mixes_documents(tiny_config: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 64}
    model = transformers.AutoModelForCausalLM.from_config(transformers.MambaConfig(**sizes))
    with pytest.raises(UserError, match="sees the one before it"):
        check_separation(model, load_config(tiny_config()))


def test_flash_attention_needs_rows_alone(tiny_config: Callable[..., Path]) -> None:
    flash = ["model.attention=flash_attention_2"]
    with pytest.raises(UserError, match=r"data\.pack: .* set train\.per_device_train_batch_size=1"):
        check_packing(load_config(tiny_config(), flash))
    check_packing(load_config(tiny_config(), [*flash, "train.per_device_train_batch_size=1"]))
    check_packing(load_config(tiny_config(), [*flash, "data.pack=false"]))
