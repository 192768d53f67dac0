"""What a step costs: operations against PyTorch's own count, and what is read from several ranks."""

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from mica_ds import meter
from mica_ds.meter import Meter, flops_per_token, peak_flops

from .conftest import RARE, TINY

LENGTH, VOCABULARY = 64, 1024


def make_model(architecture: str, **settings: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    if architecture == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4}
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0}
    settings = common | (TINY | RARE)[architecture] | settings
    config = transformers.AutoConfig.for_model(architecture, **sizes, **settings)
    # A fused attention computes its scores a second time, which is no work of the model.
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "phi3", "gpt2", "gemma4_text"])
def test_operations_are_those_that_pytorch_counts(architecture: str) -> None:
    model = make_model(architecture)
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    for method in ("full", "lora"):
        if method == "lora":
            model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
            model.enable_input_require_grads()  # else the first layer spares some of its backward pass
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        assert flops_per_token(model, LENGTH) == counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize(
    ("card", "bf16", "fp32"),
    [
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA A10G", None, None),
        ("NVIDIA GB200", None, None),
        ("NVIDIA H100 PCIe", None, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None, None),
    ],
)
def test_a_peak_is_that_of_the_very_card_and_dtype(card: str, bf16: float | None, fp32: float | None) -> None:
    assert peak_flops(card, torch.bfloat16) == bf16
    assert peak_flops(card, torch.float32) == fp32
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"  # as transformers' `tf32: true` does
    try:
        assert peak_flops(card, torch.float32) == (bf16 and bf16 / 2)
    finally:
        torch.backends.fp32_precision = before


def test_a_reading_is_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    now = iter([0.0, 0.5, 1.0, 3.0])  # half a second for the data, two for the step
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(now))
    other = {
        "step": 1.5,
        "data": 1.0,
        "host": 1,
        "device": 7 << 30,
        "node": {"system/n2/cpu_utilization_percentage": 9.0},
    }
    monkeypatch.setattr(meter.comm, "collect", lambda mine: [mine, other])
    cuda = {"is_available": True, "get_device_name": "NVIDIA A10", "max_memory_allocated": 5 << 30}
    for name, value in {**cuda, "mem_get_info": (1 << 30, 4 << 30), "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    model = make_model("llama", tie_word_embeddings=False)
    measured = Meter(model, LENGTH)
    with measured.waiting_for_data():
        measured.expect(6000)
    measured.begin_step()
    measured.end_step()
    values = measured.read()
    assert (values["tokens"], values["tokens_per_second"]) == (6000, 2400)
    assert (values["step_seconds"], values["data_wait_seconds"]) == (2.5, 1)
    work = flops_per_token(model, LENGTH) * 6000 / 2.5 / 2  # a second and a rank
    assert values["tflops_per_rank"] == pytest.approx(work / 1e12)
    assert values["mfu"] == pytest.approx(work / 31.2e12)
    assert (values["device_peak_bytes"], values["device_peak_rank"], values["host_peak_rank"]) == (7 << 30, 1, 0)
    assert values["system/n2/cpu_utilization_percentage"] == 9
    assert any(key.endswith("/gpu_0_memory_usage_percentage") for key in values)
