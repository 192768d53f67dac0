"""Which errors are of memory, in the words of those who raise them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mica_ds.comm import PeerError
from mica_ds.config import load_config
from mica_ds.errors import UserError
from mica_ds.memory import explained

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: out of memory"),  # a pinned allocation's
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_is_one_sentence(error: Exception, tiny_config: Callable[..., Path]) -> None:
    with (
        pytest.raises(UserError, match=r"rank 0 .* ran out of memory while working"),
        explained(load_config(tiny_config())),
    ):
        raise error


def test_another_error_stays_what_it_is(tiny_config: Callable[..., Path]) -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"), explained(load_config(tiny_config())):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_another_ranks_lack_of_memory_is_not_this_ones(tiny_config: Callable[..., Path]) -> None:
    said = "rank 1 failed: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"
    with pytest.raises(PeerError, match="rank 1 failed"), explained(load_config(tiny_config())):
        raise PeerError(said)
