"""What a micro-batch keeps in memory besides weights: counted, not estimated, by a run on tensors without data.

The model's own code runs forwards and backwards on one and on two layers; torch tells each tensor's shape, and what lies
between the two runs is a layer's. So recomputation, packing masks, the tiled loss and an architecture's own ways count.
"""

import copy
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from mica_ds.adapter import adapter_skeleton, target_modules
from mica_ds.config import AdapterSettings, Config, ModelSettings, recomputes_activations
from mica_ds.loss import tile_loss
from mica_ds.model import DTYPES, read_model_config


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank's micro-batch."""

    activations: int
    """Kept from the forward to the backward."""
    logits: int
    """At most beyond that while the loss is made: the logits of a tile, and what becomes of them."""
    layer: int
    """At most beyond that in the backward: the gradients of a layer and, where it is recomputed, its activations."""


@dataclass(frozen=True)
class Batch:
    """A rank's micro-batch."""

    rows: int
    length: int
    """Tokens of a sequence, or of this rank's part of it."""
    has_mask: bool
    """Whether a mask keeps packed documents apart: flash attention does without."""
    is_recomputed: bool
    """Whether a layer's activations are made again in the backward."""


def micro_batch(config: Config) -> Batch:
    """What each rank takes at a time. Local."""
    rows, parts = config.train.get("per_device_train_batch_size", 1), config.data.sequence_parallel
    has_mask = config.data.pack and parts == 1 and not config.model.attention.startswith("flash")
    return Batch(rows, config.data.sequence_length // parts, has_mask, recomputes_activations(config))


def count_footprint(model: ModelSettings, adapter: AdapterSettings, batch: Batch) -> Footprint:
    """Count what a micro-batch takes. Local; a second or two, whatever the model's size. Raises: UserError."""
    depth = read_model_config(model.path).get_text_config().num_hidden_layers
    counted = [_count(model, adapter, batch, layers) for layers in range(1, min(depth, 2) + 1)]
    more = depth - len(counted)
    kept, loss, backward = (last + more * (last - first) for first, last in zip(counted[0], counted[-1], strict=True))
    return Footprint(kept, loss - kept, max(0, backward - kept))


def _count(settings: ModelSettings, adapter: AdapterSettings, batch: Batch, layers: int) -> tuple[int, int, int]:
    """Bytes kept after the forward, and the peaks of loss and backward, of a model with so many layers."""
    model = _first_layers(settings, adapter, layers)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(model)
        is_tiled = tile_loss(model)
        model.train()
        if batch.is_recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        live, hidden, kept = _Live([*model.parameters(), *model.buffers()]), [], []

        def at_head(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if not hidden:
                hidden.append(inputs[0])
                kept.append(live.now)
                live.peak = live.now

        model.get_output_embeddings().register_forward_pre_hook(at_head)
        with live:
            loss = model(**_inputs(batch), use_cache=False).loss
            at_loss, live.peak = live.peak, live.now
            if is_tiled:  # its own backward looks at a value, which there is none of; it hands on a gradient alone
                last = hidden.pop()
                gradient = torch.empty_like(last)
                last.backward(gradient)
            else:
                loss.backward()
    return kept[0], at_loss, live.peak


def _first_layers(settings: ModelSettings, adapter: AdapterSettings, layers: int) -> Any:
    """The first layers of the model with its adapter, on the meta device, what trains marked."""
    whole = copy.deepcopy(read_model_config(settings.path))
    text = whole.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole, dtype=DTYPES[settings.dtype], trust_remote_code=False)
    return adapter_skeleton(model, target_modules(model, adapter), adapter)


def _materialise(model: nn.Module) -> None:
    """Give a model on the meta device tensors that know they are a host's, but have no data."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
                if parameter.requires_grad:  # ZeRO-3 takes a gradient away as soon as it is there
                    made[id(parameter)].register_post_accumulate_grad_hook(_drop_gradient)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """A micro-batch as the collator makes it, and the mask that transformers makes of its positions."""
    tokens = torch.zeros(batch.rows, batch.length, dtype=torch.long)
    inputs = {"input_ids": tokens, "labels": tokens, "position_ids": tokens}
    if batch.has_mask:
        inputs["attention_mask"] = torch.ones(batch.rows, 1, batch.length, batch.length, dtype=torch.bool)
    return inputs


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self, outside: list[torch.Tensor]) -> None:
        super().__init__()
        self._outside = {tensor.untyped_storage()._cdata for tensor in outside}
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes and key not in self._outside:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
