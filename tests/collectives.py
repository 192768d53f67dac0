"""What crosses between ranks, counted where torch dispatches it, whichever library asks for it."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "broadcast", "other")


class Collectives(TorchDispatchMode):
    """Counts the collectives of all libraries where torch dispatches them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.replace("_", "")
            kind = next((kind for kind in KINDS if kind.replace("-", "") in name), "other")
            sides = ([leaf.nbytes for leaf in tree_leaves(side) if torch.is_tensor(leaf)] for side in args[:2])
            self.calls[kind] += 1
            self.bytes[kind] += max(map(sum, sides))
        return func(*args, **(kwargs or {}))
