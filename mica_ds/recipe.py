"""The verbs, each from config to result in one screen."""

import dataclasses
import json
import socket
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments, set_seed

from mica_ds import comm, figures
from mica_ds.about import environment
from mica_ds.adapter import (
    lora_parameters,
    stored_targets,
    target_modules,
)
from mica_ds.basis import Basis, build_basis, warnings
from mica_ds.checkpoint import read_history, tensor_files
from mica_ds.config import Config, fixed_settings, save_config
from mica_ds.data import build_dataset
from mica_ds.doctor import examine, print_results
from mica_ds.errors import Preempted, UserError
from mica_ds.evaluate import Evaluator
from mica_ds.export import export_checkpoint
from mica_ds.merge import merge_checkpoint
from mica_ds.meter import peak_rss, rss
from mica_ds.model import DTYPES, count_parameters, load_model, load_skeleton, load_tokenizer, read_model_config
from mica_ds.overlap import counts, write_report
from mica_ds.overlap import examine as examine_data
from mica_ds.packing import check_packing
from mica_ds.page import write_page
from mica_ds.parallelism import check_parallelism
from mica_ds.report import SUMMARY, print_summary, write_summary
from mica_ds.resume import attach, checked_weights, fingerprints, frozen_tensors, is_complete, made_of, start_point
from mica_ds.shards import CheckpointSource, PartitionSource, Source
from mica_ds.shelf import check_origin, find_checkpoint, read_state, remove_checkpoints, writing
from mica_ds.tracking import Tracker
from mica_ds.trainer import accumulation_steps, build_trainer, inference_engine, total_steps, training_arguments
from mica_ds.weights import open_checkpoint


def train(config: Config) -> None:
    """Bases, training, evaluation before and after, export, tracking and a closing table. Collective."""
    folder = _open_run_folder(config)
    with comm.failing_together():
        check_parallelism(config, read_model_config(config.model.path))
        check_packing(config)
        args = training_arguments(config, accumulation_steps(config))
        tokenizer = load_tokenizer(config.model)
    set_seed(args.seed)
    dataset = build_dataset(config.data, tokenizer, args.seed)
    evaluator = Evaluator(config.evaluate, tokenizer, config.data.sequence_length)
    about_data = examine_data(config, dataset)
    steps, origin = total_steps(args, dataset, config.data.global_batch), made_of(config, args, dataset, evaluator)
    checkpoint, step = start_point(config, origin, steps)
    if step >= steps and is_complete(config, step):
        comm.say(f"train: {folder} is finished, with {step} steps; resume=never begins again")
        return
    model, loading_rss = _load(config, checkpoint)
    origin |= checked_weights(config, model, checkpoint)
    modules = _targets(config, model)
    with Tracker(config) as tracker:
        with comm.failing_together():  # nothing is written before all that a user may have got wrong has been checked
            if comm.is_main():
                with writing(folder):
                    save_config(config, folder / "config.yaml")
                    (folder / "environment.txt").write_text(environment())
                    tracker.artifact(write_report(about_data, folder))
                for file in (folder / "config.yaml", folder / "environment.txt", config.deepspeed):
                    tracker.artifact(file)
                tracker.metrics(counts(about_data))
        basis = _bases(config, PartitionSource(modules)) if config.adapter.method == "mica" else None
        if basis:
            tracker.metrics(basis.costs())
            tracker.artifact(basis.folder / "manifest.json", under="basis")
        tracker.tags(fingerprints(origin, basis))
        model = attach(config, model, modules, basis, checkpoint)
        trainable = count_parameters(model)
        comm.say(f"training: {trainable:,} parameters of {config.adapter.method}, {args.world_size} ranks")
        if comm.is_main():
            remove_checkpoints(folder / "checkpoints", after=step)
            (folder / SUMMARY).unlink(missing_ok=True)
        if step < steps:
            frozen = frozen_tensors(modules, basis, checkpoint)
            facts = {"basis_seconds": basis.seconds if basis else 0.0}
            trainer = build_trainer(config, model, args, dataset, evaluator, tracker, origin, frozen, facts)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            checkpoint, engine = trainer.saved, trainer.model_wrapped
            if trainer.run.is_preempted:
                stopped = Preempted(
                    f"stopped by a signal: {checkpoint} holds all; start again with resume=auto to go on"
                )
                stopped.agreed = True
                raise stopped
        else:
            engine = inference_engine(model, args)
        assert checkpoint  # the last step has written one
        after = evaluator.score(engine)
        tracker.metrics(after.found(), steps)
        _save_probe(engine, dataset[0]["input_ids"][:32].tolist(), folder / "probe.safetensors")
        summary = {
            "knowledge_after": after.knowledge,
            "retention_after": after.retention,
            "questions": evaluator.questions,
            "chance": evaluator.chance,
            "trainable_parameters": trainable,
            "lora_trainable_parameters": lora_parameters(modules, config.adapter.r),
            "peak_rss_bytes": comm.gather(peak_rss()),
            "loading_rss_bytes": comm.gather(loading_rss),
            "world_size": args.world_size,
            "hosts": len(set(comm.gather(socket.gethostname()))),
        }
        with comm.failing_together():
            if comm.is_main():
                summary |= _trained(checkpoint)
                with writing(folder):
                    exported = export_checkpoint(config, checkpoint)
                    comm.say(f"export: {exported}")
                    _record(config, summary, read_history(checkpoint), basis, exported, tracker)
                print_summary(summary, config)


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
    if checkpoint:
        with comm.failing_together():
            check_origin(checkpoint, fixed_settings(config))
    model, _ = _load(config, checkpoint)
    if checkpoint:
        checked_weights(config, model, checkpoint)
        modules = _targets(config, model)
        bases = _bases(config, PartitionSource(modules)) if config.adapter.method == "mica" else None
        model = attach(config, model, modules, bases, checkpoint)
    scores = evaluator.score(inference_engine(model, args))
    evaluated = {
        "checkpoint": checkpoint.name if checkpoint else None,
        **dataclasses.asdict(scores),
    }
    comm.say(json.dumps(evaluated))
    if comm.is_main():
        (folder / "evaluation.json").write_text(json.dumps(evaluated, indent=1))


def export(config: Config, is_merged: bool = False) -> None:
    """Export the newest checkpoint of the run folder, merged into its base, or by rank 0 as an adapter. Collective."""
    checkpoint = find_checkpoint(config.output_dir / "checkpoints")
    with comm.failing_together():
        if checkpoint is None:
            raise UserError(f"{config.output_dir} holds no checkpoint to export; run `mica-ds train` first")
    if is_merged:
        comm.say(f"export: {merge_checkpoint(config, checkpoint)}")
        return
    with comm.failing_together():
        if comm.is_main():
            with writing(config.output_dir):
                comm.say(f"export: {export_checkpoint(config, checkpoint)}")


def doctor(config: Config, as_json: bool) -> None:
    """Check machine, links, files and settings on every rank, and print what is wrong with what. Collective."""
    results = examine(config)
    if comm.is_main():
        print_results(results, as_json)
    if failed := [result.name for result in results if not result.is_good]:
        error = UserError(f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}")
        error.agreed = True
        raise error


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


def _load(config: Config, checkpoint: Path | None) -> tuple[Any, int]:
    """The partitioned model, and by how much this rank's peak memory exceeds what it held before loading (bytes).

    After full fine-tuning a checkpoint holds all weights, and the base is not read.
    """
    started, before = time.perf_counter(), rss()
    weights = tensor_files(checkpoint) if checkpoint and config.adapter.method == "full" else None
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


def _trained(checkpoint: Path) -> dict[str, Any]:
    """The figures of the training itself, over all starts of the run. Local."""
    state, history = read_state(checkpoint), read_history(checkpoint)
    return {
        **state["run"],
        "tokens_per_second": state["run"]["tokens"] / state["run"]["train_seconds"],
        "final_loss": [entry["loss"] for entry in history if "loss" in entry][-1],
        "steps": state["step"],
    }


def _scores(history: list[dict[str, float]], summary: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Knowledge and retention over the steps, before, during and after training, where they were measured. Local."""
    found = {}
    for key in ("knowledge", "retention"):
        if summary[f"{key}_after"] is not None:
            during = [(int(entry["step"]), entry[key]) for entry in history if key in entry]
            found[key] = [*during, (summary["steps"], summary[f"{key}_after"])]
    return found


def _record(
    config: Config,
    summary: dict[str, Any],
    history: list[dict[str, float]],
    basis: Basis | None,
    exported: Path,
    tracker: Tracker,
) -> None:
    """Write the plots, the report and at last the summary, and log them with the rest of the run. Local, on rank 0."""
    folder = config.output_dir
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figures.plot_loss(
        [int(step) for step, _ in losses],
        [loss for _, loss in losses],
        folder / "loss.png",
    )
    tracker.artifact(folder / "loss.png")
    if scores := figures.plot_scores(_scores(history, summary), folder / "scores.png"):
        tracker.artifact(scores)
    if basis:
        figures.plot_spectrum(basis.manifest, folder / "spectrum.png")
        tracker.artifact(folder / "spectrum.png")
    if config.adapter.method != "full":  # a whole model stays in the run folder
        tracker.artifact(exported, under="adapter")
        if config.tracking.register_as:
            tracker.register(config.tracking.register_as, under="adapter")
    numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    ranks = {f"{key}_max": max(value) for key, value in summary.items() if isinstance(value, list)}
    tracker.metrics({**numbers, **ranks}, step=summary["steps"])
    tracker.artifact(write_page(config, summary, history, basis.manifest if basis else None))
    tracker.artifact(write_summary(summary, folder))
