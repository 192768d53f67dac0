"""Fingerprints of weights: the same for every cut and number of ranks, since the slices' sums add up."""

import functools
import hashlib

import torch
from torch import nn

from mica_ds import comm
from mica_ds.shards import Matrix, full_shape, own_slice

WEIGHTS = "model.path (fingerprint of its weights)"
"""The key under which a checkpoint names the base model that it belongs to."""


def describe(matrix: Matrix, dtype: torch.dtype, total: int) -> str:
    """The fingerprint of a whole matrix, from the sum over all its elements. Local."""
    return hashlib.sha256(f"{matrix.name} {matrix.stored_shape} {dtype} {total}".encode()).hexdigest()


def fingerprint_model(model: nn.Module) -> str:
    """The fingerprint of a partitioned model's parameters, each rank reading its own slices once. Collective."""
    labels, sums = [], []
    for name, parameter in model.named_parameters():
        start, values = own_slice(parameter)
        labels.append(label(name, full_shape(parameter), values.dtype))
        sums.append(mixed_sum(values, start))
    return fingerprint_parameters(labels, torch.stack(sums))


def fingerprint_parameters(labels: list[str], sums: torch.Tensor) -> str:
    """The same from each rank's sums over what it has read, one a parameter (int64), and the labels. Collective."""
    totals = comm.sum_(sums).tolist()
    return hashlib.sha256(repr(list(zip(labels, totals, strict=True))).encode()).hexdigest()


def label(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """What a fingerprint says of a parameter besides its values. Local."""
    return f"{name} {shape} {dtype}"


def mixed_sum(values: torch.Tensor, start: int) -> torch.Tensor:
    """A sum, modulo 2⁶⁴, of each element's bits times an odd weight of its place in the whole matrix. Local."""
    integers = {2: torch.int16, 4: torch.int32}[values.element_size()]
    weights = _weights().to(values.device)
    at_once = 1 if values.device.type == "cpu" else 256  # a core's cache holds one row, and is as fast with no more
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    done = 0
    while done < len(values):
        row, place = divmod(start + done, len(weights))
        rows = min(at_once, (len(values) - done) // len(weights)) if place == 0 else 0
        end = done + (rows * len(weights) if rows else len(weights) - place)
        bits = values[done:end].view(integers).view(max(rows, 1), -1)
        sums = (bits * weights[place : place + bits.shape[1]]).sum(dim=1)
        total += (sums * _mix(torch.arange(row + 1, row + 1 + len(sums), device=values.device))).sum()
        done += bits.numel()
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
