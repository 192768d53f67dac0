"""What a study's results say: a row for each run, the choice of learning rates, and how the arms compare."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from mica_ds.arms import Run, StudySettings
from mica_ds.errors import UserError
from mica_ds.files import replace_text
from mica_ds.statistics import Interval, mean_interval, paired_interval

_NOISE = 1e-3  # by what the base model's perplexity may differ between numbers of ranks, relative

Marks = Annotated[str, Field(pattern="^[01]+$")]


@dataclass(frozen=True)
class Result:
    """One run, as a line of `results.jsonl`; the same names as in its summary."""

    arm: str
    learning_rate: float
    seed: int
    steps: int
    tokens: int
    trainable_parameters: int
    train_seconds: float
    tokens_per_second: float
    final_loss: float
    chance: float
    retention_before: float
    retention_after: float
    right_before: Marks
    """Of each question, in the order of the file: 1 where it was answered right, else 0."""
    right_after: Marks

    @property
    def forgetting(self) -> float:
        """Perplexity of the held-out text, after to before; infinite where training diverged."""
        ratio = self.retention_after / self.retention_before
        return math.inf if math.isnan(ratio) else ratio

    @property
    def has_diverged(self) -> bool:
        """Whether the run ended without a finite loss, of its last steps or of the held-out text."""
        return not (math.isfinite(self.final_loss) and math.isfinite(self.forgetting))

    @property
    def knowledge(self) -> float:
        """Share of the questions answered right after training."""
        return self.right_after.count("1") / len(self.right_after)


@dataclass(frozen=True)
class Choice:
    """The learning rate of an arm, and what is to be said about it."""

    learning_rate: float
    is_within_bound: bool
    is_at_edge: bool
    """It is the lowest or the highest of several: a better one may lie outside of what was swept."""
    beyond: float | None = None
    """A rate that knew more, but forgot more than the bound allows."""


@dataclass(frozen=True)
class Standing:
    """An arm's runs of the result, over its seeds."""

    results: list[Result]
    scores: list[float]
    """Of each question, the share of the seeds that answered it right."""
    knowledge: Interval
    forgetting: float
    """Geometric mean over the seeds."""


def read_run(run: Run) -> Result:
    """The result of a finished run, from its folder. Local.

    Raises: UserError without multiple-choice questions, or where another version has left what lacks something.
    """
    try:
        summary = json.loads((run.folder / "summary.json").read_text())
        right = {f"right_{when}": _right(run.folder / "evaluation" / f"{when}.jsonl") for when in ("before", "after")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.folder} cannot be read ({error!r}); remove the folder to run it again") from None
    names = {field.name for field in dataclasses.fields(Result)}
    known: dict[str, Any] = {key: value for key, value in summary.items() if key in names}
    known |= right
    known |= {"arm": run.arm, "learning_rate": run.learning_rate, "seed": run.seed}
    try:
        return TypeAdapter(Result).validate_python(known)
    except ValidationError as error:
        what = ", ".join(str(one["loc"][0]) for one in error.errors())
        raise UserError(
            f"{run.folder}/summary.json has no valid {what}: of another version; remove the folder to run it again"
        ) from None


def write_results(results: list[Result], file: Path) -> None:
    """Write results, one a line, whole or not at all. Local."""
    replace_text(file, "".join(json.dumps(dataclasses.asdict(result)) + "\n" for result in results))


def read_results(file: Path) -> list[Result]:
    """Read results. Local. Raises: UserError that names the line."""
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    results = []
    for number, line in enumerate(lines, 1):
        try:
            results.append(TypeAdapter(Result).validate_json(line))
        except ValidationError:
            raise UserError(f"{file}, line {number} is no result of a study's run") from None
    return results


def choose(results: list[Result], max_forgetting: float) -> Choice:
    """The best rate of one arm's sweep: the most knowledge within the bound, else the least forgetting. Local.

    Between equals it is the one that forgets less, and then the lower rate; never one at which training diverged.
    Raises: UserError where it did at all of them.
    """
    sound = [result for result in results if not result.has_diverged]
    if not sound:
        raise UserError(f"{results[0].arm}: training diverged at each of its learning_rates; give it lower ones")
    within = [result for result in sound if result.forgetting <= max_forgetting]
    best = min(
        within or sound,
        key=lambda result: (-result.knowledge if within else 0, result.forgetting, result.learning_rate),
    )
    rates = sorted(result.learning_rate for result in results)
    most = max(sound, key=lambda result: result.knowledge)
    return Choice(
        best.learning_rate,
        is_within_bound=bool(within),
        is_at_edge=len(rates) > 1 and best.learning_rate in (rates[0], rates[-1]),
        beyond=most.learning_rate if within and most.knowledge > best.knowledge else None,
    )


def choices(study: StudySettings, results: list[Result]) -> dict[str, Choice]:
    """The choice for each arm whose sweep is complete, in the study's order. Local. Raises: UserError as `choose`."""
    found = {}
    for arm, rates in study.learning_rates.items():
        swept = [result for result in results if result.arm == arm and result.seed == study.pick]
        if {result.learning_rate for result in swept} >= set(rates):
            found[arm] = choose([result for result in swept if result.learning_rate in rates], study.max_forgetting)
    return found


def standings(study: StudySettings, results: list[Result]) -> dict[str, Standing]:
    """Each arm's result over the study's seeds at its chosen rate, in the study's order. Local.

    Raises: UserError where a run is missing, or the runs had not the same data and budget, or as `choose`.
    """
    check_budget(results)
    chosen = choices(study, results)
    found = {}
    for arm in study.arms:
        rate = chosen[arm].learning_rate if arm in chosen else None
        mine = {result.seed: result for result in results if result.arm == arm and result.learning_rate == rate}
        if missing := [seed for seed in study.seeds if seed not in mine]:
            raise UserError(
                f"the study is not complete: {arm} has "
                + (f"no result of seed {missing[0]}" if arm in chosen else f"not all rates of seed {study.pick}")
            )
        found[arm] = _standing([mine[seed] for seed in study.seeds])
    return found


def compare(reference: Standing, arm: Standing) -> Interval:
    """An arm minus another in knowledge, question by question, each question's score averaged over the seeds. Local."""
    return paired_interval(reference.scores, arm.scores)


def check_budget(results: list[Result]) -> None:
    """Refuse results that had not all the same steps, questions and base model, and for a seed the same tokens. Local.

    The base model's perplexity tells other held-out text, and another model under the same name.
    Raises: UserError that names two runs that differ.
    """
    first: dict[tuple[str, int | None], tuple[Result, Any]] = {}
    for result in results:
        for what, seed, fact in (
            ("steps", None, result.steps),
            ("questions", None, (len(result.right_before), len(result.right_after))),
            ("the base model's perplexity", None, result.retention_before),
            ("tokens", result.seed, result.tokens),
        ):
            other, theirs = first.setdefault((what, seed), (result, fact))
            is_same = math.isclose(fact, theirs, rel_tol=_NOISE) if isinstance(fact, float) else fact == theirs
            if not is_same:
                raise UserError(
                    f"not the same data and budget: {_name(other)} and {_name(result)} differ in {what}, "
                    f"{theirs} and {fact}"
                )


def _standing(results: list[Result]) -> Standing:
    answers = np.array([[character == "1" for character in result.right_after] for result in results], dtype=float)
    scores = answers.mean(axis=0).tolist()
    logs = [math.log(result.forgetting) for result in results]
    return Standing(results, scores, mean_interval(scores), math.exp(sum(logs) / len(logs)))


def _right(file: Path) -> str:
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    right = "".join("1" if row["right"] else "0" for row in rows if "right" in row)
    if not right:
        raise UserError(f"{file} holds no multiple-choice question; a study compares by these")
    return right


def _name(result: Result) -> str:
    return f"{result.arm} at {result.learning_rate:g} with seed {result.seed}"
