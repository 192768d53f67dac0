"""Whether a model keeps the documents of a packed sequence apart: known beforehand, or seen on the model itself."""

import torch
from torch import nn

from mica_ds import comm
from mica_ds.config import Config
from mica_ds.errors import UserError

_TOKENS = 8  # of each of two documents
_LEAK = 1e-4  # of the largest logit; what a mask hides adds exactly nothing


def check_packing(config: Config) -> None:
    """Refuse what is known to mix packed documents. Local. Raises: UserError."""
    rows = config.train.get("per_device_train_batch_size", 1)
    if config.data.pack and rows > 1 and config.model.attention.startswith("flash_attention"):
        # transformers (5.23) looks at the positions only there, `_is_packed_sequence`.
        raise UserError(
            f"data.pack: with model.attention={config.model.attention} the documents of a sequence are kept apart only "
            "where a micro-batch is one sequence: set train.per_device_train_batch_size=1 and a longer "
            "data.sequence_length, or data.pack=false"
        )


@torch.no_grad()
def check_separation(model: nn.Module, config: Config) -> None:
    """Refuse packing where this model, with the attention in use, lets a document see the one before it. Collective.

    Shows it two micro-batches that differ in the first document of each row alone: what it says of the second document
    must be the same. `use_cache` is left to the model's config, as in training. Two forwards of 16 tokens a row.
    Raises: UserError.
    """
    if not config.data.pack or config.data.sequence_parallel > 1:  # `check_parallelism` has judged the latter
        return
    device, rows = next(model.parameters()).device, config.train.get("per_device_train_batch_size", 1)
    positions = torch.arange(_TOKENS, device=device).repeat(rows, 2)
    second = torch.arange(_TOKENS, 2 * _TOKENS, device=device)
    was_training = model.training
    model.eval()
    said = []
    for first in (torch.arange(_TOKENS, device=device), torch.arange(_TOKENS, device=device).flip(0)):
        ids = torch.cat([first, second]).repeat(rows, 1)
        said.append(model(input_ids=ids, position_ids=positions).logits[:, _TOKENS:].float())
    model.train(was_training)
    with comm.failing_together():
        if (said[0] - said[1]).abs().max() > _LEAK * said[0].abs().max():
            raise UserError(
                f"data.pack: with this model and model.attention={config.model.attention}, a document of a packed "
                "sequence sees the one before it; set data.pack=false"
            )
