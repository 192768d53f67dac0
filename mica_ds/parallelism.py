"""Sequence parallelism: the ranks of a group share each sequence, by DeepSpeed's Ulysses through accelerate.

Attention swaps sequence for heads between them (two all-to-alls a layer); all else works on a part of the sequence.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from torch import nn
from transformers import AttentionInterface, default_data_collator
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mica_ds import comm
from mica_ds.config import Config, read_deepspeed
from mica_ds.errors import UserError
from mica_ds.model import load_skeleton

# Models whose masks say more than what comes before: DeepSpeed (0.19.8) drops them.
_OWN_MASKS = ("doge",)
# Kinds of layers that see some tokens alone, and the keys that say how many.
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def parallelism(config: Config) -> ParallelismConfig | None:
    """What accelerate wants to know; None where each rank has its own sequences. Local, after `comm.start`."""
    size = config.data.sequence_parallel
    if size == 1:
        return None
    handler = DeepSpeedSequenceParallelConfig(
        sp_seq_length=config.data.sequence_length,
        sp_seq_length_is_variable=False,
        sp_attn_implementation=_attention(config),
    )
    groups = comm.world_size() // size  # from which accelerate (1.15) counts the batch that it tells DeepSpeed
    return ParallelismConfig(sp_size=size, dp_shard_size=groups, sp_backend="deepspeed", sp_handler=handler)


def check_parallelism(config: Config) -> None:
    """Refuse what Ulysses cannot divide, or would compute wrongly. Local, after `comm.start`. Raises: UserError."""
    size = config.data.sequence_parallel
    if size == 1:
        return
    model: Any = load_skeleton(config.model)
    text = model.config.get_text_config()
    lacks_sdpa = _attention(config) == "sdpa" and not model._supports_sdpa
    if not hasattr(text, "num_key_value_heads") or lacks_sdpa or text.model_type in _OWN_MASKS:
        raise UserError(f"data.sequence_parallel: DeepSpeed cannot share the attention of {text.model_type} models")
    others = {*(getattr(text, "layer_types", None) or [])} - {"full_attention", *_WINDOWS}
    if others or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        # State spaces and linear attention: each rank would begin its part with an empty state.
        raise UserError(
            f"data.sequence_parallel: DeepSpeed shares attention alone, and {text.model_type} models have other layers"
        )
    window = _window(text)
    if _attention(config) == "sdpa" and window < config.data.sequence_length:
        # DeepSpeed (0.19.8) drops the mask, by which alone sdpa knows of it.
        raise UserError(
            f"data.sequence_parallel: with sdpa, layers of this model would see more than their window of {window} "
            f"tokens; set data.sequence_length={window} or less, or model.attention=flash_attention_2 on GPUs"
        )
    heads, key_value_heads = text.num_attention_heads, text.num_key_value_heads
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


def _window(text: Any) -> float:
    """How many tokens the layer with the shortest view sees."""
    kinds = getattr(text, "layer_types", None) or _WINDOWS
    sizes = [getattr(text, size, None) for kind, size in _WINDOWS.items() if kind in kinds]
    return min((size for size in sizes if size), default=math.inf)


def collator(config: Config) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
    """What makes a micro-batch of rows: of whole ones, or of this rank's part of each. Local, after `comm.start`."""
    size = config.data.sequence_parallel
    if size == 1:
        return default_data_collator
    # DeepSpeed (0.19.8) takes neighbouring ranks for a group.
    return functools.partial(_collate_part, part=comm.rank() % size, parts=size)


def _collate_part(rows: list[Any], part: int, parts: int) -> dict[str, torch.Tensor]:
    batch = default_data_collator(rows)
    # The label of a part's last token is the next part's first one: shifted before the cut.
    batch["shift_labels"] = nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    return {key: whole.chunk(parts, dim=1)[part].contiguous() for key, whole in batch.items()}


def share_batches(loader: Any, size: int) -> None:
    """Let the ranks of each group read the same micro-batches from accelerate's loader of all ranks. Local.

    DeepSpeed's own loader (0.19.8) lets each read others and swaps them, but it does not shuffle a later epoch, begins
    it with the end of the one before, and cannot skip what an earlier start of the run has seen.
    """
    sampler = loader.batch_sampler
    sampler.num_processes //= size
    sampler.process_index //= size


def unshared(config: Config) -> Config:
    """The config of ranks that share no sequence, which evaluation alone does on any number of them. Local."""
    return config.model_copy(update={"data": config.data.model_copy(update={"sequence_parallel": 1})})


def mask_evaluation(config: Config) -> None:
    """Let attention heed its mask again while a model evaluates: the answers to open questions are padded. Local.

    DeepSpeed's (0.19.8), which accelerate has put in the place of transformers' own, shares no sequence then, but drops
    the mask all the same; and in training it changes what a layer knows of its heads.
    """
    if config.data.sequence_parallel == 1:
        return
    name = _attention(config)
    shared, own = ALL_ATTENTION_FUNCTIONS[name], AttentionInterface._global_mapping[name]

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *args: Any, **more: Any
    ) -> Any:
        if module.training:
            return shared(module, query, key, value, mask, *args, **more)
        module.num_key_value_groups = query.shape[1] // key.shape[1]
        return own(module, query, key, value, mask, *args, **more)

    ALL_ATTENTION_FUNCTIONS[name] = attend


def _attention(config: Config) -> str:
    return "sdpa" if config.model.attention == "auto" else config.model.attention


def token_loss(local: torch.Tensor) -> torch.Tensor:
    """The loss that gives DeepSpeed the right gradient, with the value of the whole micro-batch. Collective.

    `local` is this rank's summed loss over the number of tokens of the whole step: what the ranks' losses, and so their
    gradients, must add up to. DeepSpeed (0.19.8, with `reduce_scatter`) averages the gradients of all ranks instead.
    """
    share = local * comm.world_size()
    whole = comm.sum_(local.detach().float().cpu().view(1)).to(local)[0]
    return share + (whole - share).detach()
