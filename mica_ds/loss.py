"""The training loss of a causal language model without its logits whole: some tokens at a time.

At 128k words of vocabulary the fp32 logits of one sequence of 8192 tokens take 4 GiB, and their gradient as much again.
DeepSpeed's TiledFusedLogitsLoss computes the loss and its gradient tile by tile, under ZeRO-3 and on any device. Of a
head that trains, PyTorch's checkpoints keep the hidden states alone and make each tile's logits again in the backward:
there its gradient comes once, as DeepSpeed needs it of a weight that is tied to the embedding.
"""

import math
from typing import Any

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Logits of a tile. On a CPU 28 MiB in fp32: for 32 MiB and more glibc takes new pages each time (measured: tiles of
# 64 MiB take 20 % longer, and much smaller ones, too). On a GPU as many as keep it busy (measured on an H200).
TILE_ON_CPU, TILE_ON_GPU = 7 << 20, 1 << 26
# Of a head that trains: its gradient is the sum of theirs, in its dtype (bfloat16: a third less exact than at once).
_MOST_TILES = 8
_IGNORED = -100  # the label of tokens that are not predicted, as in transformers
_CAPPED = ("gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "nanochat", "vaultgemma")
"""Models that cap their logits after the head, but not where `final_logit_softcapping` is None (transformers 5.23)."""


def tile_loss(model: Any, tile: int) -> bool:
    """Let a model make its training loss by tiles of so many logits; whether it does. Local.

    The head then hands its input on while training, for which the loss asks it for the logits of a tile at a time; it
    caps them itself where its model would. Left alone are models whose config names another cap of logits.
    """
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    head: Any = base.get_output_embeddings()
    settings = base.config.get_text_config()
    caps = {key: value for key, value in settings.to_dict().items() if "logit" in key and "cap" in key and value}
    cap = caps.pop("final_logit_softcapping", None) if base.config.model_type in _CAPPED else None
    if head is None or any("att" not in key for key in caps):  # attention's own are within a layer
        return False
    if cap is not None:
        settings.final_logit_softcapping, settings.head_caps_at = None, cap
    whole = head.forward

    def forward(hidden: torch.Tensor, for_loss: bool = False) -> torch.Tensor:
        if head.training and not for_loss:
            return hidden
        logits: torch.Tensor = whole(hidden)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    head.forward = forward
    base.loss_function = _TiledLoss(head, tile)
    return True


def trains(head: nn.Module) -> bool:
    """Whether an output head has parameters that train, its own or an adapter's. Local."""
    return any(parameter.requires_grad for parameter in head.parameters())


class _TiledLoss:
    """Stands in for transformers' ForCausalLMLoss, with what the head handed on instead of logits."""

    def __init__(self, head: nn.Module, tile: int) -> None:
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

        def loss_of_tile(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            tile = head(hidden, for_loss=True).float()
            return nn.functional.cross_entropy(tile, targets, ignore_index=_IGNORED, reduction="sum") / count

        tiles = math.ceil(shift_labels.numel() * vocab_size / self._tile)
        if trains(self._head):
            tiles = min(tiles, _MOST_TILES)
            parts = zip(logits.flatten(0, 1).chunk(tiles), shift_labels.flatten().chunk(tiles), strict=True)
            return sum(checkpoint(loss_of_tile, self._head, *part, use_reentrant=False) for part in parts)
        trainable: list[nn.Parameter] = []
        # Each tile goes forwards and backwards within: activations that are offloaded would take the head with them.
        # The cycle that PyTorch warns of, of what is saved as it is, ends with the tile's own backward pass.
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return TiledFusedLogitsLoss.apply(
                loss_of_tile, self._head, logits, shift_labels.contiguous(), None, tiles, trainable, "sum"
            )
