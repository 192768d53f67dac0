"""The fp32 masters and the moments of a ZeRO-3 optimizer, on the device, on the CPU or on NVMe.

DeepSpeed (0.19.8) lays its slices of many parameters end to end in one flat tensor, a sub-group, which is also what it
swaps to NVMe. Its public `safe_*` functions know single parameters: each call reads a whole sub-group from the disk,
the optimizer's `step` is out of their reach, and there is nothing to set before the first step has made it. So this
module works on sub-groups, through attributes that are not public.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from mica_ds import comm
from mica_ds.shards import full_shape

MASTER = "model"
MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_step(engine: Any) -> int:
    """The steps that the optimizer has taken, which its bias correction counts; skipped ones are not among them.

    Local.
    """
    zero = engine.optimizer
    state = zero.optimizer.state.get(zero.fp32_partitioned_groups_flat[0], {})
    return int(state.get("step", 0))


def gather_states(engine: Any) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    """Each trainable parameter with its master and moments: whole, fp32, on the CPU of rank 0; elsewhere empty.

    Collective, to be exhausted by all ranks; each sends 12 bytes for an element of its slices.
    """
    zero = engine.optimizer
    for index, group in enumerate(zero.fp16_groups):
        with _in_memory(zero, index, write_back=False) as states:
            for parameter, place in _places(group):
                slices = torch.stack([flat[place].detach().cpu() for flat in states.values()])
                whole = _gather(slices, full_shape(parameter))
                yield parameter, dict(zip(states, whole, strict=True))


def fill_states(engine: Any, step: int, read: Callable[[Any, str, int, int], torch.Tensor]) -> None:
    """Set the optimizer's step, and this rank's slices of masters and moments to `read(parameter, key, start, stop)`.

    The working copies must hold the same values already, rounded to the compute dtype. Local.
    """
    zero, rank = engine.optimizer, comm.rank()
    for index, group in enumerate(zero.fp16_groups):
        with _in_memory(zero, index, write_back=True) as states:
            for parameter, place in _places(group):
                size, number = place.stop - place.start, math.prod(full_shape(parameter))
                start, stop = min(rank * size, number), min((rank + 1) * size, number)
                for key, flat in states.items():
                    part = flat.data[place]
                    part[stop - start :] = 0
                    if stop > start:
                        part[: stop - start].copy_(read(parameter, key, start, stop))
        state = zero.optimizer.state[zero.fp32_partitioned_groups_flat[index]]
        # torch's own Adam and AdamW count in a tensor, DeepSpeed's in an int.
        state["step"] = torch.tensor(float(step)) if isinstance(zero.optimizer, torch.optim.Adam) else step
    if isinstance(zero.optimizer, DeepSpeedCPUAdam):
        _count_up(zero.optimizer, step)


def _count_up(optimizer: Any, step: int) -> None:
    """Have DeepSpeed's Adam on the CPU make all steps up to one, on a number of no use; a second for 100,000 of them.

    It (0.19.8) keeps βᵗ in fp32, multiplied on at each step; told of a later step than the next, it takes a power
    instead. The two differ in their last bit, and so do 1 − β₂ᵗ, in the first steps from the fifth digit on, and all
    updates from those of a run that was not interrupted.
    """
    group, numbers = optimizer.param_groups[0], [torch.zeros(1) for _ in range(4)]
    settings = [group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"]]
    for number in range(1, step + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, number, *settings, *numbers)


@contextmanager
def _in_memory(zero: Any, index: int, write_back: bool) -> Iterator[dict[str, torch.Tensor]]:
    """A sub-group's flat master and moments, fetched from NVMe for the duration where they lie there."""
    is_on_nvme = zero._swappable_optimizer_subgroup(index)
    if is_on_nvme:
        zero._optimizer_states_and_gradient_swap_in(index)
    master = zero.fp32_partitioned_groups_flat[index]
    state = zero.optimizer.state[master]
    # The first step would make them, of zeros; and swapping out takes over what is new in the optimizer's state.
    moments = {key: state[key] if key in state else torch.zeros_like(master.data) for key in MOMENTS}
    if write_back:
        state.update(moments)
    yield {MASTER: master, **moments}
    if is_on_nvme and write_back:
        zero._optimizer_states_and_gradient_swap_out(index)
    elif is_on_nvme:
        zero._release_swap_buffers(index)


def _places(group: list[Any]) -> Iterator[tuple[Any, slice]]:
    """Where in the flat tensors of a sub-group this rank's slice of each parameter lies, its padding included."""
    start = 0
    for parameter in group:
        stop = start + parameter.partition_numel()
        yield parameter, slice(start, stop)
        start = stop


def _gather(slices: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(K, n) of each rank → (K, *shape) on rank 0, the padding cut off; elsewhere (K, 0)."""
    if not comm.is_main():
        comm.wait([comm.send(slices, to=0, tag=0)])
        return slices[:, :0]
    ranks = torch.empty(comm.world_size(), *slices.shape)
    ranks[0] = slices
    comm.wait([comm.receive(ranks[source], source, tag=0) for source in range(1, len(ranks))])
    whole = ranks.transpose(0, 1).reshape(len(slices), -1)
    return whole[:, : math.prod(shape)].reshape(-1, *shape)
