"""The tiled loss against transformers' own, in value, gradient and memory's shape."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from mica_ds import loss, trainer
from mica_ds.config import load_config
from mica_ds.errors import UserError

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CAP: dict[str, Any] = {"final_logit_softcapping": 0.5}  # low: it bends the small logits of a random model
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARES: dict[str, Any] = {"vocab_size_per_layer_input": 1000, "hidden_size_per_layer_input": 8}
BENDING: dict[str, dict[str, Any]] = {
    # Those that cap their logits,
    "beam": CAP | EXPERTS,
    "gemma2": CAP,
    "gemma3_text": CAP,
    "gemma3n_text": CAP | SHARES | {"layer_types": ["full_attention"], "num_kv_shared_layers": 0},
    "gemma4_text": CAP,
    "gemma4_unified_text": CAP,
    "nanochat": CAP,
    "recurrent_gemma": {"logits_soft_cap": 0.5, "num_hidden_layers": 3},
    "vaultgemma": CAP,
    "xlstm": {"output_logit_soft_cap": 0.5, "embedding_dim": 32, "num_heads": 2, "use_cache": False},
    # and scale them, leave words out, or make them of another dtype than their input.
    "cohere": {},
    "granite": {"logits_scaling": 3.0},
    "inkling_text": EXPERTS | {"unpadded_vocab_size": 990, "tie_word_embeddings": False},
    "mamba": {},
}


def build(architecture: str = "llama", *, trains: bool = False, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture, **{**SIZES, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.get_output_embeddings().weight.requires_grad_(trains)
    return model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 990, (3, 37))
    return {"input_ids": ids, "labels": torch.where(torch.rand(ids.shape) < 0.3, -100, ids)}


@pytest.mark.parametrize("items", [None, 250])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "qwen3", *BENDING])
def test_it_equals_the_whole_loss(
    architecture: str, trains: bool, items: int | None, batch: dict[str, torch.Tensor]
) -> None:
    stock = build(architecture, trains=trains, **BENDING.get(architecture, {}))
    check(stock, copy.deepcopy(stock), batch, items)


def test_it_equals_the_whole_loss_of_a_head_with_an_adapter(batch: dict[str, torch.Tensor]) -> None:
    settings = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj", "v_proj"], init_lora_weights=False)
    stock = peft.get_peft_model(build("gemma2", **BENDING["gemma2"]), settings)
    check(stock, copy.deepcopy(stock), batch, 250)


def check(stock: Any, ours: Any, batch: dict[str, torch.Tensor], items: int | None) -> None:
    seen: list[int] = []
    ours.get_output_embeddings().register_forward_hook(lambda head, inputs, made: seen.append(_elements(made)))
    loss.tile_loss(ours, 16_000)  # 7 tiles of 16 tokens
    losses = []
    for model in (stock, ours):
        model.train()
        found = model(**batch, num_items_in_batch=items).loss
        (found * 0.5).backward()
        losses.append(found.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(seen) > 7
    assert max(seen) <= 16 * 1000  # never the logits of all 111 tokens
    gradients = dict(stock.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-7)
            compared += 1
    assert compared > 5


def _elements(made: Any) -> int:
    return made.numel() if isinstance(made, torch.Tensor) else 0


@pytest.mark.parametrize("architecture", ["llama", *BENDING])
def test_it_equals_the_whole_loss_in_bfloat16(architecture: str, batch: dict[str, torch.Tensor]) -> None:
    stock = build(architecture, **BENDING.get(architecture, {})).bfloat16().train()
    ours = copy.deepcopy(stock)
    loss.tile_loss(ours, 16_000)
    found, expected = ours(**batch).loss, stock(**batch).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_of_a_head_in_bfloat16(batch: dict[str, torch.Tensor]) -> None:
    """Little further from fp32's than that of whole logits, however small the tiles."""
    exact = build(trains=True).bfloat16().float()
    whole, ours = (copy.deepcopy(exact).bfloat16() for _ in range(2))
    loss.tile_loss(ours, 1000)  # a token
    for model in (exact, whole, ours):
        model.train()(**batch).loss.backward()
    gradients = [model.get_output_embeddings().weight.grad.double() for model in (exact, whole, ours)]
    assert (gradients[2] - gradients[0]).norm() < 1.5 * (gradients[1] - gradients[0]).norm()


@pytest.mark.parametrize("trains", [False, True])
def test_offloaded_activations_leave_the_head_where_it_is(trains: bool, batch: dict[str, torch.Tensor]) -> None:
    ours = build(trains=trains).train()
    loss.tile_loss(ours, loss.TILE_ON_CPU)
    moved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: moved.append(tensor.numel()) or tensor, lambda t: t):
        ours(**batch).loss.backward()
    assert moved
    assert max(moved) < 32 * 1000  # the head's elements, as many as those of the logits of 32 tokens


@pytest.mark.parametrize("architecture", ["llama", *BENDING])
def test_evaluation_has_its_logits_and_loss(architecture: str, batch: dict[str, torch.Tensor]) -> None:
    stock = build(architecture, **BENDING.get(architecture, {})).eval()
    ours = copy.deepcopy(stock)
    loss.tile_loss(ours, loss.TILE_ON_CPU)
    with torch.no_grad():
        expected, found = stock(**batch), ours(**batch)
    assert torch.equal(found.logits, expected.logits)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


def test_liger_must_be_installed(tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "is_liger_kernel_available", lambda: False)
    trainer.check_liger(load_config(tiny_config()))
    with pytest.raises(UserError, match="use_liger_kernel: install liger-kernel"):
        trainer.check_liger(load_config(tiny_config(), ["train.use_liger_kernel=true"]))
