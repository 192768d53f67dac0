"""Fingerprints of weights: the same for every cut and number of ranks, since the slices' sums add up."""

import functools
import hashlib

import torch
from torch import nn

from mica_ds import comm
from mica_ds.shards import Matrix, full_shape, own_slice


def describe(matrix: Matrix, dtype: torch.dtype, total: int) -> str:
    """The fingerprint of a whole matrix, from the sum over all its elements. Local."""
    return hashlib.sha256(f"{matrix.name} {matrix.stored_shape} {dtype} {total}".encode()).hexdigest()


def fingerprint_model(model: nn.Module) -> str:
    """The fingerprint of a partitioned model's parameters, each rank reading its own slices once. Collective."""
    names, sums = [], []
    for name, parameter in model.named_parameters():
        start, values = own_slice(parameter)
        names.append(f"{name} {full_shape(parameter)} {values.dtype}")
        sums.append(mixed_sum(values, start))
    totals = comm.sum_(torch.stack(sums)).tolist()
    return hashlib.sha256(repr(list(zip(names, totals, strict=True))).encode()).hexdigest()


def mixed_sum(values: torch.Tensor, start: int) -> torch.Tensor:
    """A sum, modulo 2⁶⁴, of each element's bits times an odd weight of its place in the whole matrix. Local."""
    integers = {2: torch.int16, 4: torch.int32}[values.element_size()]
    weights = _weights()
    total = torch.zeros((), dtype=torch.int64)
    done = 0
    while done < len(values):
        chunk, place = divmod(start + done, len(weights))
        bits = values[done : done + len(weights) - place].view(integers)
        done += len(bits)
        total += (bits * weights[place : place + len(bits)]).sum() * _mix(torch.tensor(chunk + 1))
    return total


@functools.cache
def _weights() -> torch.Tensor:
    return _mix(torch.arange(1, 1 + (1 << 16)))


def _mix(numbers: torch.Tensor) -> torch.Tensor:
    """Odd pseudo-random 64-bit integers (splitmix64)."""
    mixed = numbers * -7046029254386353131
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return mixed | 1
