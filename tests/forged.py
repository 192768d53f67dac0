"""A run folder with a checkpoint that no training has made: random factors, on the weights of a config's model."""

import hashlib
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from mica_ds.config import load_config
from mica_ds.fingerprint import mixed_sum
from mica_ds.model import DTYPES, load_skeleton
from mica_ds.shelf import write_state


def forge_checkpoint(file: Path, *overrides: str) -> Path:
    """Write a checkpoint of step 1 for a config with MiCA or LoRA on all linear layers, and return its folder."""
    config = load_config(file, list(overrides))
    folder = config.output_dir / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    model = load_skeleton(config.model)
    head, r = model.get_output_embeddings(), config.adapter.r
    generator = torch.Generator().manual_seed(0)
    trained, frozen = {}, {}
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            rows, columns = module.weight.shape
            out, inputs = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
            A = torch.randn(r, inputs, generator=generator) * 0.02
            B = torch.linalg.qr(torch.randn(out, r, generator=generator)).Q.contiguous()
            trained[f"base_model.model.{name}.lora_A.weight"] = A
            frozen[f"base_model.model.{name}.lora_B.weight"] = B
            names.append(name.rpartition(".")[2])
    is_mica = config.adapter.method == "mica"
    save_file(trained if is_mica else trained | frozen, folder / "model-00001.safetensors")
    if is_mica:
        save_file(frozen, folder / "frozen.safetensors")
    LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=config.adapter.alpha,
        target_modules=sorted(set(names)),
        init_lora_weights="mica" if is_mica else True,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    ).save_pretrained(folder)
    adapter = config.model_dump(mode="json")["adapter"]
    origin = {"model.dtype": config.model.dtype, **{f"adapter.{key}": value for key, value in adapter.items()}}
    origin["model.path (fingerprint of its weights)"] = fingerprint(
        config.model.path, model, DTYPES[config.model.dtype]
    )
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    write_state(folder, {"step": 1, "origin": origin, "files": files})
    return folder


def fingerprint(path: Path, model: nn.Module, dtype: torch.dtype) -> str:
    """What training says of the model in a folder, here from its files alone."""
    sums = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.offset_keys():
                tensor = tensors.get_tensor(name)
                sums[name] = mixed_sum(tensor.to(dtype).reshape(-1), 0).item()
    found = [(f"{name} {tuple(tensor.shape)} {dtype}", sums[name]) for name, tensor in model.named_parameters()]
    return hashlib.sha256(repr(found).encode()).hexdigest()
