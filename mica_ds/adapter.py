"""Attach what trains: MiCA (A = 0, B from the cache, frozen), LoRA, or the whole model."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.variants import MiCALinearVariant
from torch import nn
from transformers import PreTrainedModel

from mica_ds.basis import Basis
from mica_ds.config import AdapterSettings
from mica_ds.errors import UserError
from mica_ds.shards import (
    Matrix,
    StoredMatrix,
    linear_modules,
    matrix_of,
    stacked_experts,
    target_candidates,
    weight_shape,
)
from mica_ds.weights import StoredTensor, stored_tensor


def target_modules(model: nn.Module, adapter: AdapterSettings) -> dict[str, nn.Module]:
    """The modules that the adapter goes on, by name. Local.

    Raises: UserError where a target matches no linear module, or r exceeds what MiCA can take from a weight.
    """
    if adapter.targets == "all-linear":
        chosen = linear_modules(model)
    else:
        candidates = target_candidates(model)
        for target in adapter.targets:
            if any(_matches(name, target) for name in candidates):
                continue
            if any(_matches(name, target) for name in stacked_experts(model)):
                raise UserError(
                    f"adapter.targets: {target} are stacked experts; `mica-ds basis` computes their bases, "
                    "but peft has no MiCA layer to attach to them: leave them out"
                )
            known = sorted({name.rpartition(".")[2] for name in candidates})
            raise UserError(f"adapter.targets: {target} matches no linear module; this model has {', '.join(known)}")
        chosen = {
            name: module for name, module in candidates.items() if any(_matches(name, t) for t in adapter.targets)
        }
    if not chosen:
        raise UserError("adapter.targets chooses no linear module of this model")
    for name, module in chosen.items():
        _check_r(name, weight_shape(module), adapter)
    return chosen


def stored_targets(
    model: PreTrainedModel, adapter: AdapterSettings, checkpoint: dict[str, StoredTensor]
) -> list[StoredMatrix]:
    """The weights in a checkpoint that the adapter's targets mean, of a model without weights. Local.

    Here a target may also be a parameter that stacks experts (`experts.down_proj`): each expert is a matrix of its own.
    Raises: UserError as `target_modules` does, and where the checkpoint lacks a weight.
    """
    experts = {}
    if adapter.targets != "all-linear":
        stacked = stacked_experts(model)
        experts = {name: layout for name, layout in stacked.items() if any(_matches(name, t) for t in adapter.targets)}
        rest = [target for target in adapter.targets if not any(_matches(name, target) for name in experts)]
        adapter = adapter.model_copy(update={"targets": rest})
    modules = target_modules(model, adapter) if adapter.targets else {}
    prefix = model.base_model_prefix
    stored_names = {id(parameter): name for name, parameter in model.named_parameters()}  # tied ones under one name
    found = []
    for name, module in modules.items():
        matrix, stored_name = matrix_of(name, module), stored_names[id(module.weight)]
        found.append(StoredMatrix(matrix, stored_tensor(stored_name, checkpoint, prefix, matrix.stored_shape)))
    for name, (shape, is_transposed) in experts.items():
        if is_transposed is None:
            raise UserError(f"adapter.targets: transformers does not say how {name} stores its experts; leave it out")
        tensor = stored_tensor(name, checkpoint, prefix, shape)
        for expert in range(shape[0]):
            matrix = Matrix(f"{name}.{expert}", shape[1:], is_transposed)
            _check_r(matrix.name, matrix.shape, adapter)
            found.append(StoredMatrix(matrix, tensor, expert * shape[1] * shape[2]))
    if not found:
        raise UserError("adapter.targets chooses no weight of this model")
    return found


def _check_r(name: str, shape: tuple[int, int], adapter: AdapterSettings) -> None:
    if adapter.method == "mica" and adapter.r > min(shape):
        raise UserError(
            f"adapter.r={adapter.r} exceeds min(out, in)={min(shape)} of {name}; lower it or leave {name} out"
        )


def attach_adapter(
    model: PreTrainedModel,
    modules: dict[str, nn.Module],
    adapter: AdapterSettings,
    factors: dict[str, torch.Tensor] | None,
) -> nn.Module:
    """Return the model with its adapter: only A (MiCA), A and B (LoRA) or everything (full) trains. Local.

    `factors` are its values by peft's names; without them LoRA begins as peft has it. MiCA is peft's own variant, made
    without its SVD: with `low_cpu_mem_usage` the factors start on the meta device, where peft (0.21) skips that.
    """
    if adapter.method == "full":
        return model.requires_grad_(True)
    peft_model = _with_factors(model, modules, adapter, is_empty=factors is not None)
    if factors is not None:
        set_peft_model_state_dict(peft_model, factors, low_cpu_mem_usage=True)
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad_(_trains(name, adapter.method))  # peft thaws an embedding's B where it casts it (0.21)
        if parameter.requires_grad or factors is not None:
            parameter.data = parameter.data.to(model.dtype)  # not `.to(model)`: it would round RoPE's fp32 buffers
    return peft_model


def adapter_skeleton(model: PreTrainedModel, modules: dict[str, nn.Module], adapter: AdapterSettings) -> nn.Module:
    """The same for a model on the meta device: factors without values, and what trains marked. Local."""
    if adapter.method == "full":
        return model.requires_grad_(True)
    peft_model = _with_factors(model, modules, adapter, is_empty=True)
    for name, parameter in peft_model.named_parameters():
        parameter.data = parameter.data.to(model.dtype)
        parameter.requires_grad_(_trains(name, adapter.method))
    return peft_model


def _trains(name: str, method: str) -> bool:
    """Whether a parameter of peft's model trains: A, and LoRA's B."""
    factors = {"lora_A", "lora_embedding_A", *(("lora_B", "lora_embedding_B") if method == "lora" else ())}
    return not factors.isdisjoint(name.split("."))


def _with_factors(
    model: PreTrainedModel, modules: dict[str, nn.Module], adapter: AdapterSettings, is_empty: bool
) -> PeftModel:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        target_modules=_peft_targets(model, modules),
        init_lora_weights="mica" if adapter.method == "mica" else True,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in modules.values()),
    )
    # No cast of the factors to fp32: DeepSpeed keeps fp32 masters, and activations stay in the compute dtype.
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=is_empty)
    for module in peft_model.modules():
        variants = getattr(module, "lora_variant", {})
        if isinstance(variants.get("default"), MiCALinearVariant):
            variants["default"] = _ScaledInside()
    return peft_model


class _ScaledInside(MiCALinearVariant):
    """peft's MiCA, scaled where it has r columns instead of `out`: a pass over all outputs less, forth and back."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        dropped = module.lora_dropout[active_adapter](x)
        inside = module.lora_A[active_adapter](dropped) * module.scaling[active_adapter]
        return result + module.lora_B[active_adapter](inside)


def frozen_factors(modules: dict[str, nn.Module], basis: Basis) -> dict[str, torch.Tensor]:
    """MiCA's B (out, r) of all modules by peft's names, fp32, from the cache. Local."""
    return {factor_name(name, module, "B"): basis[name] for name, module in modules.items()}


def first_factors(modules: dict[str, nn.Module], basis: Basis) -> dict[str, torch.Tensor]:
    """What MiCA begins with, by peft's names, fp32: A (r, in) of zeros, and B (out, r) from the cache. Local."""
    zeros = {factor_name(name, m, "A"): torch.zeros(basis.r, weight_shape(m)[1]) for name, m in modules.items()}
    return zeros | frozen_factors(modules, basis)


def lora_parameters(modules: dict[str, nn.Module], r: int) -> int:
    """What LoRA would train on these modules: r (in + out) for each. Local."""
    return sum(r * sum(weight_shape(module)) for module in modules.values())


def factor_name(name: str, module: nn.Module, factor: str) -> str:
    """What peft calls the factor (`A` or `B`) of a module's adapter, in a file. Local."""
    kind = f"lora_embedding_{factor}" if isinstance(module, nn.Embedding) else f"lora_{factor}.weight"
    return f"base_model.model.{name}.{kind}"


def _peft_targets(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """The short names (`q_proj`, …), which servers expect, where they choose the same modules; else the full ones."""
    short = sorted({name.rpartition(".")[2] for name in modules})
    chosen = [name for name in target_candidates(model) if any(_matches(name, kind) for kind in short)]
    return short if len(chosen) == len(modules) else sorted(modules)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
