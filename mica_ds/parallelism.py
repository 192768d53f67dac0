"""Sequence parallelism: the ranks of a group share each sequence, by DeepSpeed's Ulysses through accelerate.

Attention swaps sequence for heads between them (two all-to-alls a layer); all else works on a part of the sequence.
"""

from typing import Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig

from mica_ds import comm
from mica_ds.config import Config, read_deepspeed
from mica_ds.errors import UserError


def parallelism(config: Config) -> ParallelismConfig | None:
    """What accelerate wants to know; None where each rank has its own sequences. Local."""
    size = config.data.sequence_parallel
    if size == 1:
        return None
    handler = DeepSpeedSequenceParallelConfig(
        sp_seq_length=config.data.sequence_length,
        sp_seq_length_is_variable=False,
        sp_attn_implementation="sdpa" if config.model.attention == "auto" else config.model.attention,
    )
    return ParallelismConfig(sp_size=size, sp_backend="deepspeed", sp_handler=handler)


def check_parallelism(config: Config, model_config: Any) -> None:
    """Refuse what Ulysses cannot divide, or would compute wrongly. Local, after `comm.start`. Raises: UserError."""
    size = config.data.sequence_parallel
    if size == 1:
        return
    text = model_config.get_text_config()
    heads, key_value_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", text.num_attention_heads)
    for number, what in (
        (comm.world_size(), "ranks"),
        (config.data.sequence_length, "tokens of data.sequence_length"),
        (heads, "attention heads of the model"),
    ):
        if number % size:
            raise UserError(f"data.sequence_parallel={size} does not divide the {number} {what}")
    if key_value_heads % size and size % key_value_heads:
        raise UserError(
            f"data.sequence_parallel={size} and the model's {key_value_heads} key-value heads do not divide"
        )
    if not read_deepspeed(config)["zero_optimization"].get("reduce_scatter", True):
        # DeepSpeed (0.19.8) scales gradients by the size of the group there, and only there.
        raise UserError(f"{config.deepspeed}: data.sequence_parallel needs reduce_scatter, which is its default")
    if config.data.pack and config.model.attention in ("auto", "sdpa"):
        # DeepSpeed (0.19.8) drops the mask, and sdpa does not look at the positions.
        raise UserError(
            "data.pack: with data.sequence_parallel, sdpa would let the documents of a sequence see one another; "
            "set data.pack=false, or model.attention=flash_attention_2 on GPUs"
        )


def token_loss(local: torch.Tensor) -> torch.Tensor:
    """The loss that gives DeepSpeed the right gradient, with the value of the whole micro-batch. Collective.

    `local` is this rank's summed loss over the number of tokens of the whole step: what the ranks' losses, and so their
    gradients, must add up to. DeepSpeed (0.19.8, with `reduce_scatter`) averages the gradients of all ranks instead.
    """
    share = local * comm.world_size()
    whole = comm.sum_(local.detach().float().cpu().view(1)).to(local)[0]
    return share + (whole - share).detach()
