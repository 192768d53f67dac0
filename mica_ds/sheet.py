"""The plan of a run as a table, or as a line of JSON."""

import dataclasses
import json

from rich.console import Console
from rich.table import Table

from mica_ds.capacity import nearest_fit, told, verdict
from mica_ds.config import Config
from mica_ds.costs import Costs, count_costs
from mica_ds.memory import readable
from mica_ds.plan import Plan, make_plan
from mica_ds.upstream import check_zero
from mica_ds.zero import Cluster


def print_plan(config: Config, cluster: Cluster, as_json: bool) -> bool:
    """Print what a run takes on a cluster, and whether it fits, which is returned. Local. Raises: UserError."""
    check_zero(config.deepspeed)
    plan = make_plan(config, cluster)
    costs = count_costs(config, plan)
    changes = nearest_fit(config, cluster) if plan.misfits else {}
    if as_json:
        whole = {
            "cluster": dataclasses.asdict(cluster),
            "stages": {name: [dataclasses.asdict(part) for part in parts] for name, parts in plan.stages.items()},
            "costs": dataclasses.asdict(costs),
            "accumulation": plan.accumulation,
            "misfits": plan.misfits,
            "nearest": None if changes is None else told(changes),
        }
        print(json.dumps(whole), flush=True)
        return not plan.misfits
    console = Console(width=None if Console().is_terminal else 110)
    console.print(_memory(config, plan))
    console.print(_costs(config, plan, costs))
    # Outside the tables, in one piece, to be copied.
    print(f"fits: {verdict(plan)}" if not plan.misfits else f"does NOT fit: {verdict(plan)}")
    if plan.misfits:
        print(
            f"nearest that fits:  {told(changes)}" if changes else "nothing that could be set makes it fit", flush=True
        )
    return not plan.misfits


def _memory(config: Config, plan: Plan) -> Table:
    cluster = plan.cluster
    kind = f"GPUs of {readable(cluster.gpu_memory)}" if cluster.gpu_memory else "ranks on CPUs"
    title = f"{config.model.path.name}, {config.adapter.method}: {cluster.nodes} × {cluster.ranks_per_node} {kind}"
    table = Table(title=f"{title}; memory of a rank")
    table.add_column("part")
    for stage in plan.stages:
        table.add_column(stage, justify="right")
    for place in ("gpu", "host", "nvme"):
        names = dict.fromkeys(part.name for parts in plan.stages.values() for part in parts if part.place == place)
        for name in names:
            sizes = [
                sum(part.size for part in parts if (part.name, part.place) == (name, place))
                for parts in plan.stages.values()
            ]
            table.add_row(f"{place}: {name}", *(readable(size) if size else "" for size in sizes))
        if names:
            totals = [plan.need(place, stage) for stage in plan.stages]
            table.add_row(f"{place}, all", *(readable(total) if total else "" for total in totals), style="bold")
            table.add_section()
    return table


def _costs(config: Config, plan: Plan, costs: Costs) -> Table:
    table = Table(show_header=False)
    share = f"{costs.trained / costs.lora:.0%} of LoRA's {costs.lora:,} at r = {config.adapter.r}"
    where = "from its own node" if costs.gathered_within_node else "from all nodes"
    table.add_row("trainable parameters", f"{costs.trained:,} ({share})")
    table.add_row("micro-batches a step", str(plan.accumulation))
    table.add_row("received by a rank in a step", f"{readable(costs.gathered)} of weights, {where}")
    table.add_row("", f"{readable(costs.reduced)} of gradients")
    if costs.basis_seconds:
        table.add_row("moved for the bases", readable(costs.basis_moved))
        table.add_row("time for the bases", f"{costs.basis_seconds:.0f} s, a core a rank, without communication")
    table.add_row("a checkpoint", readable(costs.checkpoint))
    table.add_row("run folder, at most", readable(costs.folder))
    return table
