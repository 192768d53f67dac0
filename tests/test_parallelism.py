"""Attention of ranks that share sequences: whose can be shared, and what it does while a model evaluates."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mica_ds import comm
from mica_ds.config import load_config
from mica_ds.errors import UserError
from mica_ds.inference import Runner
from mica_ds.parallelism import check_parallelism, mask_evaluation


@pytest.fixture
def shared_attention() -> Iterator[None]:
    """In the place of DeepSpeed's, which needs several ranks: it drops the mask, and miscounts a layer's heads."""
    own = AttentionInterface._global_mapping["sdpa"]

    def drop_mask(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        found = own(module, query, key, value, None, **more)
        module.num_key_value_groups = 1
        return found

    ALL_ATTENTION_FUNCTIONS["sdpa"] = drop_mask
    yield
    del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_answers_heed_their_padding(
    shared_attention: None, alone: None, tiny_config: Callable[..., Path], tiny_model: Callable[[str], Path]
) -> None:
    folder = tiny_model("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    runner = Runner(AutoTokenizer.from_pretrained(folder), batch_tokens=4096)
    prompts = [[3, 4], list(range(5, 25))]
    model(input_ids=torch.tensor(prompts[1:]))  # as in training, after which a layer's heads are miscounted
    mask_evaluation(load_config(tiny_config(), ["data.sequence_parallel=2"]))
    together = runner.continuations(model, prompts, 8)
    assert together == [runner.continuations(model, [prompt], 8)[0] for prompt in prompts]
    model.train()
    assert model(input_ids=torch.tensor(prompts[1:])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("gpt2", {}, "DeepSpeed cannot share the attention of gpt2 models"),  # counts no key-value heads
        ("gpt_oss", {}, "DeepSpeed cannot share the attention of gpt_oss models"),  # has no sdpa
        ("doge", {}, "DeepSpeed cannot share the attention of doge models"),  # has masks of its own
        ("mistral", {"sliding_window": 16}, "their window of 16 tokens"),
        ("phi3", {"sliding_window": 16, "pad_token_id": 0}, "their window of 16 tokens"),
        ("gemma3_text", {"sliding_window": 16}, "their window of 16 tokens"),
        ("falcon_h1", {}, "falcon_h1 models have other layers"),
        ("minimax", {"layer_types": ["linear_attention", "full_attention"]}, "minimax models have other layers"),
        ("mistral", {"sliding_window": 32}, "data.sequence_parallel=2 does not divide the 1 ranks"),
        # Has it for no layer.
        ("qwen2", {"sliding_window": 16}, "data.sequence_parallel=2 does not divide the 1 ranks"),
        ("llama", {}, "data.sequence_parallel=2 does not divide the 1 ranks"),
    ],
)
def test_attention_that_cannot_be_shared_is_refused(
    architecture: str,
    settings: dict[str, Any],
    message: str,
    tiny_config: Callable[..., Path],
    alone: None,
    tmp_path: Path,
) -> None:
    AutoConfig.for_model(architecture, num_hidden_layers=2, **settings).save_pretrained(tmp_path)
    overrides = [f"model.path={tmp_path}", "data.sequence_parallel=2", "data.pack=false", "data.sequence_length=32"]
    with pytest.raises(UserError, match=message):
        check_parallelism(load_config(tiny_config(), overrides))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_packed_sequences_are_not_refused_where_attention_looks_at_the_positions(
    attention: str, tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed (0.19.8) gathers the positions, from which these know where a document begins."""
    monkeypatch.setattr(comm, "world_size", lambda: 2)
    config = load_config(tiny_config(), ["data.sequence_parallel=2", f"model.attention={attention}"])
    assert config.data.pack
    check_parallelism(config)
