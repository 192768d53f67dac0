"""The training loss of a causal language model without its logits whole: some tokens at a time.

At 128k words of vocabulary the fp32 logits of one sequence of 8192 tokens take 4 GiB, and their gradient as much again.
DeepSpeed's TiledFusedLogitsLoss computes the loss and its gradient tile by tile, under ZeRO-3 and on any device.
"""

import math
from typing import Any

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
from torch import nn
from transformers import PreTrainedModel

# Logits of a tile. On a CPU 28 MiB in fp32: for 32 MiB and more glibc takes new pages each time (measured: tiles of
# 64 MiB take 20 % longer, and much smaller ones, too).
TILE_ON_CPU, TILE_ON_GPU = 7 << 20, 1 << 24
_IGNORED = -100  # the label of tokens that are not predicted, as in transformers


class _TiledHead(nn.Linear):
    """An output head that hands its input on while training: the loss asks for the logits of a tile at a time."""

    def forward(self, hidden: torch.Tensor, for_loss: bool = False) -> torch.Tensor:
        return super().forward(hidden) if for_loss or not self.training else hidden


def tile_loss(model: Any, tile: int) -> bool:
    """Let a model with a frozen output head make its training loss by tiles of so many logits; whether it does. Local.

    Left alone are a head that trains (DeepSpeed reduces the gradient of a tied weight once, but the loss and the
    embedding would each give it one), one with an adapter, and a model that bends its logits after the head.
    """
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    head = base.get_output_embeddings()
    settings = base.config.get_text_config().to_dict()  # `final_logit_softcapping`, `logits_soft_cap`, …
    bends_logits = any(value for key, value in settings.items() if "logit" in key and "cap" in key)
    if type(head) is not nn.Linear or head.weight.requires_grad or bends_logits:
        return False
    head.__class__ = _TiledHead  # keeps ZeRO-3's hooks and the parameter's name
    base.loss_function = _TiledLoss(head, tile)
    return True


class _TiledLoss:
    """Stands in for transformers' ForCausalLMLoss, with what a `_TiledHead` handed on instead of logits."""

    def __init__(self, head: nn.Linear, tile: int) -> None:
        self._head, self._tile = head, tile

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
        if not self._head.training:
            whole = logits.float().flatten(0, -2)
            return nn.functional.cross_entropy(whole, shift_labels.flatten(), ignore_index=_IGNORED)
        count = num_items_in_batch if num_items_in_batch is not None else shift_labels.ne(_IGNORED).sum()

        def loss_of_tile(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            tile = head(hidden, for_loss=True).float()
            return nn.functional.cross_entropy(tile, targets, ignore_index=_IGNORED, reduction="sum") / count

        tiles = math.ceil(shift_labels.numel() * vocab_size / self._tile)
        trainable: list[nn.Parameter] = []
        # Each tile goes forwards and backwards within: activations that are offloaded would take the head with them.
        # The cycle that PyTorch warns of, of what is saved as it is, ends with the tile's own backward pass.
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return TiledFusedLogitsLoss.apply(
                loss_of_tile, self._head, logits, shift_labels.contiguous(), None, tiles, trainable, "sum"
            )
