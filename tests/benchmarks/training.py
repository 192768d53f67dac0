"""What a training step takes, against plain peft, transformers' Trainer and DeepSpeed's ZeRO-3.

    python tests/benchmarks/training.py [--only ROW ...] [--out FILE.json]

SmolLM2-135M on the demonstration's documents, packed alike; 2 ranks x 1 thread, 4 sequences of 256 tokens a rank, all
linear layers at r = 16. Ours goes through the package: `load_model`, `build_basis` from a cache, `attach_adapter`,
`build_trainer`. Stock is peft's LoRA and peft's MiCA, each at the persistence thresholds 0, `auto` as transformers
fills it in, and DeepSpeed's default. Both log each step to MLflow in a SQLite file, and share all other settings. An
arm is two processes of its own, one arm after the other, on an otherwise idle machine; then ours and the fastest of
stock's run once more, and the better run counts.

The first 3 steps are not timed: in two of them DeepSpeed records the order of the modules, and in the third the
collectives are counted, with the bytes of the whole tensors. Then 8 are timed; the peak of memory is theirs.

Rows: float32, bfloat16
"""

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from common import GIB, ROOT, Found, Row, console, memory, print_rows, reset_peak, run_ranks, write_json
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

sys.path.append(str(ROOT))
from tests.collectives import KINDS, Collectives

RANKS = 2
SKIPPED, TIMED = 3, 8
DEEPSPEED = ROOT / "configs/deepspeed/zero3.json"
STOCK = [(method, threshold) for method in ("lora", "mica") for threshold in (0, "auto", "default")]


# What rank processes run. What imports DeepSpeed is imported inside, once the environment is set.


class Meter(TrainerCallback):
    """What the steps of one rank take."""

    def __init__(self) -> None:
        self._collectives = Collectives()
        self._times: list[float] = []
        self.found: Found = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == SKIPPED - 1:
            self._collectives.__enter__()
        if state.global_step == SKIPPED:
            self._collectives.__exit__(None, None, None)
            reset_peak()
        if state.global_step >= SKIPPED:
            self._times.append(time.perf_counter())
        if state.global_step == SKIPPED + TIMED:  # the last step, which is not timed: ours saves a checkpoint in it
            self.found = {
                "seconds": [end - start for start, end in itertools.pairwise(self._times)],
                "peak": memory("VmHWM"),
                "calls": self._collectives.calls,
                "bytes": self._collectives.bytes,
                "loss": [entry["loss"] for entry in state.log_history if "loss" in entry],
            }


def settings(folder: Path, dtype: str) -> Any:
    """The config of both sides."""
    from mica_ds.config import load_config

    overrides = {
        "model.path": ROOT / "models/smollm2-135m",
        "model.dtype": dtype,
        "data.sequence_length": 256,
        "data.global_batch": 4 * RANKS,
        "evaluate.questions": "null",
        "evaluate.retention": "null",
        "train.max_steps": SKIPPED + TIMED + 1,
        "train.save_steps": 1000,
        "deepspeed": DEEPSPEED,
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "output_dir": folder / dtype,
    }
    return load_config(ROOT / "configs/demonstration.yaml", [f"{key}={value}" for key, value in overrides.items()])


def compute_bases(folder: Path, dtype: str) -> None:
    """Fill the cache."""
    from mica_ds import comm, recipe

    comm.start()
    recipe.basis(settings(folder, dtype))


def train_ours(folder: Path, dtype: str) -> Found:
    from mica_ds import comm
    from mica_ds.adapter import attach_adapter, first_factors, target_modules
    from mica_ds.arguments import accumulation_steps, training_arguments
    from mica_ds.basis import build_basis
    from mica_ds.data import build_dataset
    from mica_ds.evaluate import Evaluator
    from mica_ds.fingerprint import WEIGHTS
    from mica_ds.model import load_model, load_tokenizer
    from mica_ds.shards import PartitionSource
    from mica_ds.shelf import remove_checkpoints
    from mica_ds.tracking import Tracker
    from mica_ds.trainer import build_trainer

    comm.start()
    config, meter = settings(folder, dtype), Meter()
    args = training_arguments(config, accumulation_steps(config, comm.world_size()))
    tokenizer = load_tokenizer(config.model)
    dataset = build_dataset(config.data, tokenizer, args.seed)
    evaluator = Evaluator(config.evaluate, tokenizer, config.data.sequence_length)
    model = load_model(config.model)
    modules = target_modules(model, config.adapter)
    with Tracker(config.output_dir, config.tracking, config.model_dump(mode="json")) as tracker:
        if comm.is_main():
            remove_checkpoints(config.output_dir / "checkpoints", after=0)
        basis = build_basis(
            PartitionSource(modules), config.adapter, config.basis, args.seed, config.output_dir / "basis"
        )
        model = attach_adapter(model, modules, config.adapter, first_factors(modules, basis))
        origin = {WEIGHTS: ""}
        trainer = build_trainer(config, model, args, dataset, evaluator, tracker, origin, frozen={}, facts={})
        trainer.add_callback(meter)
        trainer.train()
    return meter.found


def train_stock(folder: Path, dtype: str, method: str, threshold: int | str) -> Found:
    os.environ |= {"DS_ACCELERATOR": "cpu", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    import deepspeed
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, default_data_collator

    from mica_ds.config import read_deepspeed
    from mica_ds.data import build_dataset

    deepspeed.init_distributed(dist_backend="gloo")
    config, meter = settings(folder, dtype), Meter()
    zero = read_deepspeed(config)
    del zero["zero_optimization"]["stage3_param_persistence_threshold"]
    if threshold != "default":
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    args = TrainingArguments(
        **config.train,
        output_dir=str(folder / "stock"),
        save_strategy="no",
        deepspeed=zero,
        bf16=dtype == "bfloat16",
        use_cpu=True,
        report_to="mlflow",
        label_names=["labels"],
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    dataset = build_dataset(config.data, tokenizer, args.seed)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.adapter.r,
        lora_alpha=config.adapter.alpha,
        target_modules="all-linear",
        init_lora_weights="mica" if method == "mica" else True,
    )
    model = get_peft_model(model, lora)
    trainer = Trainer(
        model=model, args=args, train_dataset=dataset, data_collator=default_data_collator, callbacks=[meter]
    )
    trainer.train()
    return meter.found


WORKS: dict[str, Callable[..., Found | None]] = {
    work.__name__: work for work in (compute_bases, train_ours, train_stock)
}


def run_rank(work: str, folder: Path, arguments: Found) -> None:
    """One rank process, from start to exit: what all ranks found goes to found.json."""
    code = 0
    try:
        found = WORKS[work](folder, **arguments)
        everyone: list[Any] = [None] * RANKS
        dist.all_gather_object(everyone, found)
        if dist.get_rank() == 0:
            (folder / "found.json").write_text(json.dumps(everyone))
        dist.barrier()
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: tearing down the groups waits for peers, which may have failed


# What the command does.


def run_arm(work: Callable[..., Found], folder: Path, **arguments: Any) -> Found:
    """The figures of one arm: the slowest rank's times, and the largest peak."""
    ranks = run_ranks(__file__, work, folder, RANKS, 1, **arguments)
    slowest = max(ranks, key=lambda found: sum(found["seconds"]))
    tokens = RANKS * 4 * 256 * TIMED
    return {**slowest, "peak": max(found["peak"] for found in ranks), "rate": tokens / sum(slowest["seconds"])}


def better(first: Found, second: Found) -> Found:
    """The faster of two runs, with both rates and both peaks."""
    best = max(first, second, key=lambda found: found["rate"])
    return {**best, "rates": [first["rate"], second["rate"]], "peak": min(first["peak"], second["peak"])}


def compare(dtype: str, folder: Path) -> tuple[list[Row], Found]:
    run_ranks(__file__, compute_bases, folder, RANKS, 1, dtype=dtype)
    ours = functools.partial(run_arm, train_ours, folder, dtype=dtype)
    stock = {
        (method, threshold): functools.partial(
            run_arm, train_stock, folder, dtype=dtype, method=method, threshold=threshold
        )
        for method, threshold in STOCK
    }
    found = {("ours", ""): ours()}
    found |= {key: arm() for key, arm in stock.items()}
    found["ours", ""] = better(found["ours", ""], ours())
    rows = []
    for method in ("lora", "mica"):
        arms = [key for key in stock if key[0] == method]
        fastest = max(arms, key=lambda key: found[key]["rate"])
        found[fastest] = better(found[fastest], stock[fastest]())
        rows += rows_against(dtype, found["ours", ""], {key[1]: found[key] for key in arms}, method)
    return rows, {" ".join(map(str, key)).strip(): figures for key, figures in found.items()}


def rows_against(dtype: str, ours: Found, stock: Found, method: str) -> list[Row]:
    """Ours against the best of stock's thresholds in each respect."""

    def calls(arm: Found) -> float:
        return sum(arm["calls"].values())

    def gib(arm: Found) -> float:
        return sum(arm["bytes"].values()) / GIB

    def peak(arm: Found) -> float:
        return arm["peak"] / GIB

    against, layout = f"peft's {method}", f"{RANKS} x 1"
    rate = max(arm["rate"] for arm in stock.values())
    rows = [Row(f"{dtype}: speed", against, layout, ours["rate"], rate, at_least=1, unit="tokens/s")]
    for work, measure, unit in (("collectives", calls, "a step"), ("moved", gib, "GiB a step"), ("peak", peak, "GiB")):
        least = min(map(measure, stock.values()))
        rows.append(Row(f"{dtype}: {work}", against, layout, measure(ours), least, at_most=1, unit=unit))
    return rows


ROWS: dict[str, Callable[[Path], tuple[list[Row], Found]]] = {
    dtype: functools.partial(compare, dtype) for dtype in ("float32", "bfloat16")
}


def print_arms(dtype: str, arms: Found) -> None:
    table = Table("arm", "tokens/s", *KINDS, "GiB a step", "peak, GiB", title=f"{dtype}, a step")
    for name, arm in arms.items():
        calls = (str(arm["calls"].get(kind, 0)) for kind in KINDS)
        moved = sum(arm["bytes"].values()) / GIB
        table.add_row(name, f"{arm['rate']:.0f}", *calls, f"{moved:.3f}", f"{arm['peak'] / GIB:.2f}")
    console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the same figures, and more, as JSON")
    parser.add_argument("--as-rank", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        work, folder, arguments = options.as_rank
        run_rank(work, Path(folder), json.loads(arguments))
    rows: list[Row] = []
    details: Found = {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as temporary:
            found, details[name] = ROWS[name](Path(temporary))
        rows += found
    for name, arms in details.items():
        print_arms(name, arms)
    print_rows(rows)
    if options.out:
        write_json(options.out, rows, details)


if __name__ == "__main__":
    main()
