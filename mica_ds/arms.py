"""A study's settings: arms × learning rates × seeds, as runs that differ in nothing else."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from mica_ds.config import Config, EvaluateSettings, load_config
from mica_ds.errors import UserError
from mica_ds.settings import Section, flatten, read_settings

# What the study itself sets for each run, and what an arm may set: the rest is the same data and budget for all.
_OWN = ("train.learning_rate", "train.seed", "output_dir", "resume", "tracking.parent", "checkpoint.max_skipped")
_BUDGET = ("train.max_steps", "train.num_train_epochs", "train.data_seed")
_OF_AN_ARM = ("adapter.", "train.")
# What may differ between the starts of one run.
_INCIDENTAL: dict[str, bool | set[str]] = {
    **dict.fromkeys(("tracking", "resume", "patience", "deepspeed", "capacity"), True),
    "checkpoint": {"keep", "max_skipped"},
    "data": {"cache"},
    "evaluate": {"batch_tokens"},
}
_NEVER = 10**9  # steps: where training diverges, that is a result, and no failure to be tried again


class StudySettings(Section):
    base: Path
    """The config that all runs share."""
    settings: dict[str, Any] = Field(default={})
    """What replaces the base's settings in all runs, by dotted keys as on the command line: train.max_steps: 40."""
    arms: dict[str, dict[str, Any]] = Field(min_length=2)
    """By name: the settings that make an arm, as adapter.method: lora."""
    learning_rates: dict[str, list[PositiveFloat]]
    """The rates swept for each arm, the same number for all; one list alone is for every arm."""
    pick: NonNegativeInt
    """The seed on which each arm's rate is chosen; its runs are in no result."""
    seeds: list[NonNegativeInt] = Field(min_length=1)
    """The seeds of the result."""
    max_forgetting: float = Field(default=1.3, gt=1, allow_inf_nan=False)
    """A rate is chosen among those with at most this ratio of the held-out text's perplexity, after to before."""
    subject: str
    """The arm that the study is about: it is compared with each other one."""
    reference: str
    """The arm that each other one is compared with in the table."""
    parallel: PositiveInt = 1
    """Runs at a time."""
    ranks: PositiveInt | None = None
    """Ranks of a run where all runs are on this machine: they share its cores with the runs beside them (NUM_RANKS and
    OMP_NUM_THREADS are set accordingly). None leaves both to `launch`."""
    launch: list[str] = Field(default=["bash", "launch/train.sh"], min_length=1)
    """The command that trains, to which the base and the run's settings are added; it ends with the run."""
    output_dir: Path
    """The study's folder: a run folder for each run, the results, and what is made of them."""

    @field_validator("settings", mode="before")
    @classmethod
    def _flatten_settings(cls, value: Any) -> Any:
        return flatten(value) if isinstance(value, dict) else value

    @field_validator("arms", mode="before")
    @classmethod
    def _flatten_arms(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {arm: flatten(settings) if isinstance(settings, dict) else settings for arm, settings in value.items()}

    @model_validator(mode="before")
    @classmethod
    def _spread_rates(cls, data: Any) -> Any:
        if isinstance(data.get("learning_rates"), list) and isinstance(data.get("arms"), dict):
            return {**data, "learning_rates": dict.fromkeys(data["arms"], data["learning_rates"])}
        return data


@dataclass(frozen=True)
class Run:
    """One run of a study: its place in it, its folder, and the settings that `mica-ds train` gets."""

    arm: str
    learning_rate: float
    seed: int
    folder: Path
    overrides: tuple[str, ...]

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds all: the summary is written last."""
        return (self.folder / "summary.json").exists()

    def __str__(self) -> str:
        return f"{self.arm}, learning rate {self.learning_rate:g}, seed {self.seed}"


def load_study(path: Path, overrides: list[str] | None = None) -> StudySettings:
    """Read a study's YAML, and check that it is fair and that each arm's config is valid. Local. Raises: UserError."""
    study = read_settings(StudySettings, path, overrides)
    try:
        _check(study)
        for arm, rates in study.learning_rates.items():
            config = run_config(study, make_run(study, arm, rates[0], study.pick))
        _check_evaluation(study.base, config.evaluate)  # the same for all arms
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return study


def make_run(study: StudySettings, arm: str, rate: float, seed: int) -> Run:
    """The run of an arm at a learning rate with a seed. Local."""
    folder = study.output_dir / arm / f"lr-{rate!r}" / f"seed-{seed}"
    settings = {
        **study.settings,
        **study.arms[arm],
        "train.learning_rate": rate,
        "train.seed": seed,
        "output_dir": str(folder),
        "checkpoint.max_skipped": _NEVER,
    }
    return Run(arm, rate, seed, folder, tuple(f"{key}={json.dumps(value)}" for key, value in settings.items()))


def sweep(study: StudySettings) -> list[Run]:
    """The runs by which each arm's learning rate is chosen. Local."""
    return [make_run(study, arm, rate, study.pick) for arm, rates in study.learning_rates.items() for rate in rates]


def trials(study: StudySettings, chosen: dict[str, float]) -> list[Run]:
    """The runs of the result, at each arm's chosen rate. Local."""
    return [make_run(study, arm, rate, seed) for seed in study.seeds for arm, rate in chosen.items()]


def run_config(study: StudySettings, run: Run) -> Config:
    """The run's whole config. Local. Raises: UserError."""
    return load_config(study.base, list(run.overrides))


def check_folder(study: StudySettings, run: Run) -> None:
    """Refuse a run folder that was made with other settings than the study has now. Local. Raises: UserError."""
    try:
        config = load_config(run.folder / "config.yaml")
    except UserError:
        if run.is_finished:
            raise
        return  # there is none yet, or a crash has left half of it
    made, wanted = _comparable(config), _comparable(run_config(study, run))
    for key in sorted(made.keys() | wanted.keys()):
        if made.get(key) != wanted.get(key):
            raise UserError(
                f"{run.folder} was made with {key}={made.get(key)!r}, and the study has {wanted.get(key)!r}: "
                "set that back, remove the folder, or choose another output_dir"
            )


def _comparable(config: Config) -> dict[str, Any]:
    return flatten(config.model_dump(mode="json", exclude=_INCIDENTAL))


def _check_evaluation(base: Path, settings: EvaluateSettings) -> None:
    if settings.questions is None or settings.retention is None:
        raise UserError(f"base: {base} must set evaluate.questions and evaluate.retention")
    if settings.patience:
        raise UserError("evaluate.patience would give runs different numbers of steps: set it to 0 under settings")
    from mica_ds.questions import Choice, read_questions  # transformers, which other verbs need not wait for

    if not any(isinstance(question, Choice) for question in read_questions(settings.questions)):
        raise UserError(
            f"evaluate.questions: {settings.questions} holds no multiple-choice question; a study compares by these"
        )


def _check(study: StudySettings) -> None:
    for arm in study.arms:
        if not re.fullmatch(r"\w[\w.-]*", arm):
            raise UserError(f"arms: {arm!r} is no name for a folder; use letters, digits, - and _")
    if study.arms.keys() != study.learning_rates.keys():
        odd = ", ".join(sorted(study.arms.keys() ^ study.learning_rates.keys()))
        raise UserError(f"learning_rates: must name the same arms as arms does; only one of the two has {odd}")
    numbers = {arm: len(set(rates)) for arm, rates in study.learning_rates.items()}
    if len(set(numbers.values())) > 1 or 0 in numbers.values():
        told = ", ".join(f"{arm} {number}" for arm, number in numbers.items())
        raise UserError(f"learning_rates: each arm must get as many rates as the others, not {told}")
    if len(set(study.seeds)) < len(study.seeds):
        raise UserError("seeds: a seed stands there twice, and would count twice")
    if study.pick in study.seeds:
        raise UserError(
            f"pick: seed {study.pick} chooses the rates, so a result that includes it is biased; take it out of seeds"
        )
    for key in ("subject", "reference"):
        if (arm := getattr(study, key)) not in study.arms:
            raise UserError(f"{key}: {arm!r} is none of the arms, {', '.join(study.arms)}")
    if study.subject == study.reference:
        raise UserError(f"subject and reference are both {study.subject}; name two arms")
    for where, settings in {"settings": study.settings, **{f"arms.{arm}": s for arm, s in study.arms.items()}}.items():
        for key in settings:
            if key in _OWN:
                raise UserError(f"{where}: {key} is set by the study itself for each run")
            if where != "settings" and (key in _BUDGET or not key.startswith(_OF_AN_ARM)):
                raise UserError(f"{where}: {key} must be the same for all arms; set it under settings")
