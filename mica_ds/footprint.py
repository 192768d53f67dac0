"""What a micro-batch keeps in memory besides weights: counted, not estimated, by a run on tensors without data.

The model's own code runs forwards and backwards on one layer and on two; torch tells each tensor's shape, and what lies
between the two runs is a layer's. So recomputation, packing masks, the tiled loss and an architecture's own ways
count.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from mica_ds.loss import TILE_ON_CPU, tile_loss, trains
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


def count_footprint(model: ModelSettings, adapter: AdapterSettings, batch: Batch, tile: int = TILE_ON_CPU) -> Footprint:
    """Count what a micro-batch takes, the logits of a tile among it. Local; a second or two, whatever the model's size.

    Raises: UserError.
    """
    depth = read_model_config(model.path).get_text_config().num_hidden_layers
    counted = [_count_layers(model, adapter, batch, layers) for layers in range(1, min(depth, 2) + 1)]
    more = depth - len(counted)
    kept, backward = (last + more * (last - first) for first, last in zip(counted[0], counted[-1], strict=True))
    return Footprint(kept, _count_loss(model, adapter, batch, tile) - counted[0][0], max(0, backward - kept))


def _count_layers(settings: ModelSettings, adapter: AdapterSettings, batch: Batch, layers: int) -> tuple[int, int]:
    """Bytes that a model with so many layers keeps up to its head, and has at most in the backward from there."""
    model = _first_layers(settings, adapter, batch, layers)
    hidden: list[torch.Tensor] = []
    with _without_data(model):

        def stop(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden.append(inputs[0])
            raise _AtHeadError

        model.get_output_embeddings().register_forward_pre_hook(stop)
        with _Live(model) as live:
            with suppress(_AtHeadError):
                model(**_inputs(batch), use_cache=False)
            kept, live.peak = live.now, live.now
            last = hidden.pop()
            gradient = torch.empty_like(last)
            last.backward(gradient)
    return kept, live.peak


def _count_loss(settings: ModelSettings, adapter: AdapterSettings, batch: Batch, tile: int) -> int:
    """Bytes that a model of one layer has at most from its head to its loss, and back."""
    model = _first_layers(settings, adapter, batch, 1)
    with _without_data(model):
        tile_loss(model, tile)

        def begin(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            handle.remove()
            live.peak = live.now

        handle = model.get_output_embeddings().register_forward_pre_hook(begin)
        with _Live(model) as live:
            loss = model(**_inputs(batch), use_cache=False).loss
            if trains(model.get_output_embeddings()):  # else the gradient is made with the loss
                loss.backward()
    return live.peak


class _AtHeadError(Exception):
    """The forward has come to the output head."""


def _first_layers(settings: ModelSettings, adapter: AdapterSettings, batch: Batch, layers: int) -> Any:
    """The first layers of the model with its adapter, as it trains, on the meta device."""
    whole = copy.deepcopy(read_model_config(settings.path))
    text = whole.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(whole, dtype=DTYPES[settings.dtype], trust_remote_code=False)
    model = adapter_skeleton(model, target_modules(model, adapter), adapter)
    if batch.is_recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


@contextmanager
def _without_data(model: nn.Module) -> Iterator[None]:
    """Let a model on the meta device, and what is made in the body, be on the host, but without data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        _move(model)
        yield


def _move(model: nn.Module) -> None:
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
    """Adds up the storages that operations make, but the model's own, until they are freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        weights = [*model.parameters(), *model.buffers()]
        self._outside = {tensor.untyped_storage()._cdata for tensor in weights}
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
