"""The verbs, each from config to result in one screen."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments, set_seed

from mica_ds import comm, figures
from mica_ds.adapter import (
    attach_adapter,
    frozen_factors,
    lora_parameters,
    restore_adapter,
    stored_targets,
    target_modules,
)
from mica_ds.basis import Basis, build_basis, warnings
from mica_ds.checkpoint import (
    check_origin,
    find_checkpoint,
    read_frozen,
    read_history,
    read_state,
    remove_checkpoints,
    tensor_files,
)
from mica_ds.config import Config, fixed_settings, save_config
from mica_ds.data import build_dataset, digest
from mica_ds.errors import Preempted, UserError
from mica_ds.evaluate import Evaluator
from mica_ds.export import export_checkpoint
from mica_ds.model import DTYPES, count_parameters, load_model, load_skeleton, load_tokenizer
from mica_ds.report import SUMMARY, peak_rss, print_summary, rss, write_summary
from mica_ds.shards import CheckpointSource, PartitionSource, Source
from mica_ds.tracking import Tracker
from mica_ds.trainer import accumulation_steps, build_trainer, inference_engine, total_steps, training_arguments
from mica_ds.weights import open_checkpoint


def train(config: Config) -> None:
    """Bases, training, evaluation before and after, export, tracking and a closing table. Collective."""
    folder = _open_run_folder(config)
    with comm.failing_together():
        args = training_arguments(config, accumulation_steps(config))
        tokenizer = load_tokenizer(config.model)
    set_seed(args.seed)
    dataset = build_dataset(config.data, tokenizer, args.seed)
    evaluator = Evaluator(config.evaluate, tokenizer, config.data.sequence_length)
    comm.say(f"data: {len(dataset)} sequences of {config.data.sequence_length} tokens")
    steps, made_of = total_steps(args, dataset, config.data.global_batch), _made_of(config, args, dataset)
    checkpoint, step = _start(config, made_of, steps)
    if step >= steps and _is_finished(config, step):
        comm.say(f"train: {folder} is finished, with {step} steps; resume=never begins again")
        return
    is_full = config.adapter.method == "full"
    model, loading_rss = _load(config, tensor_files(checkpoint) if checkpoint and is_full else None)
    modules = _targets(config, model)
    with Tracker(config) as tracker:
        if comm.is_main():  # nothing is written before all that a user may have got wrong has been checked
            save_config(config, folder / "config.yaml")
            remove_checkpoints(folder / "checkpoints", after=step)
            (folder / SUMMARY).unlink(missing_ok=True)
        basis = _bases(config, PartitionSource(modules)) if config.adapter.method == "mica" else None
        made_of |= _weights_of(basis)
        model = attach_adapter(model, modules, config.adapter, basis)
        if checkpoint:
            with comm.failing_together():
                check_origin(checkpoint, made_of)
                model = model if is_full else restore_adapter(model, checkpoint)
        trainable = count_parameters(model)
        comm.say(f"training: {trainable:,} parameters of {config.adapter.method}, {args.world_size} ranks")
        if step >= steps:
            engine = inference_engine(model, args)
        else:
            trainer = build_trainer(
                model,
                args,
                dataset,
                evaluator,
                tracker,
                config.checkpoint,
                made_of,
                _frozen(modules, basis, checkpoint),
                {"basis_seconds": basis.seconds if basis else 0.0},
            )
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            checkpoint, engine = trainer.saved, trainer.model_wrapped
            if trainer.run.is_preempted:
                raise Preempted(f"stopped by a signal: {checkpoint} holds all, start again to go on")
        assert checkpoint  # the last step has written one
        after = evaluator.score(engine)
        _save_probe(engine, dataset[0]["input_ids"][:32], folder / "probe.safetensors")
        peaks, loading = comm.gather(peak_rss()), comm.gather(loading_rss)
        with comm.failing_together():
            if comm.is_main():
                facts, history = read_state(checkpoint)["run"], read_history(checkpoint)
                done = read_state(checkpoint)["step"]
                tokens = done * config.data.global_batch * config.data.sequence_length
                summary = {
                    **facts,
                    "knowledge_after": after.knowledge,
                    "retention_after": after.retention,
                    "trainable_parameters": trainable,
                    "lora_trainable_parameters": lora_parameters(modules, config.adapter.r),
                    "tokens_per_second": tokens / facts["train_seconds"],
                    "final_loss": [entry["loss"] for entry in history if "loss" in entry][-1],
                    "peak_rss_bytes": peaks,
                    "loading_rss_bytes": loading,
                    "world_size": args.world_size,
                    "steps": done,
                }
                exported = export_checkpoint(config, checkpoint)
                comm.say(f"export: {exported}")
                _record(config, summary, history, basis, exported, tracker)
                print_summary(summary, config)


def _made_of(config: Config, args: TrainingArguments, dataset: Dataset) -> dict[str, Any]:
    """What must be the same for a run to go on, by the keys of the config."""
    return {
        **fixed_settings(config),
        "model.dtype": config.model.dtype,
        "data.sequence_length": config.data.sequence_length,
        "data.global_batch": config.data.global_batch,
        "train.seed": args.seed,
        "train.data_seed": args.data_seed,
        "data (SHA-256 of its tokens)": digest(dataset),
    }


def _weights_of(basis: Basis | None) -> dict[str, Any]:
    return {"model.path (fingerprint of its weights)": basis.manifest["fingerprint"]} if basis else {}


def _start(config: Config, made_of: dict[str, Any], steps: int) -> tuple[Path | None, int]:
    """The checkpoint to go on from, and its step; None and -1 for a new run. Collective."""
    if config.resume == "never":
        return None, -1
    chosen = config.resume if isinstance(config.resume, Path) else None
    checkpoint = find_checkpoint(config.output_dir / "checkpoints", chosen)
    if checkpoint is None:
        return None, -1
    with comm.failing_together():
        check_origin(checkpoint, made_of)
    step = read_state(checkpoint)["step"]
    if step < steps:
        comm.say(f"resume: {checkpoint}, {steps - step} steps to go")
    return checkpoint, step


def _is_finished(config: Config, step: int) -> bool:
    """Whether the run folder holds all that the last step leaves: the summary is written last. Collective."""
    file = config.output_dir / SUMMARY
    return comm.gather(file.exists() and json.loads(file.read_text())["steps"] == step)[0]


def _frozen(modules: dict[str, nn.Module], basis: Basis | None, checkpoint: Path | None) -> dict[str, torch.Tensor]:
    """MiCA's B for the checkpoints, on rank 0: from an earlier one, else from the cache. Local."""
    if basis is None or not comm.is_main():
        return {}
    return read_frozen(checkpoint) if checkpoint else frozen_factors(modules, basis)


def basis(config: Config) -> None:
    """The bases alone, into the run folder's cache, from which `train` starts at once. Collective."""
    with comm.failing_together():
        if config.adapter.method != "mica":
            raise UserError(f"adapter.method={config.adapter.method} has no bases; only mica has")
    _open_run_folder(config)
    with comm.failing_together():
        checkpoint = open_checkpoint(config.model.path)
        targets = stored_targets(load_skeleton(config.model), config.adapter, checkpoint)
    found = _bases(config, CheckpointSource(targets, DTYPES[config.model.dtype]))
    if comm.is_main():
        figures.plot_spectrum(found.manifest, config.output_dir / "spectrum.png")


def evaluate(config: Config) -> None:
    """Score the newest checkpoint of the run folder, or the base model where there is none. Collective."""
    folder = _open_run_folder(config)
    with comm.failing_together():
        if config.evaluate.questions is None and config.evaluate.retention is None:
            raise UserError("nothing to evaluate: set evaluate.questions or evaluate.retention")
        args = training_arguments(config)
        tokenizer = load_tokenizer(config.model)
    evaluator = Evaluator(config.evaluate, tokenizer, config.data.sequence_length)
    checkpoint = find_checkpoint(folder / "checkpoints")
    model: nn.Module
    if checkpoint and config.adapter.method == "full":
        model = load_model(config.model, weights=tensor_files(checkpoint))
    else:
        model = load_model(config.model)
        if checkpoint:
            modules = _targets(config, model)
            bases = _bases(config, PartitionSource(modules)) if config.adapter.method == "mica" else None
            with comm.failing_together():
                check_origin(checkpoint, fixed_settings(config) | _weights_of(bases))
            model = restore_adapter(attach_adapter(model, modules, config.adapter, bases), checkpoint)
    scores = evaluator.score(inference_engine(model, args))
    evaluated = {
        "checkpoint": checkpoint.name if checkpoint else None,
        **dataclasses.asdict(scores),
    }
    comm.say(json.dumps(evaluated))
    if comm.is_main():
        (folder / "evaluation.json").write_text(json.dumps(evaluated, indent=1))


def export(config: Config) -> None:
    """Export the newest checkpoint of the run folder. Collective, though rank 0 alone works."""
    checkpoint = find_checkpoint(config.output_dir / "checkpoints")
    with comm.failing_together():
        if comm.is_main():
            if checkpoint is None:
                raise UserError(f"{config.output_dir} holds no checkpoint to export; run `mica-ds train` first")
            comm.say(f"export: {export_checkpoint(config, checkpoint)}")


def _open_run_folder(config: Config) -> Path:
    """Make the run folder, and check on every rank that it can be written. Collective."""
    folder = config.output_dir
    with comm.failing_together():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{comm.rank()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}") from None
    return folder


def _targets(config: Config, model: nn.Module) -> dict[str, nn.Module]:
    with comm.failing_together():
        return target_modules(model, config.adapter)


def _load(config: Config, weights: list[Path] | None) -> tuple[Any, int]:
    """The partitioned model, and by how much this rank's peak memory exceeds what it held before loading (bytes)."""
    started, before = time.perf_counter(), rss()
    model = load_model(config.model, weights)
    comm.say(
        f"model: {config.model.path} partitioned over {comm.world_size()} ranks, {time.perf_counter() - started:.1f} s"
    )
    return model, peak_rss() - before


def _bases(config: Config, source: Source) -> Basis:
    seed = config.train.get("seed", TrainingArguments.seed)
    found = build_basis(source, config.adapter, config.basis, seed, config.output_dir / "basis")
    how = f"{found.solved} solved" if found.solved else "all from the cache"
    comm.say(f"bases: {len(source.matrices)} matrices, r = {config.adapter.r}, {how}, {found.seconds:.1f} s")
    for warning in warnings(found.manifest):
        comm.say(f"warning: {warning}")
    return found


@torch.no_grad()
def _save_probe(model: nn.Module, ids: list[int], file: Path) -> None:
    """Save a few token ids and the trained model's logits on them, against which a reload is checked. Collective."""
    model.eval()
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)
    logits = model(input_ids=input_ids, use_cache=False).logits
    if comm.is_main():
        save_file({"input_ids": input_ids.cpu(), "logits": logits.float().cpu()}, file)


def _record(
    config: Config,
    summary: dict[str, Any],
    history: list[dict[str, float]],
    basis: Basis | None,
    exported: Path,
    tracker: Tracker,
) -> None:
    """Write the plots and at last the summary, and log them with the rest of the run. Local, on rank 0."""
    folder = config.output_dir
    for file in (folder / "config.yaml", config.deepspeed):
        tracker.artifact(file)
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figures.plot_loss(
        [int(step) for step, _ in losses],
        [loss for _, loss in losses],
        folder / "loss.png",
    )
    tracker.artifact(folder / "loss.png")
    if basis:
        figures.plot_spectrum(basis.manifest, folder / "spectrum.png")
        tracker.artifact(folder / "spectrum.png")
        tracker.artifact(basis.folder / "manifest.json", under="basis")
    if config.adapter.method != "full":  # a whole model stays in the run folder
        tracker.artifact(exported, under="adapter")
    numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    ranks = {f"{key}_max": max(value) for key, value in summary.items() if isinstance(value, list)}
    tracker.metrics({**numbers, **ranks}, step=summary["steps"])
    tracker.artifact(write_summary(summary, folder))
