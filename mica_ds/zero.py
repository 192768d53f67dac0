"""What there is on a cluster, and where DeepSpeed puts what on it, by its settings and its rules (0.19.8)."""

import math
from dataclasses import dataclass
from typing import Any

from mica_ds.config import Config, copy_group, read_deepspeed
from mica_ds.model import DTYPES

# Share of a GPU's memory that can be used: torch's allocator keeps blocks that fit nothing (assumed, not measured).
_USABLE = 0.95
_DEFAULTS = {  # DeepSpeed's own
    "reduce_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_param_persistence_threshold": 1e5,
}


@dataclass(frozen=True)
class Cluster:
    """What there is: memory in bytes."""

    nodes: int
    ranks_per_node: int
    gpu_memory: int
    """Of each GPU; 0 where the ranks work on CPUs."""
    host_memory: int
    """Of each node."""
    nvme: int = 0
    """Of each node."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def device(self) -> str:
        """Where the ranks compute."""
        return "gpu" if self.gpu_memory else "host"

    def room(self, place: str) -> float:
        """Bytes that one rank may take there."""
        if place == "gpu":
            return _USABLE * self.gpu_memory
        return (self.host_memory if place == "host" else self.nvme) / self.ranks_per_node


class Zero:
    """What DeepSpeed's settings come to on a cluster. Local; reads its JSON."""

    def __init__(self, config: Config, cluster: Cluster, hidden: int) -> None:
        settings = read_deepspeed(config)["zero_optimization"]
        by_width = {  # what transformers (5.23) makes of `auto`
            "reduce_bucket_size": hidden**2,
            "stage3_prefetch_bucket_size": 0.9 * hidden**2,
            "stage3_param_persistence_threshold": 10 * hidden,
        }
        values = {key: settings.get(key, default) for key, default in _DEFAULTS.items()}
        self.values = {key: int(by_width[key] if value == "auto" else value) for key, value in values.items()}
        """Its thresholds and bucket sizes, in elements."""
        self.cluster, self.ranks, self.device = cluster, cluster.ranks, cluster.device
        self.itemsize = DTYPES[config.model.dtype].itemsize
        self.parameters = self._place(settings, "offload_param")
        """Where a rank's slices lie: `gpu`, `host` or `nvme`."""
        self.optimizer = self._place(settings, "offload_optimizer")
        """Where its masters and moments do."""
        self.swap = settings.get("offload_param", {})
        self.group = copy_group(config, cluster.ranks)
        """Ranks that share a second copy of the weights; 0 without any."""

    def _place(self, settings: dict[str, Any], section: str) -> str:
        device = settings.get(section, {}).get("device", "none")
        return {"none": self.device, "cpu": "host"}.get(device, device)

    def is_persistent(self, size: int) -> bool:
        """Whether DeepSpeed keeps a parameter whole on each rank."""
        return size <= self.values["stage3_param_persistence_threshold"]

    def partition(self, sizes: list[int], ranks: int, place: str) -> int:
        """Bytes of one rank's slices of parameters of these sizes; pinned, each takes a power of two (torch 2.13)."""
        slices = [self.itemsize * math.ceil(size / ranks) for size in sizes]
        is_pinned = place == "host" and self.device == "gpu"
        return sum(1 << (size - 1).bit_length() if is_pinned else size for size in slices)
