"""Whether a run begins, goes on or is over, and what a checkpoint must agree with for that."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from mica_ds import comm
from mica_ds.adapter import attach_adapter, first_factors, frozen_factors
from mica_ds.basis import Basis
from mica_ds.best import is_out_of_patience, ranked_steps
from mica_ds.checkpoint import read_frozen, read_history, read_tensors
from mica_ds.config import Config, fixed_settings
from mica_ds.data import Sequences
from mica_ds.errors import UserError
from mica_ds.evaluate import Evaluator
from mica_ds.export import export_folder
from mica_ds.files import replace_text
from mica_ds.fingerprint import WEIGHTS, fingerprint_model
from mica_ds.model import persistent_buffers
from mica_ds.report import SUMMARY
from mica_ds.scores import MEASURES, Scores
from mica_ds.shelf import (
    ARCHITECTURE,
    STATE,
    check_origin,
    checkpoint_folder,
    checkpoints_in,
    find_best,
    find_checkpoint,
    read_state,
)

_JOB = "slurm-job"  # holds the number of the SLURM job that has begun a run
_SCORED = "evaluate (SHA-256 of its questions and text)"
_UNRELATED = (
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def made_of(config: Config, args: TrainingArguments, dataset: Sequences, evaluator: Evaluator) -> dict[str, Any]:
    """What must be the same for a run to go on, by the keys of the config."""
    return {
        **fixed_settings(config),
        "data.sequence_length": config.data.sequence_length,
        "data.global_batch": config.data.global_batch,
        "train.seed": args.seed,
        "train.data_seed": args.data_seed,
        "data (SHA-256 of its tokens)": dataset.digest(),
        _SCORED: evaluator.digest,  # scores before and after are of the same
        ARCHITECTURE: _architecture(config),
    }


def _architecture(config: Config) -> str:
    """The SHA-256 of what a model's config.json says of its forward."""
    about = json.loads((config.model.path / "config.json").read_text(), object_hook=_without_unrelated)
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _without_unrelated(section: dict[str, Any]) -> dict[str, Any]:
    return {k: value for k, value in section.items() if k not in _UNRELATED and not k.endswith("_token_id")}


def checked_weights(config: Config, model: nn.Module, checkpoint: Path | None) -> dict[str, Any]:
    """The same for the base model, once it is loaded and before it has an adapter. Collective.

    Raises: UserError where the checkpoint was made from other weights.
    """
    if checkpoint and config.adapter.method == "full":  # it holds all weights, and the base was not read
        return {WEIGHTS: read_state(checkpoint)["origin"][WEIGHTS]}
    found = {WEIGHTS: fingerprint_model(model)}
    with comm.failing_together():
        if checkpoint:
            check_origin(checkpoint, found)
    return found


def fingerprints(origin: dict[str, Any], basis: Basis | None) -> dict[str, str]:
    """What says which weights a run is made of, for its records. Local."""
    found = {"fingerprint.model": origin[WEIGHTS]}
    return {**found, "fingerprint.basis": basis.manifest["fingerprint"]} if basis else found


def restarted(config: Config) -> Config:
    """The config, with resume=auto where SLURM starts a job again that has begun its run. Collective.

    A path or `never` is meant for the job's first start, which drops what it tells to drop. A path still holds where
    the job has come to no checkpoint of its own.
    """
    number, file = os.environ.get("SLURM_JOB_ID"), config.output_dir / _JOB
    has_begun = "SLURM_RESTART_COUNT" in os.environ and file.is_file() and file.read_text() == number
    is_past = config.resume == "never" or bool(checkpoints_in(config.output_dir / "checkpoints"))
    is_over = comm.gather(has_begun and is_past)[0]  # a file that is new comes late to other nodes
    return config.model_copy(update={"resume": "auto"}) if is_over else config


def note_job(folder: Path) -> None:
    """Note that this SLURM job has begun its run, for `restarted`. Local, on rank 0."""
    file, number = folder / _JOB, os.environ.get("SLURM_JOB_ID")
    if number and not (file.is_file() and file.read_text() == number):
        replace_text(file, number)


def start_point(config: Config, origin: dict[str, Any], steps: int) -> tuple[Path | None, int, bool]:
    """The checkpoint to go on from, its step, and whether that is the end; None and -1 for a new run. Collective."""
    if config.resume == "never":
        return None, -1, False
    chosen = config.resume if isinstance(config.resume, Path) else None
    checkpoint = find_checkpoint(config.output_dir / "checkpoints", chosen)
    if checkpoint is None:
        return None, -1, False
    with comm.failing_together():
        check_origin(checkpoint, origin)
        step = read_state(checkpoint)["step"]
        is_over = step >= steps or is_out_of_patience(read_history(checkpoint), config.evaluate)
    if not is_over:
        comm.say(f"resume: {checkpoint}, {steps - step} steps to go")
    elif step > steps:
        comm.say(
            f"warning: resume: {checkpoint} has more than the {steps} steps asked for already; nothing is left to train"
        )
    return checkpoint, step, is_over


def landmarks(folder: Path) -> dict[Path, int]:
    """What tells whether another run has worked in a run folder between two looks. Local, on rank 0."""
    found: dict[Path, int] = {}
    for file in (folder / SUMMARY, *(checkpoint / STATE for checkpoint in checkpoints_in(folder / "checkpoints"))):
        with suppress(OSError):  # there is none
            found[file] = file.stat().st_mtime_ns
    return found


def exported_checkpoint(config: Config, last: Path, history: list[dict[str, float]]) -> Path:
    """The last checkpoint, or with checkpoint.export=best that of the best evaluated step. Collective."""
    if config.checkpoint.export == "last":
        return last
    return find_best(last.parent, ranked_steps(history, config.evaluate)) or last


def chosen_checkpoint(config: Config) -> Path | None:
    """The run folder's newest checkpoint, or with checkpoint.export=best its best; None without any. Collective.

    Raises: UserError where a finished run has none any more: what is there is not the base model alone.
    """
    newest = find_checkpoint(config.output_dir / "checkpoints")
    with comm.failing_together():
        if newest is None and (config.output_dir / SUMMARY).exists():
            raise UserError(
                f"{config.output_dir} is finished, but its checkpoints are gone: what it trained is in "
                f"{export_folder(config)} alone"
            )
    if newest is None or config.checkpoint.export == "last":
        return newest
    return exported_checkpoint(config, newest, read_history(newest) + _scored_after(config, newest))


def _scored_after(config: Config, newest: Path) -> list[dict[str, float]]:
    """What a run has found of its last step after that had its checkpoint: of one that a signal had stopped there."""
    summary = _read_summary(config)
    if summary.get("steps") != read_state(newest)["step"] or summary["exported_step"] != summary["steps"]:
        return []
    found = {measure: summary[f"{measure}_after"] for measure in MEASURES}
    return [{**{key: value for key, value in found.items() if value is not None}, "step": summary["steps"]}]


def base_scores(config: Config, evaluator: Evaluator, engine: nn.Module, checkpoint: Path) -> Scores | None:
    """The base model's: of a full fine-tuning from the checkpoint, else from the cache or scored anew. Collective.

    None after a full fine-tuning whose checkpoint holds those of other questions or text.
    """
    state = read_state(checkpoint)
    before = state["run"]["before"] if state["origin"][_SCORED] == evaluator.digest else None
    if isinstance(before, dict):
        return Scores(**before)
    if config.adapter.method == "full":
        return None
    return evaluator.score_base(engine, state["origin"][WEIGHTS], config.data.cache, before)


def is_complete(config: Config, step: int) -> bool:
    """Whether the run folder holds all that the last step leaves: the summary is written last. Collective."""
    is_summed_up = _read_summary(config).get("steps") == step
    return comm.gather(is_summed_up and any(export_folder(config).glob("*.safetensors")))[0]


def is_own(checkpoint: Path | None, config: Config) -> bool:
    """Whether the run folder holds a checkpoint, by its hashes: beside another, what is there is not its past.

    True where there is none. Collective.
    """
    if checkpoint is None:
        return True
    own, _ = checkpoint_folder(config.output_dir / "checkpoints", read_state(checkpoint)["step"])
    return comm.gather(own.is_dir() and (own / STATE).read_bytes() == (checkpoint / STATE).read_bytes())[0]


def _read_summary(config: Config) -> dict[str, Any]:
    """What a finished run came to; empty where it is not finished, or the file is damaged."""
    try:
        found = json.loads((config.output_dir / SUMMARY).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def attach(
    config: Config,
    model: Any,
    modules: dict[str, nn.Module],
    basis: Basis | None,
    checkpoint: Path | None,
) -> nn.Module:
    """The model with its adapter: a checkpoint's where there is one, else a new one. Local, before DeepSpeed has it."""
    factors = None
    if config.adapter.method != "full" and checkpoint:
        factors = read_tensors(checkpoint)
    elif basis:
        factors = first_factors(modules, basis)
    return attach_adapter(model, modules, config.adapter, factors)


def frozen_tensors(
    config: Config, model: nn.Module, modules: dict[str, nn.Module], basis: Basis | None, checkpoint: Path | None
) -> dict[str, torch.Tensor]:
    """What checkpoints hold beside what trains, on rank 0. Local.

    MiCA's B, from an earlier one or the cache; with the whole model, its buffers.
    """
    if not comm.is_main():
        return {}
    if config.adapter.method == "full":
        return {name: buffer.detach().cpu().contiguous().clone() for name, buffer in persistent_buffers(model).items()}
    if basis is None:
        return {}
    return read_frozen(checkpoint) if checkpoint else frozen_factors(modules, basis)
