"""How much of the weights DeepSpeed holds whole at a time: its own rules, followed through one micro-batch.

ZeRO-3's coordinator (0.19.8) gathers a module's parameters before its forward and its backward, with as many ahead as
the prefetch bucket takes, and lets go of them unless they are used again within the reuse distance.
"""

from collections import deque
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mica_ds.footprint import Footprint

_GLOO_THREADS = 2


@dataclass(frozen=True)
class Gathering:
    """What DeepSpeed's JSON and the ranks say about it. Sizes in elements."""

    max_live: int
    max_reuse: int
    prefetch: int
    is_sharded: bool
    """Whether there are several ranks: then parts arrive in a buffer, and are copied from it."""
    is_copied: bool
    """Whether a gathered parameter is more than its own partition: there are several ranks, or it was offloaded."""
    by_gloo: bool
    """Whether the ranks gather on the host: gloo collects in memory of its own first, some at a time."""


@dataclass(frozen=True)
class Moment:
    """What one rank has live besides its partitions, in bytes."""

    gathered: int
    activations: int
    logits: int
    layer: int

    @property
    def total(self) -> int:
        return self.gathered + self.activations + self.logits + self.layer


@dataclass(frozen=True)
class Passage:
    """A micro-batch from beginning to end."""

    forward: Moment
    """When most is live in a training step's forward, up to the loss."""
    loss: Moment
    """The same while the loss is made."""
    backward: Moment
    """The same after it."""
    evaluating: int
    """Bytes of gathered weights at most, of a forward without a backward."""
    moved: int
    """Elements gathered by one training step."""


def pass_through(
    model: Any, footprint: Footprint, rules: Gathering, itemsize: int, is_recomputed: bool, persistent: set[int]
) -> Passage:
    """Follow a micro-batch through a model (on the meta device). Local.

    `persistent`: the ids of parameters that stay whole, and are not gathered.
    """
    head = _own(model.get_output_embeddings(), persistent)
    groups = _groups(model, persistent)
    body = [module for _, group in groups for module in group]
    backward = [
        module
        for is_layer, group in reversed(groups)
        for module in ([*group] if is_recomputed and is_layer else []) + [*reversed(group)]
    ]
    trace = [*body, head, head, *backward]
    live, moved = _follow(trace, rules)
    number = len(body)
    moments: dict[str, list[Moment]] = {"forward": [], "loss": [], "backward": []}
    for step, elements in enumerate(live):
        gathered, done = elements * itemsize, step - number - 2
        if step < number:
            moments["forward"].append(Moment(gathered, footprint.activations * (step + 1) // number, 0, 0))
        elif done < 0:
            moments["loss"].append(Moment(gathered, footprint.activations, footprint.logits, 0))
        else:
            left = footprint.activations * (len(backward) - done) // len(backward)
            moments["backward"].append(Moment(gathered, left, 0, footprint.layer))
    peaks = {stage: max(found, key=lambda moment: moment.total) for stage, found in moments.items()}
    evaluating = max(_follow([*body, head], rules)[0])
    return Passage(**peaks, evaluating=evaluating * itemsize, moved=moved)


def _own(module: nn.Module, persistent: set[int]) -> dict[int, int]:
    """The elements of a module's own parameters, by their ids."""
    return {id(p): p.numel() for p in module.parameters(recurse=False) if id(p) not in persistent}


def _groups(model: Any, persistent: set[int]) -> list[tuple[bool, list[dict[int, int]]]]:
    """The own parameters of all modules but the head, in groups, and whether each is one that may be recomputed."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    layer_of = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
    others = [module for module in model.modules() if module is not model.get_output_embeddings()]
    found = []
    for layer, group in groupby(others, key=lambda module: layer_of.get(id(module))):
        found.append((layer is not None, [own for module in group if (own := _own(module, persistent))]))
    return found


def _follow(trace: list[dict[int, int]], rules: Gathering) -> tuple[list[int], int]:
    """The most elements that are live at each step of a trace, and how many were gathered in all."""
    used: dict[int, deque[int]] = {}
    for step, module in enumerate(trace):
        for key in module:
            used.setdefault(key, deque()).append(step)
    before = [0, *accumulate(sum(module.values()) for module in trace)]
    queue = deque((step, key, size) for step, module in enumerate(trace) for key, size in module.items())
    available: dict[int, int] = {}
    flying: list[dict[int, int]] = []
    live, moved = [], 0

    def now() -> int:
        if not rules.is_copied:
            return 0
        groups = sorted((sum(group.values()) for group in flying), reverse=True) if rules.is_sharded else []
        at_work = sum(groups[:_GLOO_THREADS]) if rules.by_gloo else 0
        return sum(available.values()) + sum(groups) + at_work

    def start(group: dict[int, int]) -> None:
        nonlocal moved
        if group:
            flying.append(group)
            moved += sum(group.values())

    skipped: dict[int, int] = {}
    for step, module in enumerate(trace):
        in_flight = {key for group in flying for key in group}
        start({key: size for key, size in module.items() if key not in available and key not in in_flight})
        most = now()
        for group in [group for group in flying if group.keys() & module.keys()]:
            available |= group
            most = max(most, now())  # the buffer goes once all of it is copied
            flying.remove(group)
        while queue and queue[0][0] <= step:
            queue.popleft()
        in_flight = {key for group in flying for key in group}
        room = min(
            rules.max_live - sum(available.values()) - sum(sum(group.values()) for group in flying), rules.prefetch
        )
        ahead: dict[int, int] = {}
        while queue and sum(ahead.values()) < room:
            later, key, size = queue.popleft()
            skipped[key] = max(skipped.get(key, -1), later)
            if key not in available and key not in in_flight:
                ahead[key] = size
        start(ahead)
        live.append(max(most, now()))
        for key in module:
            used[key].popleft()
            again = used[key][0] if used[key] else None
            is_near = again is not None and before[again] - before[step + 1] < rules.max_reuse
            if not is_near and skipped.get(key, -1) <= step:
                available.pop(key, None)
    return live, moved
