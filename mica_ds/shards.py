"""ZeRO-3 partitions as `Shard`s, read and filled. The only module that touches DeepSpeed's `ds_*` attributes.

DeepSpeed flattens a parameter, pads it to a multiple of the ranks and gives each rank one contiguous slice, which cuts
rows anywhere. The padding is uninitialised memory, so nothing here reads beyond `ds_numel`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Shard:
    """This rank's slice of one weight matrix."""

    name: str
    """Name of the module that holds the weight."""
    stored_shape: tuple[int, int]
    """The shape in which the weight is stored, flattened and sliced."""
    is_transposed: bool
    """Whether it is stored as (in, out), as transformers' Conv1D does."""
    values: torch.Tensor
    """The slice: 1-D, in the compute dtype, on the CPU, without padding; it may be the partition's own memory."""
    bounds: list[int]
    """Rank p holds the elements from bounds[p] up to bounds[p + 1] of the flattened weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.stored_shape
        return (columns, rows) if self.is_transposed else (rows, columns)


def linear_modules(model: Any) -> dict[str, nn.Module]:
    """The linear modules of a model by name, without its output head: what peft's `all-linear` means. Local."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def weight_shape(module: Any) -> tuple[int, int]:
    """(out, in) of a partitioned linear module. Local."""
    rows, columns = module.weight.ds_shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def read_shard(name: str, module: nn.Module) -> Shard:
    """This rank's slice of a linear module's weight, copied to the CPU where it lies elsewhere. Local."""
    weight: Any = module.weight
    bounds = _bounds(weight)
    rank = weight.ds_zero_partition_rank
    with _partition_in_memory(weight) as partition:
        values = partition[: bounds[rank + 1] - bounds[rank]]
        # NVMe partitions pass through a few shared buffers, which the next one overwrites.
        values = values.to("cpu", copy=hasattr(weight, "nvme_swapper"))
    return Shard(name, tuple(weight.ds_shape), isinstance(module, Conv1D), values, bounds)


def fill_partition(parameter: Any, read: Callable[[int, int], torch.Tensor]) -> None:
    """Overwrite this rank's slice of a parameter with `read(start, stop)` of the flattened whole. Local.

    Under hierarchical partitioning (`zero_hpz_partition_size`) the node's second copy is renewed from the slices: then
    this is collective, and moves the parameter once.
    """
    bounds = _bounds(parameter)
    rank = parameter.ds_zero_partition_rank
    start, stop = bounds[rank], bounds[rank + 1]
    with _partition_in_memory(parameter, write_back=True) as partition:
        if stop > start:
            partition[: stop - start].copy_(read(start, stop))
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        parameter.all_gather([parameter])
        parameter.partition([parameter], has_been_updated=True)


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole of a partitioned parameter. Local."""
    return tuple(parameter.ds_shape)


def _bounds(parameter: Any) -> list[int]:
    size = parameter.ds_tensor.ds_numel
    ranks = parameter.ds_zero_partition_world_size
    return [min(rank * size, parameter.ds_numel) for rank in range(ranks + 1)]


@contextmanager
def _partition_in_memory(parameter: Any, write_back: bool = False) -> Iterator[torch.Tensor]:
    """This rank's slice with its padding, fetched from NVMe for the duration where it lies there."""
    partition = parameter.ds_tensor
    is_on_nvme = partition.status == PartitionedParamStatus.NOT_AVAILABLE
    if is_on_nvme:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    yield partition.data
    if is_on_nvme and write_back:
        parameter.nvme_swapper.swap_out_and_release([parameter])
    elif is_on_nvme:
        parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
