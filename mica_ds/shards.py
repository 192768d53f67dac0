"""Slices of weight matrices, from ZeRO-3's partitions or from a checkpoint's files, as the same `Shard`.

The only module that touches DeepSpeed's `ds_*` attributes. DeepSpeed flattens a parameter, pads it to a multiple of
the ranks and gives each rank one contiguous slice, which cuts rows anywhere. The padding is uninitialised memory, so
nothing here reads beyond `ds_numel`.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus
from torch import nn
from transformers.pytorch_utils import Conv1D

from mica_ds import comm
from mica_ds.weights import StoredTensor


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a model: a module's weight, or one expert of stacked ones."""

    name: str
    stored_shape: tuple[int, int]
    """The shape in which it is stored, flattened and sliced."""
    is_transposed: bool
    """Whether it is stored as (in, out), as transformers' Conv1D and embeddings are."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.stored_shape
        return (columns, rows) if self.is_transposed else (rows, columns)


@dataclass(frozen=True)
class Shard:
    """This rank's slice of one matrix."""

    matrix: Matrix
    bounds: list[int]
    """Rank p holds the elements from bounds[p] up to bounds[p + 1] of the flattened matrix."""
    read: Callable[[], torch.Tensor]
    """Returns the slice: 1-D, in the compute dtype, on the CPU; it may be the partition's own memory."""


class WeightSource(Protocol):
    """Where the weights come from."""

    matrices: list[Matrix]
    dtype: torch.dtype
    """Of the values that shards hold: the compute dtype."""
    is_sliced: bool
    """Whether each rank holds a slice of each matrix; else its owner has the whole."""

    def shard(self, index: int, owner: int) -> Shard:
        """This rank's slice of one matrix, which rank `owner` will solve. Local."""


class PartitionSource:
    """The weights of a model under ZeRO-3, in the ranks' memory, on their GPUs or on NVMe."""

    is_sliced = True

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.matrices = [matrix_of(name, module) for name, module in modules.items()]
        self._weights: list[Any] = [module.weight for module in modules.values()]
        self.dtype: torch.dtype = self._weights[0].dtype

    def shard(self, index: int, owner: int) -> Shard:
        """This rank's partition, whoever the owner is. Local."""
        weight = self._weights[index]
        return Shard(self.matrices[index], _bounds(weight), functools.partial(_read_partition, weight))


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix within a stored tensor, which holds several where experts are stacked."""

    matrix: Matrix
    tensor: StoredTensor
    offset: int = 0
    """Where it begins in the flattened tensor, in elements."""


class CheckpointSource:
    """The weights in a checkpoint's files: an owner reads the whole, so each byte is read once."""

    is_sliced = False

    def __init__(self, stored: list[StoredMatrix], dtype: torch.dtype) -> None:
        self.matrices = [entry.matrix for entry in stored]
        self._stored = stored
        self.dtype = dtype

    def shard(self, index: int, owner: int) -> Shard:
        """The whole matrix at its owner, nothing elsewhere. Local."""
        matrix = self.matrices[index]
        return Shard(matrix, whole_at(owner, matrix), functools.partial(self._read, self._stored[index], owner))

    def _read(self, entry: StoredMatrix, owner: int) -> torch.Tensor:
        if owner != comm.rank():
            return torch.empty(0, dtype=self.dtype)
        return entry.tensor.read(entry.offset, entry.offset + math.prod(entry.matrix.stored_shape)).to(self.dtype)


def whole_at(owner: int, matrix: Matrix) -> list[int]:
    """The bounds of a matrix that one rank holds whole. Local."""
    return [0 if rank <= owner else math.prod(matrix.stored_shape) for rank in range(comm.world_size() + 1)]


def target_candidates(model: Any) -> dict[str, nn.Module]:
    """The modules that an adapter may go on, by name: linear ones, the output head and embeddings among them. Local."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    }


def linear_modules(model: Any) -> dict[str, nn.Module]:
    """The linear modules without the output head: what peft's `all-linear` means. Local."""
    head = model.get_output_embeddings()
    candidates = target_candidates(model).items()
    return {name: module for name, module in candidates if not isinstance(module, nn.Embedding) and module is not head}


def stacked_experts(model: Any) -> dict[str, tuple[tuple[int, int, int], bool | None]]:
    """Parameters that stack a mixture's experts: (experts, rows, columns), and whether each is (in, out), None
    where the module does not say. Local."""
    return {
        f"{name}.{key}": (shape, getattr(module, "is_transposed", None))
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if len(shape := tuple(getattr(parameter, "ds_shape", parameter.shape))) == 3
    }


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a module, partitioned or not. Local."""
    return matrix_of("", module).shape


def matrix_of(name: str, module: nn.Module) -> Matrix:
    """The weight of a module. Local."""
    return Matrix(name, *_layout(module))


def _layout(module: Any) -> tuple[tuple[int, int], bool]:
    """The stored shape of a module's weight, and whether that is (in, out)."""
    shape = getattr(module.weight, "ds_shape", module.weight.shape)
    return (shape[0], shape[1]), isinstance(module, Conv1D | nn.Embedding)


def _read_partition(weight: Any) -> torch.Tensor:
    bounds, rank = _bounds(weight), weight.ds_zero_partition_rank
    with _partition_in_memory(weight) as partition:
        values = partition[: bounds[rank + 1] - bounds[rank]]
        # NVMe partitions pass through a few shared buffers, which the next one overwrites.
        return values.to("cpu", copy=hasattr(weight, "nvme_swapper"))


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


def own_slice(parameter: Any) -> tuple[int, torch.Tensor]:
    """Where this rank's slice of a parameter begins in the flattened whole, and the slice, on the CPU. Local."""
    return _bounds(parameter)[parameter.ds_zero_partition_rank], _read_partition(parameter)


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole of a parameter, partitioned or not. Local."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_size(parameter: Any) -> int:
    """The elements of the whole of a parameter, partitioned or not. Local."""
    return getattr(parameter, "ds_numel", parameter.numel())


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
