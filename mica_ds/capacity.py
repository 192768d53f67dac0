"""Whether a run fits, and the nearest settings that do."""

import math
import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import torch

from mica_ds import comm, memory, process
from mica_ds.config import Config, read_deepspeed
from mica_ds.errors import UserError
from mica_ds.memory import readable
from mica_ds.meter import rss
from mica_ds.plan import CONTEXT, Plan, make_plan
from mica_ds.zero import Cluster

NODES = "--nodes"
PLACES = {"gpu": "a GPU", "host": "host memory a rank", "nvme": "NVMe a rank"}


def nearest_fit(config: Config, cluster: Cluster) -> dict[str, Any] | None:
    """The settings to replace so that a run fits, by their keys; none of them fits: None. Local; seconds.

    What costs least is tried first, and each is kept while more is tried: fewer tokens at an evaluation, smaller
    micro-batches, recomputed activations, those offloaded, no second copy of the weights, weights and optimizer on the
    host, then on NVMe, shorter sequences, more nodes, these with a larger global batch where they could not divide it.
    Of those that together fit, each goes, or is made milder, if it still fits then.
    """
    changes: dict[str, Any] = {}
    tried: dict[str, list[Any]] = {}
    for key, value in _candidates(config, cluster):
        changes[key] = value
        tried.setdefault(key, []).append(value)
        if _fits(config, cluster, changes):
            break
    else:
        return None
    for key in list(changes):
        without = {other: value for other, value in changes.items() if other != key}
        for milder in [without, *({**changes, key: value} for value in tried[key])]:
            if _fits(config, cluster, milder):
                changes = milder
                break
    return changes


def told(changes: dict[str, Any]) -> str:
    """Changes as they are typed behind a verb and its config, in a shell. Local."""
    return shlex.join(f"{key}={'true' if value is True else value}" for key, value in changes.items())


def verdict(plan: Plan) -> str:
    """What a rank takes where, of what there is, in one line. Local."""
    parts = []
    for place, name in PLACES.items():
        stage = plan.worst(place)
        if need := plan.need(place, stage):
            parts.append(f"{readable(need)} of {readable(plan.cluster.room(place))} of {name} ({stage})")
    return ", ".join(parts)


def check_capacity(config: Config) -> None:
    """Say what the run will take of these machines, and refuse what cannot fit, or warn (`capacity`). Collective.

    Raises: UserError that holds the settings to replace.
    """
    machines = comm.gather((socket.gethostname(), process.free_memory(), rss(), _gpu_memory(), _nvme(config)))
    activations = 0
    with comm.failing_together():
        if comm.is_main():
            hosts = [host for host, *_ in machines]
            per_node = max(map(hosts.count, hosts))
            # What the ranks hold already is part of what they need.
            host = min(free + sum(own for name, _, own, *_ in machines if name == host) for host, free, *_ in machines)
            gpu, nvme = min(gpu for *_, gpu, _ in machines), min(nvme for *_, nvme in machines)
            cluster = Cluster(len(set(hosts)), per_node, gpu, host, nvme)
            if cluster.ranks != len(hosts):
                comm.say("warning: plan: whether the run fits is not known: nodes with different numbers of ranks")
            elif plan := _plan(config, cluster):
                activations = plan.passage.loss.activations
                if plan.misfits:
                    _complain(config, cluster, plan)
                else:
                    comm.say(f"plan: fits: {verdict(plan)}")
    memory.note_activations(comm.gather(activations)[0])
    comm.advise(memory.hint(config, "training"))


def _plan(config: Config, cluster: Cluster) -> Plan | None:
    """The plan; None, which is said, where a model's code does something that needs data: it may train all the same."""
    try:
        return make_plan(config, cluster)
    except UserError:
        raise
    except Exception as error:
        comm.say(f"warning: plan: whether the run fits is not known, this model cannot be counted: {error!r}")
        return None


def _complain(config: Config, cluster: Cluster, plan: Plan) -> None:
    changes = nearest_fit(config, cluster)
    advice = f"the nearest that fits: {_settings(changes)}" if changes else "nothing that could be set makes it fit"
    message = f"it does not fit: {verdict(plan)}; {advice}"
    if config.capacity == "refuse":
        raise UserError(f"{message}; capacity=warn tries all the same")
    comm.say(f"warning: plan: {message}")


def _settings(changes: dict[str, Any]) -> str:
    """Changes as `told`, but for the nodes: `train` takes those that its launcher gives it."""
    settings = told({key: value for key, value in changes.items() if key != NODES})
    return " ".join(filter(None, [settings, f"on {changes[NODES]} nodes" if NODES in changes else ""]))


def _fits(config: Config, cluster: Cluster, changes: dict[str, Any]) -> bool:
    changed, larger = replaced(config, cluster, changes)
    try:
        return not make_plan(changed, larger).misfits
    except Exception:  # the global batch is not divisible, or the model cannot be run so
        return False


def replaced(config: Config, cluster: Cluster, changes: dict[str, Any]) -> tuple[Config, Cluster]:
    """The config and the cluster with these changes. Local."""
    settings = config.model_dump()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if key != NODES:
            (settings[section] if section else settings)[name] = value
    nodes = changes.get(NODES, cluster.nodes)
    larger = Cluster(nodes, cluster.ranks_per_node, cluster.gpu_memory, cluster.host_memory, cluster.nvme)
    return Config.model_validate(settings), larger


def _candidates(config: Config, cluster: Cluster) -> list[tuple[str, Any]]:
    length = config.data.sequence_length
    found: list[tuple[str, Any]] = []
    found += [("evaluate.batch_tokens", tokens) for tokens in _halves(config.evaluate.batch_tokens, least=128)]
    rows = config.train.get("per_device_train_batch_size", 1)
    divisors = [fewer for fewer in range(rows - 1, 0, -1) if rows % fewer == 0]  # the global batch stays divisible
    found += [("train.per_device_train_batch_size", fewer) for fewer in divisors]
    found.append(("train.activation_checkpointing", True))
    if cluster.gpu_memory:
        found.append(("model.offload_activations", True))
    has_second_copy = "zero_hpz_partition_size" in read_deepspeed(config)["zero_optimization"]
    for name, is_there in (
        ("zero3.json", has_second_copy),
        ("zero3-offload-cpu.json", True),
        ("zero3-offload-nvme.json", cluster.nvme > 0),
    ):
        file = config.deepspeed.with_name(name)
        if is_there and file.is_file() and file != config.deepspeed:
            found.append(("deepspeed", file))
    found += [("data.sequence_length", shorter) for shorter in _halves(length, least=128)]
    batch, per_node = config.data.global_batch, cluster.ranks_per_node
    more = range(cluster.nodes + 1, 32 * cluster.nodes + 1)
    found += [(NODES, nodes) for nodes in more if batch % (nodes * per_node) == 0]
    for nodes in (cluster.nodes * times for times in (2, 4, 8, 16, 32)):
        if batch % (ranks := nodes * per_node):
            found += [("data.global_batch", math.ceil(batch / ranks) * ranks), (NODES, nodes)]
    return found


def _halves(number: int, least: int) -> list[int]:
    found = []
    while (number := number // 2) >= least:
        found.append(number)
    return found


def _gpu_memory() -> int:
    """What is free on this rank's GPU, with what its own context has taken of it, which the plan counts."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return min(total, free + CONTEXT)


def _nvme(config: Config) -> int:
    """What is free where DeepSpeed swaps to, whether or not its folder is there (see `training_arguments`)."""
    settings = read_deepspeed(config)["zero_optimization"]
    paths = [settings.get(section, {}).get("nvme_path") for section in ("offload_param", "offload_optimizer")]
    folders = [Path(path).absolute() for path in paths if path]
    existing = [next(place for place in (folder, *folder.parents) if place.is_dir()) for folder in folders]
    return min((shutil.disk_usage(folder).free for folder in existing), default=0)
