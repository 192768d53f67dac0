"""The verbs, each from config to result in one screen."""

import math
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments, set_seed

from mica_ds import comm, figures, tracking
from mica_ds.adapter import lora_parameters, stored_targets, target_modules
from mica_ds.arguments import accumulation_steps, total_steps, training_arguments
from mica_ds.basis import Basis, build_basis, warnings
from mica_ds.capacity import check_capacity
from mica_ds.checkpoint import load_trained, read_history, tensor_files
from mica_ds.config import Config, EvaluateSettings, fixed_settings
from mica_ds.data import build_dataset
from mica_ds.doctor import examine, print_results
from mica_ds.draft import check_absent, draft_questions, most_open, read_sources, without_sentences, write_jsonl
from mica_ds.errors import Preempted, UserError
from mica_ds.evaluate import Evaluator
from mica_ds.export import export_checkpoint
from mica_ds.memory import hint, note_largest, trim
from mica_ds.merge import merge_checkpoint
from mica_ds.meter import peak_rss, rss
from mica_ds.model import DTYPES, count_parameters, load_model, load_skeleton, load_tokenizer
from mica_ds.overlap import examine as examine_data
from mica_ds.packing import check_packing
from mica_ds.parallelism import check_parallelism, unshared
from mica_ds.record import discard_after, open_run_folder, record_beginning, record_end, save_probe, trained
from mica_ds.report import SUMMARY, print_evaluation, print_summary, write_evaluation
from mica_ds.resume import (
    attach,
    base_scores,
    checked_weights,
    chosen_checkpoint,
    exported_checkpoint,
    fingerprints,
    frozen_tensors,
    is_complete,
    is_own,
    landmarks,
    made_of,
    restarted,
    start_point,
)
from mica_ds.scores import MEASURES, Scores, compare, is_scored, write_rows
from mica_ds.shards import CheckpointSource, PartitionSource, WeightSource
from mica_ds.shelf import check_origin, read_state, writing
from mica_ds.suites import Marks, compare_suites, load_suites, score_suites
from mica_ds.tracking import Tracker
from mica_ds.trainer import build_trainer, check_liger, inference_engine
from mica_ds.weights import open_checkpoint


def train(config: Config) -> None:
    """Bases, training, evaluation before and after, export, tracking and a closing table. Collective."""
    folder = open_run_folder(config)
    config = restarted(config)
    with comm.failing_together():
        load_skeleton(config.model)  # or refuse it, before every model is partitioned
        check_parallelism(config)
        check_packing(config)
        check_liger(config)
    # Before `training_arguments`, after which every model is partitioned. A finished run has fitted already, and may
    # have come to a smaller machine: it is warned alone.
    check_capacity(config.model_copy(update={"capacity": "warn"}) if (folder / SUMMARY).exists() else config)
    with comm.failing_together():
        args = training_arguments(config, accumulation_steps(config, comm.world_size()))
        tokenizer = load_tokenizer(config.model)
    set_seed(args.seed)
    dataset = build_dataset(config.data, tokenizer, args.seed)
    evaluator = Evaluator(config.evaluate, tokenizer, config.data.sequence_length)
    about_data = examine_data(config, dataset)
    steps, origin = total_steps(args, dataset, config.data.global_batch), made_of(config, args, dataset, evaluator)
    there = landmarks(folder) if comm.is_main() else {}
    checkpoint, step, is_over = start_point(config, origin, steps)
    past = step if is_own(checkpoint, config) else -1
    if is_over and past == step and is_complete(config, step):
        comm.say(f"train: {folder} is finished, with {step} steps; resume=never begins again")
        if comm.is_main():
            tracking.finish(folder, config.tracking.uri)
        return
    model, loading_rss = _load(config, checkpoint)
    origin |= checked_weights(config, model, checkpoint)
    modules = _targets(config, model)
    settings = config.model_dump(mode="json")

    def check() -> None:
        if landmarks(folder) != there:
            raise UserError(f"output_dir: another run has worked in {folder} since this one has looked: start again")

    with Tracker(folder, config.tracking, settings, config.resume == "never", check) as tracker:
        # Once all that a user may have got wrong has been checked, and no other job is at work in the folder.
        discard_after(past, config)
        record_beginning(config, about_data, tracker)
        basis = _bases(config, PartitionSource(modules)) if config.adapter.method == "mica" else None
        if basis:
            tracker.metrics(basis.costs())
            tracker.artifact(basis.folder / "manifest.json", under="basis")
        tracker.tags(fingerprints(origin, basis))
        model = attach(config, model, modules, basis, checkpoint)
        trim()
        comm.advise(hint(config, "training"))
        trainable = count_parameters(model)
        comm.say(f"training: {trainable:,} parameters of {config.adapter.method}, {args.world_size} ranks")
        scores = None
        if not is_over:
            frozen = frozen_tensors(config, model, modules, basis, checkpoint)
            facts: dict[str, Any] = {"basis_seconds": basis.seconds if basis else 0.0}
            if basis:
                facts["basis_fingerprint"] = basis.manifest["fingerprint"]
            trainer = build_trainer(config, model, args, dataset, evaluator, tracker, origin, frozen, facts)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            checkpoint, engine, scores = trainer.saved, trainer.model_wrapped, trainer.run.scores
            if trainer.run.is_preempted:
                raise Preempted(
                    f"stopped by a signal: {checkpoint} holds all; start again with resume=auto to go on", agreed=True
                )
        else:
            engine = inference_engine(config, model, args)
        assert checkpoint  # the last step has written one
        history = read_history(checkpoint)
        last = read_state(checkpoint)["step"]
        after = _last_scores(evaluator, engine, last, scores, history, tracker)
        best = exported_checkpoint(config, checkpoint, history)
        if best != checkpoint:
            comm.say(f"export: {best.name} is the best one, and is exported instead of the last, {checkpoint.name}")
            load_trained(engine, best)
            after = evaluator.score(engine)
        before = base_scores(config, evaluator, engine, checkpoint)
        save_probe(engine, dataset[0]["input_ids"][:32].tolist(), folder)
        summary = {
            "exported_step": read_state(best)["step"],
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
                summary |= compare(before, after) | trained(checkpoint)
                with writing(folder):
                    exported = export_checkpoint(config, best)
                    comm.say(f"export: {exported}")
                    for name, found in (("before", before), ("after", after)):
                        write_rows(found.rows if found else [], folder, name)
                    record_end(config, summary, history, basis, exported, tracker)
                print_summary(summary, config)


def basis(config: Config) -> None:
    """The bases alone, into the run folder's cache, from which `train` starts at once. Collective."""
    if config.adapter.method != "mica":  # as in a pipeline for all methods
        comm.say(f"bases: nothing to do, adapter.method={config.adapter.method} has none")
        return
    open_run_folder(config)
    with comm.failing_together():
        checkpoint = open_checkpoint(config.model.path)
        targets = stored_targets(load_skeleton(config.model), config.adapter, checkpoint)
    found = _bases(config, CheckpointSource(targets, DTYPES[config.model.dtype]))
    with comm.failing_together():
        if comm.is_main():
            with writing(config.output_dir):
                figures.plot_spectrum(found.manifest, config.output_dir / "spectrum.png")


def evaluate(config: Config) -> None:
    """Score the run folder's checkpoint and the base model under it, or alone where there is none. Collective."""
    config = unshared(config)
    folder = open_run_folder(config)
    with comm.failing_together():
        settings = config.evaluate
        if not (settings.questions or settings.domain or settings.retention or settings.suites):
            raise UserError(
                "nothing to evaluate: set evaluate.questions, evaluate.domain, evaluate.retention or evaluate.suites"
            )
        load_skeleton(config.model)  # as in `train`
        args = training_arguments(config)
        tokenizer = load_tokenizer(config.model)
    evaluator, suites = Evaluator(settings, tokenizer, config.data.sequence_length), load_suites(settings)
    checkpoint = chosen_checkpoint(config)
    if checkpoint:
        with comm.failing_together():
            check_origin(checkpoint, fixed_settings(config))
    model, _ = _load(config, checkpoint)
    if checkpoint:
        checked_weights(config, model, checkpoint)
        modules = _targets(config, model)
        model = attach(config, model, modules, None, checkpoint)
    engine = inference_engine(config, model, args)

    def run_suites(name: str) -> dict[str, Marks]:
        return score_suites(suites, evaluator.runner, engine, folder, name)

    after, suites_after = evaluator.score(engine), run_suites("checkpoint" if checkpoint else "base")
    before = base_scores(config, evaluator, engine, checkpoint) if checkpoint else None
    suites_before: dict[str, Marks] = {}
    if checkpoint and config.adapter.method != "full":  # which leaves no base model to compare with
        with cast(PeftModel, engine.module).disable_adapter():
            suites_before = run_suites("base")
    with comm.failing_together():
        if comm.is_main():
            evaluated = {
                "checkpoint": checkpoint.name if checkpoint else None,
                **{measure: after.found().get(measure) for measure in MEASURES},
                **compare(before, after),
                "suites": compare_suites(suites_before, suites_after),
            }
            with writing(folder):
                for name, found in (("base", before), ("checkpoint", after)) if checkpoint else (("base", after),):
                    write_rows(found.rows if found else [], folder, name)
                write_evaluation(evaluated, folder)
            print_evaluation(evaluated, config)


def questions(config: Config, output: Path, number: int, held_out: Path | None, by_model: bool) -> None:
    """Draft questions from the documents, and where asked for write these without what is asked. Collective."""
    with comm.failing_together():
        check_absent([output, held_out] if held_out else [output])
        documents = read_sources([source.path for source in config.data.corpus], config.data.broken == "skip")
        seed = config.train.get("seed", TrainingArguments.seed)
        drafts = draft_questions(documents, 3 * number if by_model else number, seed)
        if not drafts:
            raise UserError("data.corpus holds no sentence with a name or number and three others to mistake it for")
    if by_model:
        drafts = most_open(drafts, _losses(config, drafts), number)
    with comm.failing_together():
        if comm.is_main():
            write_jsonl(drafts, output)
            if held_out:
                write_jsonl(without_sentences(documents, drafts), held_out)
            comm.say(f"questions: {len(drafts)} drafts from {len(documents)} documents in {output}; correct them first")


def _losses(config: Config, drafts: list[dict[str, Any]]) -> list[list[float]]:
    """The base model's loss of each option of the drafts. Collective."""
    config = unshared(config)
    with comm.failing_together():
        load_skeleton(config.model)  # as in `train`
        args, tokenizer = training_arguments(config), load_tokenizer(config.model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "drafts.jsonl"
        write_jsonl(drafts, file)
        settings = EvaluateSettings(questions=file, batch_tokens=config.evaluate.batch_tokens)
        evaluator = Evaluator(settings, tokenizer, config.data.sequence_length)
    scores = evaluator.score(inference_engine(config, _load(config, None)[0], args))
    return [row["losses"] for row in scores.rows]


def export(config: Config, is_merged: bool) -> None:
    """Export the newest checkpoint, or the best, merged into its base, or by rank 0 as an adapter. Collective."""
    checkpoint = chosen_checkpoint(config)
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
        raise UserError(f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}", agreed=True)


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
    trim()
    return model, peak_rss() - before


def _bases(config: Config, source: WeightSource) -> Basis:
    seed = config.train.get("seed", TrainingArguments.seed)
    note_largest(max((matrix.shape for matrix in source.matrices), key=math.prod, default=(0, 0)))
    comm.advise(hint(config, "computing bases"))
    found = build_basis(source, config.adapter, config.basis, seed, config.output_dir / "basis")
    how = f"{found.solved} solved" if found.solved else "all from the cache"
    comm.say(f"bases: {len(source.matrices)} matrices, r = {config.adapter.r}, {how}, {found.seconds:.1f} s")
    for warning in warnings(found.manifest):
        comm.say(f"warning: {warning}")
    return found


def _last_scores(
    evaluator: Evaluator,
    engine: nn.Module,
    step: int,
    found: tuple[int, Scores] | None,
    history: list[dict[str, float]],
    tracker: Tracker,
) -> Scores:
    """The last step's scores: those that its training has `found`, or new ones, also for the history. Collective."""
    if found and found[0] == step:
        return found[1]
    scores = evaluator.score(engine)
    if not is_scored(history, step):
        tracker.metrics(scores.found(), step)
        history.append({**scores.found(), "step": step})
    return scores
