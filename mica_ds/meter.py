"""What a run costs while it trains: time, tokens, work and memory, over all ranks and nodes."""

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from mica_ds import comm
from mica_ds.shards import full_shape, full_size

# Dense operations a second in bf16 and in fp32, from NVIDIA's data sheets.
_PEAKS = {
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A10": (125e12, 31.2e12),
}
_MEGABYTE = 1_000_000  # as in MLflow's own system metrics


def peak_rss() -> int:
    """The most memory this process has had resident so far, in bytes. Local."""
    # Not getrusage, which counts what the program that started this one held before it gave way to it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def rss() -> int:
    """The memory that this process has resident now, in bytes. Local."""
    return psutil.Process().memory_info().rss


def flops_per_token(model: Any, sequence_length: int) -> float:
    """Operations that a model's training needs for a token, recomputed activations not counted. Local.

    2 a weight of a matrix forwards, 2 backwards, and 2 more for each that trains; attention has 12 a layer for each
    pair of a head's unit and token seen: Chowdhery et al., arXiv:2204.02311, appendix B.
    """
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    looked_up = tables - {id(head.weight)} if head else tables
    matrices = [p for p in model.parameters() if len(full_shape(p)) > 1 and id(p) not in looked_up]
    multiplied = sum(full_size(p) for p in matrices)
    trained = sum(full_size(p) for p in matrices if p.requires_grad)
    units = sum(_attention_units(layer) for layer in model.config.get_text_config().per_layer_config)
    return 4 * multiplied + 2 * trained + 12 * units * sequence_length


def _attention_units(layer: Any) -> int:
    """Of all heads of a layer, by its config; none in a state space model."""
    heads: int = getattr(layer, "num_attention_heads", 0)
    return heads and heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads)


class Meter:
    """Adds up what happens between two readings, on each rank."""

    def __init__(self, model: nn.Module, sequence_length: int) -> None:
        """Local."""
        self._flops_per_token = flops_per_token(model, sequence_length)
        self._dtype = next(model.parameters()).dtype
        self.tokens = 0
        """Predicted so far, over all ranks and starts of the run."""
        self._expected = 0
        self._clear()

    def _clear(self) -> None:
        self._steps, self._new_tokens = 0, 0
        self._seconds = {"step": 0.0, "data": 0.0}

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time what the body waits for its next samples. Local."""
        started = time.perf_counter()
        yield
        self._seconds["data"] += time.perf_counter() - started

    def expect(self, tokens: int) -> None:
        """The samples of the next step, over all ranks, have so many tokens to be predicted. Local."""
        self._expected = tokens

    def begin_step(self) -> None:
        """A step begins, and has its samples. Local."""
        self._started = time.perf_counter()

    def end_step(self) -> None:
        """A step is done. Local."""
        self._seconds["step"] += time.perf_counter() - self._started
        self._steps += 1
        self._new_tokens += self._expected
        self.tokens += self._expected

    def read(self) -> dict[str, float]:
        """Metrics of the steps since the last reading; then begin anew. To be called by all ranks; rank 0 gets them."""
        mine = {**self._seconds, "host": peak_rss(), "device": _device_memory(), "node": _node()}
        steps, tokens = max(self._steps, 1), self._new_tokens
        self._clear()
        ranks = comm.collect(mine)
        if not ranks:
            return {}
        # Of one rank: where one waits for data, the others wait for it inside of their steps.
        seconds = max(rank["step"] + rank["data"] for rank in ranks)
        flops = self._flops_per_token * tokens / max(seconds, 1e-9) / len(ranks)
        values = {
            "tokens": self.tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "step_seconds": seconds / steps,
            "data_wait_seconds": max(rank["data"] for rank in ranks) / steps,
            "tflops_per_rank": flops / 1e12,
        }
        if torch.cuda.is_available() and (peak := peak_flops(torch.cuda.get_device_name(), self._dtype)):
            values["mfu"] = flops / peak
        for key in ("host", "device"):
            most = [rank[key] for rank in ranks]
            if max(most):
                values |= {f"{key}_peak_bytes": max(most), f"{key}_peak_rank": most.index(max(most))}
        return values | {key: value for rank in ranks for key, value in rank["node"].items()}


def peak_flops(card: str, dtype: torch.dtype) -> float | None:
    """The most operations a second of a card, by its name in CUDA, in a dtype; None where that is not known. Local."""
    words = re.split("[ -]", card)
    model = next((word for word in words if word in _PEAKS), None)
    if model is None or (model != "A100" and {"PCIe", "NVL"} & set(words)) or "MIG" in words:
        return None  # a slower variant, or a part of a card
    bf16, fp32 = _PEAKS[model]
    if dtype == torch.bfloat16:
        return bf16
    return bf16 / 2 if torch.backends.cuda.matmul.fp32_precision == "tf32" else fp32


def _device_memory() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _node() -> dict[str, float]:
    """The load of this rank's GPU, and of its machine by the first rank there, as MLflow names its system metrics."""
    values: dict[str, float] = {}
    if torch.cuda.is_available():  # its own alone: to look at another would take memory there
        free, total = torch.cuda.mem_get_info()
        gpu = f"gpu_{torch.cuda.current_device()}_memory_usage"
        values = {f"{gpu}_megabytes": (total - free) / _MEGABYTE, f"{gpu}_percentage": 100 * (total - free) / total}
    if os.environ["LOCAL_RANK"] == "0":
        memory, network = psutil.virtual_memory(), psutil.net_io_counters()
        values |= {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "network_receive_megabytes": network.bytes_recv / _MEGABYTE,
            "network_transmit_megabytes": network.bytes_sent / _MEGABYTE,
        }
    return {f"system/{socket.gethostname()}/{key}": value for key, value in values.items()}
