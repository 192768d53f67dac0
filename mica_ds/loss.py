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
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Logits of a tile. On a CPU 28 MiB in fp32: for 32 MiB and more glibc takes new pages each time (measured: tiles of
# 64 MiB take 20 % longer, and much smaller ones, too). On a GPU as many as keep it busy (measured on an H200).
TILE_ON_CPU, TILE_ON_GPU = 7 << 20, 1 << 26
# Of a head that trains: its gradient is the sum of theirs, in its dtype (bfloat16: a third less exact than at once).
_MOST_TILES = 8
_IGNORED = -100  # the label of tokens that are not predicted, as in transformers


def tile_loss(model: Any, tile: int) -> None:
    """Have a model make its training loss by tiles of so many logits. Local.

    While training, its head gives a stand-in for the logits, which notes what the model does to them (scales, caps,
    words cut off), and the loss does the same to each tile's. So that has to be done to each token alone.
    """
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    head: Any = base.get_output_embeddings()
    whole, vocabulary = head.forward, base.config.get_text_config().vocab_size
    loss = _TiledLoss(head, vocabulary, tile)

    def forward(hidden: torch.Tensor, for_loss: bool = False) -> Any:
        if for_loss or not head.training:
            return whole(hidden)
        return _StandIn((*hidden.shape[:-1], vocabulary))

    head.forward = forward
    # Before DeepSpeed's own hooks: to what they have seen belongs a backward of the head.
    head.register_forward_pre_hook(loss.keep, with_kwargs=True)
    base.loss_function = loss


def trains(head: nn.Module) -> bool:
    """Whether an output head has parameters that train, its own or an adapter's. Local."""
    return any(parameter.requires_grad for parameter in head.parameters())


class _StandIn(fx.Proxy):
    """In the logits' place: notes what is done to it in its node's graph. At first it has their shape, too."""

    __module__ = "builtins"  # of other outputs than tensors DeepSpeed (0.19.8) warns, which would have a backward

    def __init__(self, shape: tuple[int, ...]) -> None:
        graph = fx.Graph()
        super().__init__(graph.placeholder("logits"), GraphAppendingTracer(graph))
        self.shape = torch.Size(shape)


class _TiledLoss:
    """Stands in for transformers' ForCausalLMLoss, with what the head was given instead of logits."""

    def __init__(self, head: nn.Module, vocabulary: int, tile: int) -> None:
        self._head, self._vocabulary, self._tile = head, vocabulary, tile
        self._given: list[torch.Tensor] = []

    def keep(self, head: nn.Module, inputs: tuple[torch.Tensor], options: dict[str, Any]) -> None:
        """Keep what a model gives its head, a pre-forward hook's work: the loss comes next."""
        if head.training and not options:
            self._given = [*inputs]

    def __call__(
        self,
        logits: Any,
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
        hidden = self._given.pop()
        graph, nothing = logits.node.graph, nn.Module()
        graph.output(logits.node)

        def loss_of_tile(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            tile = fx.Interpreter(nothing, graph=graph).run(head(hidden, for_loss=True)).float()
            return nn.functional.cross_entropy(tile, targets, ignore_index=_IGNORED, reduction="sum") / count

        tiles = math.ceil(shift_labels.numel() * self._vocabulary / self._tile)
        if trains(self._head):
            tiles = min(tiles, _MOST_TILES)
            parts = zip(hidden.flatten(0, 1).chunk(tiles), shift_labels.flatten().chunk(tiles), strict=True)
            return sum(checkpoint(loss_of_tile, self._head, *part, use_reentrant=False) for part in parts)
        trainable: list[nn.Parameter] = []
        # Each tile goes forwards and backwards within: activations that are offloaded would take the head with them.
        # The cycle that PyTorch warns of, of what is saved as it is, ends with the tile's own backward pass.
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return TiledFusedLogitsLoss.apply(
                loss_of_tile, self._head, hidden, shift_labels.contiguous(), None, tiles, trainable, "sum"
            )
