"""What a planned run trains, moves, waits for and leaves on disk."""

import math
from dataclasses import dataclass

from mica_ds import factor, schedule
from mica_ds.adapter import lora_parameters
from mica_ds.checks import checkpoint_bytes
from mica_ds.config import Config, copy_group
from mica_ds.model import DTYPES
from mica_ds.plan import Plan, basis_machine, skeleton
from mica_ds.shards import matrix_of


@dataclass(frozen=True)
class Costs:
    """Numbers of a whole run, in elements, bytes and seconds."""

    trained: int
    """Parameters that train."""
    lora: int
    """Parameters that LoRA would train on the same modules."""
    gathered: int
    """Bytes of weights that a rank receives in a step."""
    gathered_within_node: bool
    """Whether they come from the ranks of its own node alone."""
    reduced: int
    """Bytes of gradients that a rank receives in a step."""
    basis_moved: int
    """Bytes that all ranks receive for the bases, where the weights lie in partitions."""
    basis_seconds: float
    """For all bases, each rank a core of an AMD EPYC with AVX2; without communication."""
    checkpoint: int
    """Bytes of a checkpoint."""
    folder: int
    """Bytes of the run folder at most: checkpoints kept, the best and the one being written, bases and the export."""


def count_costs(config: Config, plan: Plan) -> Costs:
    """Follow from a plan what the run costs besides memory. Local."""
    _, modules, weights = skeleton(config)
    ranks, itemsize = plan.cluster.ranks, DTYPES[config.model.dtype].itemsize
    sources = copy_group(config, ranks) or ranks
    r, matrices = config.adapter.r, [matrix_of(*module) for module in modules.items()]
    checkpoint = checkpoint_bytes(config)
    lora = lora_parameters(modules, r)
    exported = itemsize * sum(weights.trained) if config.adapter.method == "full" else 4 * lora
    bases, moved, seconds = 0, 0, 0.0
    if config.adapter.method == "mica":
        bases = sum(4 * r * matrix.shape[0] for matrix in matrices)
        machine = basis_machine(config, plan.cluster, itemsize)
        asked = schedule.allowed_exchange(config.basis, config.adapter.subspace)
        may_share = schedule.may_share(config.basis, config.adapter.subspace)
        assignment = schedule.assign(matrices, r, machine, may_share)
        moved = sum(schedule.moved_bytes(matrices, assignment, r, machine, asked))
        works = schedule.rank_work(matrices, assignment, r, ranks)
        seconds = max(factor.seconds(work, factor.RATES) for work in works)
    return Costs(
        trained=sum(weights.trained),
        lora=lora,
        gathered=math.ceil(plan.passage.moved * itemsize * (sources - 1) / sources) * plan.accumulation,
        gathered_within_node=sources <= plan.cluster.ranks_per_node,
        reduced=math.ceil(sum(weights.trained) * itemsize * (ranks - 1) / ranks) * plan.accumulation,
        basis_moved=moved,
        basis_seconds=seconds,
        checkpoint=checkpoint,
        folder=(config.checkpoint.keep + 2) * checkpoint + bases + exported,
    )
