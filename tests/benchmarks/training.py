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

Rows:
    float32, bfloat16   as above
    gpu                 one rank on a GPU: half the layers of Llama-3.1-8B, random, by `configs/llama-3.1-8b.yaml`, in
                        4 sequences of 4096 tokens of the same documents. Each arm runs once, the peak is the GPU's, and
                        stock's threshold is `auto` alone: one rank gathers nothing. Only where it is asked for
"""

import argparse
import functools
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import GIB, ROOT, Found, Row, console, memory, print_rows, reset_peak, run_ranks, run_row, write_json
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

sys.path.append(str(ROOT))
from tests.collectives import KINDS, Collectives

BATCH = 4  # sequences a rank
SKIPPED, TIMED = 3, 8
DEEPSPEED = ROOT / "configs/deepspeed/zero3.json"
# The ranks of each row, the tokens of a sequence, and stock's thresholds.
LAYOUTS: dict[str, tuple[int, int, tuple[int | str, ...]]] = {
    "float32": (2, 256, (0, "auto", "default")),
    "bfloat16": (2, 256, (0, "auto", "default")),
    "gpu": (1, 4096, ("auto",)),
}


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
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            reset_peak()
        if state.global_step >= SKIPPED:
            self._times.append(time.perf_counter())
        if state.global_step == SKIPPED + TIMED:  # the last step, which is not timed: ours saves a checkpoint in it
            self.found = {
                "seconds": [end - start for start, end in itertools.pairwise(self._times)],
                "peak": torch.cuda.max_memory_allocated() or memory("VmHWM"),
                "calls": self._collectives.calls,
                "bytes": self._collectives.bytes,
                "loss": [entry["loss"] for entry in state.log_history if "loss" in entry],
            }


def settings(folder: Path, row: str) -> Any:
    """The config of both sides."""
    from mica_ds.config import load_config

    ranks, length, _ = LAYOUTS[row]
    is_gpu = row == "gpu"
    overrides = {
        "model.path": folder / "model" if is_gpu else ROOT / "models/smollm2-135m",
        "model.dtype": "bfloat16" if is_gpu else row,
        "data.corpus": "[configs/demonstration/handbook]",
        "data.replay": "[configs/demonstration/replay.jsonl]",
        "data.sequence_length": length,
        "data.global_batch": BATCH * ranks,
        "evaluate.questions": "null",
        "evaluate.retention": "null",
        "train.max_steps": SKIPPED + TIMED + 1,
        "train.save_steps": 1000,
        "deepspeed": DEEPSPEED,
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "output_dir": folder / row,
    }
    file = ROOT / "configs" / ("llama-3.1-8b.yaml" if is_gpu else "demonstration.yaml")
    return load_config(file, [f"{key}={value}" for key, value in overrides.items()])


def make_model(folder: Path, row: str) -> None:
    """Half of the layers of Llama-3.1-8B, random, with SmolLM2's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from mica_ds import comm

    comm.start()
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    config = LlamaConfig(vocab_size=128256, num_hidden_layers=16, dtype=torch.bfloat16, **sizes)
    with torch.device("cuda"):
        LlamaForCausalLM._from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(ROOT / "models/smollm2-135m").save_pretrained(folder / "model")


def compute_bases(folder: Path, row: str) -> Found:
    """Fill the cache from the checkpoint's files."""
    from mica_ds import comm, recipe

    comm.start()
    config = settings(folder, row)
    recipe.basis(config)
    return {"bases": json.loads((config.output_dir / "basis" / "manifest.json").read_text())["seconds"]}


def train_ours(folder: Path, row: str) -> Found:
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
    config, meter = settings(folder, row), Meter()
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


def train_stock(folder: Path, row: str, method: str, threshold: int | str) -> Found:
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    import deepspeed
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, default_data_collator

    from mica_ds.config import read_deepspeed
    from mica_ds.data import build_dataset

    deepspeed.init_distributed(dist_backend="nccl" if row == "gpu" else "gloo")
    config, meter = settings(folder, row), Meter()
    zero = read_deepspeed(config)
    del zero["zero_optimization"]["stage3_param_persistence_threshold"]
    if threshold != "default":
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    args = TrainingArguments(
        **{**config.train, "save_strategy": "no", "lr_scheduler_type": "cosine"},  # our default
        output_dir=str(folder / "stock"),
        deepspeed=zero,
        bf16=config.model.dtype == "bfloat16",
        use_cpu=row != "gpu",
        report_to="mlflow",
        label_names=["labels"],
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    dataset = build_dataset(config.data, tokenizer, args.seed)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=config.model.dtype)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.adapter.r,
        lora_alpha=config.adapter.alpha,
        target_modules=config.adapter.targets,
        init_lora_weights="mica" if method == "mica" else True,
    )
    started = time.perf_counter()
    model = get_peft_model(model, lora)
    bases = time.perf_counter() - started  # and the layers, which take far less
    trainer = Trainer(
        model=model, args=args, train_dataset=dataset, data_collator=default_data_collator, callbacks=[meter]
    )
    trainer.train()
    return {**meter.found, "bases": bases}


WORKS: dict[str, Callable[..., Found | None]] = {
    work.__name__: work for work in (make_model, compute_bases, train_ours, train_stock)
}


def run_rank(work: str, folder: Path, arguments: Found) -> None:
    """One rank process, from start to exit: what all ranks found goes to found.json."""
    code = 0
    try:
        found = WORKS[work](folder, **arguments)
        everyone: list[Any] = [None] * dist.get_world_size()
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


def run_arm(work: Callable[..., Found], folder: Path, row: str, **arguments: Any) -> Found:
    """The figures of one arm: the slowest rank's times, and the largest peak."""
    number, length, _ = LAYOUTS[row]
    ranks = run_ranks(__file__, work, folder, number, 1, row=row, **arguments)
    slowest = max(ranks, key=lambda found: sum(found["seconds"]))
    tokens = number * BATCH * length * TIMED
    return {**slowest, "peak": max(found["peak"] for found in ranks), "rate": tokens / sum(slowest["seconds"])}


def better(first: Found, second: Found) -> Found:
    """The faster of two runs, with both rates and the lower peak."""
    best = max(first, second, key=lambda found: found["rate"])
    return {**best, "rates": [first["rate"], second["rate"]], "peak": min(first["peak"], second["peak"])}


def compare(row: str, folder: Path) -> tuple[list[Row], Found]:
    ranks, _, thresholds = LAYOUTS[row]
    if row == "gpu":
        run_ranks(__file__, make_model, folder, ranks, 1, row=row)
    bases = run_ranks(__file__, compute_bases, folder, ranks, 1, row=row)
    ours = functools.partial(run_arm, train_ours, folder, row)
    stock = {
        (method, threshold): functools.partial(run_arm, train_stock, folder, row, method=method, threshold=threshold)
        for method in ("lora", "mica")
        for threshold in thresholds
    }
    found = {("ours", ""): ours()}
    found |= {key: arm() for key, arm in stock.items()}
    if row != "gpu":
        found["ours", ""] = better(found["ours", ""], ours())
    rows = []
    for method in ("lora", "mica"):
        arms = [key for key in stock if key[0] == method]
        fastest = max(arms, key=lambda key: found[key]["rate"])
        if row != "gpu":
            found[fastest] = better(found[fastest], stock[fastest]())
        rows += rows_against(row, found["ours", ""], {key[1]: found[key] for key in arms}, method)
    if row == "gpu":
        seconds, stocks = bases[0]["bases"], found["mica", "auto"]["bases"]
        rows.append(Row("gpu: bases", "peft's mica", "1 x 1", seconds, stocks))
    return rows, {" ".join(map(str, key)).strip(): figures for key, figures in found.items()}


def rows_against(name: str, ours: Found, stock: Found, method: str) -> list[Row]:
    """Ours against the best of stock's thresholds in each respect."""

    def calls(arm: Found) -> float:
        return sum(arm["calls"].values())

    def gib(arm: Found) -> float:
        return sum(arm["bytes"].values()) / GIB

    def peak(arm: Found) -> float:
        return arm["peak"] / GIB

    against, layout = f"peft's {method}", f"{LAYOUTS[name][0]} x 1"
    rate = max(arm["rate"] for arm in stock.values())
    rows = [Row(f"{name}: speed", against, layout, ours["rate"], rate, at_least=1, unit="tokens/s")]
    respects = [("collectives", calls, "a step"), ("moved", gib, "GiB a step"), ("peak", peak, "GiB")]
    for work, measure, unit in respects if LAYOUTS[name][0] > 1 else respects[-1:]:  # one rank gathers nothing
        least = min(map(measure, stock.values()))
        rows.append(Row(f"{name}: {work}", against, layout, measure(ours), least, at_most=1, unit=unit))
    return rows


ROWS: dict[str, Callable[[Path], tuple[list[Row], Found]]] = {row: functools.partial(compare, row) for row in LAYOUTS}


def print_arms(dtype: str, arms: Found) -> None:
    table = Table("arm", "tokens/s", *KINDS, "GiB a step", "peak, GiB", title=f"{dtype}, a step")
    for name, arm in arms.items():
        calls = (str(arm["calls"].get(kind, 0)) for kind in KINDS)
        moved = sum(arm["bytes"].values()) / GIB
        table.add_row(name, f"{arm['rate']:.0f}", *calls, f"{moved:.3f}", f"{arm['peak'] / GIB:.2f}")
    console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, default=["float32", "bfloat16"], metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the same figures, and more, as JSON")
    parser.add_argument("--as-rank", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        work, folder, arguments = options.as_rank
        run_rank(work, Path(folder), json.loads(arguments))
    rows: list[Row] = []
    details: Found = {}
    for name in options.only:
        found, details[name] = run_row(name, ROWS[name])
        rows += found
    for name, arms in details.items():
        print_arms(name, arms)
    print_rows(rows)
    if options.out:
        write_json(options.out, rows, details)


if __name__ == "__main__":
    main()
