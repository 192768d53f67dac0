"""What a run will take on a given cluster, from `config.json` alone: the memory of each rank, stage by stage.

Sizes follow from the model's shapes, from DeepSpeed's settings and its rules (0.19.8), and from a micro-batch that runs
without data (`footprint`). What does not follow from these is a constant below, with where it comes from.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from mica_ds import factor, schedule
from mica_ds.adapter import adapter_skeleton, target_modules
from mica_ds.arguments import accumulation_steps
from mica_ds.config import AdapterSettings, Config, ModelSettings
from mica_ds.footprint import Batch, Footprint, count_footprint, micro_batch
from mica_ds.gathered import Gathering, Moment, Passage, pass_through
from mica_ds.loss import TILE_ON_CPU, TILE_ON_GPU
from mica_ds.model import load_skeleton
from mica_ds.shards import Matrix, matrix_of
from mica_ds.zero import Cluster, Zero

GIB, MIB = 1 << 30, 1 << 20
PROCESS = 640 * MIB
"""Python with its libraries and the tokenizer, before a model is loaded (measured)."""
_ENGINE = 104 * MIB  # DeepSpeed's engine, and modules loaded late, on the host (measured with 700 parameters)
_SCRATCH = 32 * MIB  # what MKL packs matrices into, and threads take, on ranks without a GPU (measured)
CONTEXT = 2 * GIB  # CUDA, cuBLAS and NCCL on a GPU (assumed, not measured)
_FP64_BUFFER = 32 * MIB  # the part of a matrix that the solver casts to fp64 at a time


@dataclass(frozen=True)
class Part:
    """What one rank has in memory for one purpose."""

    name: str
    place: str
    """`gpu`, `host` or `nvme`."""
    size: int


@dataclass(frozen=True)
class Plan:
    """What a run takes: bytes of one rank."""

    cluster: Cluster
    stages: dict[str, list[Part]]
    """What is in memory in each stage of a run when most is."""
    passage: Passage
    accumulation: int
    """Micro-batches of a step."""

    def need(self, place: str, stage: str) -> int:
        """Bytes that one rank takes in a place, at most."""
        return sum(part.size for part in self.stages[stage] if part.place == place)

    def worst(self, place: str) -> str:
        """The stage that takes the most there."""
        return max(self.stages, key=lambda stage: self.need(place, stage))

    @property
    def misfits(self) -> list[str]:
        """The places that do not suffice."""
        return [p for p in ("gpu", "host", "nvme") if self.need(p, self.worst(p)) > self.cluster.room(p)]


@dataclass(frozen=True)
class Weights:
    """A model with its adapter, by the elements of its parameters."""

    stored: list[int]
    """The base model's parameters, tied ones once."""
    head: int
    """The output head's, where it is tied: it has its own until it is tied to the embedding."""
    frozen: list[int]
    """What does not train, of the adapter."""
    trained: list[int]
    """What trains; with full fine-tuning the base model's."""


def make_plan(config: Config, cluster: Cluster) -> Plan:
    """Predict what a run takes. Local; seconds. Raises: UserError where model, targets or batch are not right."""
    accumulation = accumulation_steps(config, cluster.ranks)
    model, modules, weights = skeleton(config)
    tile = TILE_ON_GPU if cluster.device == "gpu" else TILE_ON_CPU
    footprint = _footprint(config.model.model_dump_json(), config.adapter.model_dump_json(), micro_batch(config), tile)
    zero = Zero(config, cluster, model.config.get_text_config().hidden_size)
    passage = _passage(config, model, footprint, zero)
    base = _partitions(zero, weights)
    stages = {"loading": base + _loading(zero, weights)}
    if config.adapter.method == "mica":
        stages["bases"] = base + _bases(config, zero, [matrix_of(*module) for module in modules.items()])
    engine = base + _adapter(zero, weights) + [Part("engine", "host", _ENGINE)]
    for stage, moment in (("forward", passage.forward), ("loss", passage.loss), ("backward", passage.backward)):
        stages[stage] = engine + _training(config, zero, weights, moment)
    stages["evaluating"] = engine + _evaluating(config, zero, passage, model.config.get_text_config().vocab_size)
    return Plan(
        cluster, {name: _merged(_constant(zero) + parts) for name, parts in stages.items()}, passage, accumulation
    )


def skeleton(config: Config) -> tuple[Any, dict[str, nn.Module], Weights]:
    """The model with its adapter on the meta device, the adapter's targets, and the sizes. Local; kept for the next."""
    return _skeleton(config.model.model_dump_json(), config.adapter.model_dump_json())


@functools.cache
def _skeleton(model_settings: str, adapter_settings: str) -> tuple[Any, dict[str, nn.Module], Weights]:
    adapter = AdapterSettings.model_validate_json(adapter_settings)
    model: Any = load_skeleton(ModelSettings.model_validate_json(model_settings))
    modules = target_modules(model, adapter)
    stored = {id(parameter) for parameter in model.parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight.numel() if head is not None and head.weight is embedding.weight else 0
    whole = adapter_skeleton(model, modules, adapter)
    sizes = [(id(parameter) in stored, parameter.requires_grad, parameter.numel()) for parameter in whole.parameters()]
    weights = Weights(
        [size for is_stored, trains, size in sizes if is_stored and not trains],
        tied,
        [size for is_stored, trains, size in sizes if not is_stored and not trains],
        [size for _, trains, size in sizes if trains],
    )
    return whole, modules, weights


@functools.cache
def _footprint(model: str, adapter: str, batch: Batch, tile: int) -> Footprint:
    return count_footprint(
        ModelSettings.model_validate_json(model), AdapterSettings.model_validate_json(adapter), batch, tile
    )


def _constant(zero: Zero) -> list[Part]:
    device = [Part("context", "gpu", CONTEXT)] if zero.device == "gpu" else []
    return [Part("process", "host", PROCESS), *device]


def _partitions(zero: Zero, weights: Weights) -> list[Part]:
    base = weights.stored or weights.trained
    name = "frozen partitions" if weights.stored else "partitions"
    parts = [Part(name, zero.parameters, zero.partition(base, zero.ranks, zero.parameters))]
    if zero.group:
        parts.append(Part("second copy (hpZ)", zero.parameters, zero.partition(base, zero.group, zero.parameters)))
    if zero.parameters == "nvme":
        buffers = int(zero.swap.get("buffer_count", 5)) * int(zero.swap.get("buffer_size", 1e8))
        parts.append(Part("NVMe buffers", "host", buffers * zero.itemsize))
    whole = sum(size for size in base if zero.is_persistent(size))
    return [*parts, Part("persistent parameters", zero.device, whole * zero.itemsize)]


def _loading(zero: Zero, weights: Weights) -> list[Part]:
    """A tied head's own memory, and the largest parameter: made whole and sent by rank 0, later read by its slice.

    What is made on a host and sent by nobody takes no room there: nothing has been written to it.
    """
    largest = max(weights.stored or weights.trained)
    head = zero.partition([weights.head], zero.ranks, zero.parameters) if weights.head else 0
    made = zero.itemsize * largest if zero.device == "gpu" or zero.ranks > 1 else 0
    pages = zero.itemsize * math.ceil(largest / zero.ranks)
    parts = [Part("untied head", zero.parameters, head)]
    if zero.device == "gpu" or made > pages:
        parts.append(Part("whole parameter", zero.device, made))
    if zero.device == "gpu" or pages >= made:
        parts.append(Part("pages of the files", "host", pages))
    return parts


def _bases(config: Config, zero: Zero, matrices: list[Matrix]) -> list[Part]:
    """The largest solve, and the slices that wait to be sent, where they do not lie on the host already."""
    machine = basis_machine(config, zero.cluster, zero.itemsize)
    r, asked = config.adapter.r, schedule.allowed_exchange(config.basis, config.adapter.subspace)
    shipped = [m for m in matrices if schedule.choose_route(m, r, machine, asked) == "ship"]
    solve = max((solve_bytes(matrix, r, zero.itemsize, matrix in shipped) for matrix in matrices), default=0)
    parts = [Part("basis engine", "host", solve)]
    if zero.parameters != "host" and zero.ranks > 1:
        waiting = sum(zero.itemsize * math.ceil(math.prod(m.shape) / zero.ranks) for m in shipped)
        parts.append(Part("slices to be sent", "host", waiting))
    return parts


def basis_machine(config: Config, cluster: Cluster, itemsize: int) -> schedule.Machine:
    """What the basis engine would find under ZeRO-3, with a core a rank. Local."""
    room, is_on_host = int(cluster.room("host")), cluster.device == "host" or config.basis.device == "cpu"
    return schedule.Machine(cluster.ranks, itemsize, room, is_sliced=True, is_on_host=is_on_host, threads=1)


def solve_bytes(matrix: Matrix, r: int, itemsize: int, is_whole: bool) -> int:
    """What an owner holds on its host to solve a matrix: W, what is factored, the blocks of the iteration. Local."""
    k, long = min(matrix.shape), max(matrix.shape)
    kind = factor.choose_factor(matrix.shape, r) if is_whole else "gram"
    factored = (4 if kind == "lu" else 8) * k * k  # of an fp32 Gram as of the fp64 one that may take over
    blocks = 8 * factor.block_width(r) * (2 * long + 16 * k)
    return (itemsize * k * long if is_whole else 0) + factored + blocks + _FP64_BUFFER


def _adapter(zero: Zero, weights: Weights) -> list[Part]:
    factors = [*weights.frozen, *(weights.trained if weights.stored else [])]
    return [Part("adapters", zero.parameters, zero.partition(factors, zero.ranks, zero.parameters))]


def _passage(config: Config, model: Any, footprint: Footprint, zero: Zero) -> Passage:
    offloads = zero.parameters != zero.device
    rules = Gathering(
        max_live=zero.values["stage3_max_live_parameters"],
        max_reuse=zero.values["stage3_max_reuse_distance"],
        prefetch=zero.values["stage3_prefetch_bucket_size"],
        is_sharded=zero.ranks > 1,
        is_copied=zero.ranks > 1 or offloads,
        by_gloo=zero.device == "host",
    )
    whole = {id(p) for p in model.parameters() if zero.is_persistent(p.numel())}
    return pass_through(model, footprint, rules, zero.itemsize, micro_batch(config).is_recomputed, whole)


def _training(config: Config, zero: Zero, weights: Weights, moment: Moment) -> list[Part]:
    trained = sum(weights.trained)
    own = sum(math.ceil(size / zero.ranks) for size in weights.trained)
    bucket = zero.values["reduce_bucket_size"]
    offloads = zero.optimizer != zero.device
    optimizer = "host" if zero.optimizer == "nvme" and own * 4 < MIB else zero.optimizer
    # A bucket on a host takes what is written to it. The scatter sends a copy of it.
    whole = min(trained, bucket) + (min(trained, bucket) if zero.ranks > 1 else 0)
    gradients = zero.itemsize * (bucket + min(trained, bucket) if zero.device == "gpu" else whole)
    masters = 4 * own if offloads or zero.itemsize != 4 else 0
    kept = "host" if config.model.offload_activations else zero.device
    return [
        Part("live gathered layers", zero.device, moment.gathered),
        Part("gradients", zero.device, gradients),
        Part("gradients", "host" if offloads else zero.device, own * (zero.itemsize + (4 if offloads else 0))),
        Part("optimizer", optimizer, masters + 8 * own),
        Part("activations", kept, moment.activations),
        Part("one layer's backward", zero.device, moment.layer),
        Part("logits", zero.device, moment.logits),
        *_scratch(zero),
    ]


def _evaluating(config: Config, zero: Zero, passage: Passage, vocabulary: int) -> list[Part]:
    """Logits of the model's dtype, in fp32, and their log-softmax."""
    logit = zero.itemsize + (4 if zero.itemsize != 4 else 0) + 4
    # A piece of the held-out text is scored whole, however few tokens are asked for.
    held_out = config.evaluate.domain or config.evaluate.retention
    tokens = max(config.evaluate.batch_tokens, config.data.sequence_length if held_out else 0)
    return [
        Part("live gathered layers", zero.device, passage.evaluating),
        Part("logits", zero.device, tokens * vocabulary * logit if held_out or config.evaluate.questions else 0),
        *_scratch(zero),
    ]


def _scratch(zero: Zero) -> list[Part]:
    return [Part("scratch", "host", _SCRATCH)] if zero.device == "host" else []


def _merged(parts: list[Part]) -> list[Part]:
    """Each name once in each place, without what is nothing."""
    sizes: dict[tuple[str, str], int] = {}
    for part in parts:
        sizes[part.name, part.place] = sizes.get((part.name, part.place), 0) + part.size
    return [Part(name, place, size) for (name, place), size in sizes.items() if size]
