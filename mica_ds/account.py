"""A study told from its results alone: a table, what it supports in words, and two plots."""

from pathlib import Path

from mica_ds.arms import StudySettings
from mica_ds.findings import Choice, Result, Standing, choices, compare, standings
from mica_ds.scatter import Arm, plot_forgetting, plot_parameters
from mica_ds.statistics import Interval, mean_interval, paired_interval, points

TABLE, ACCOUNT, PLOTS = "table.md", "study.md", ("forgetting.png", "parameters.png")


def write_account(study: StudySettings, results: list[Result], folder: Path) -> list[Path]:
    """Write `table.md`, `study.md` and the plots of a complete study, and return their paths. Local.

    Raises: UserError where a run is missing, or the runs had not the same data and budget.
    """
    found, chosen = standings(study, results), choices(study, results)
    untrained = [float(character == "1") for character in results[0].right_before]
    base = mean_interval(untrained)
    table = "\n\n".join([_table(study, found, untrained), *_sentences(study, found, chosen)]) + "\n"
    (folder / TABLE).write_text(table)
    (folder / ACCOUNT).write_text(
        f"# {study.subject} against {', '.join(arm for arm in study.arms if arm != study.subject)}\n\n"
        f"{_method(study, found)}\n\n{table}\n"
        f"![knowledge against forgetting]({PLOTS[0]}) ![knowledge against parameters]({PLOTS[1]})\n\n"
        f"The sweep, seed {study.pick}; **bold** is the rate that was chosen:\n\n{_sweep(study, results, chosen)}\n"
    )
    arms = {
        arm: Arm(
            [result.forgetting for result in standing.results],
            [result.knowledge for result in standing.results],
            standing.knowledge,
            standing.results[0].trainable_parameters,
        )
        for arm, standing in found.items()
    }
    plot_forgetting(arms, base, study.max_forgetting, folder / PLOTS[0])
    plot_parameters(arms, base, folder / PLOTS[1])
    return [folder / name for name in (TABLE, ACCOUNT, *PLOTS)]


def warnings(study: StudySettings, chosen: dict[str, Choice]) -> list[str]:
    """What is to be known of the chosen rates, a sentence each. Local."""
    found = []
    for arm, choice in chosen.items():
        rate = f"{choice.learning_rate:g}"
        if not choice.is_within_bound:
            found.append(f"{arm}: no rate kept the perplexity within × {study.max_forgetting:g}; {rate} forgot least.")
        if choice.is_at_edge:
            found.append(f"{arm}: {rate} is at the edge of the rates swept; a better one may lie outside.")
        if choice.beyond:
            found.append(
                f"{arm}: {choice.beyond:g} knew more than {rate} in the sweep, but forgot more than the bound allows; "
                "a rate between the two may do better."
            )
    return found


def _method(study: StudySettings, found: dict[str, Standing]) -> str:
    one = found[study.subject].results[0]
    rates = len(study.learning_rates[study.subject])
    bound = f"× {study.max_forgetting:g}"
    return (
        f"{len(found)} arms on the same data: {one.steps} steps and {one.tokens:,} tokens each (of seed {one.seed}), "
        f"{len(one.right_after)} questions, of which guessing answers {one.chance:.0%}. Each arm had {rates} learning "
        f"{_plural('rate', rates)}, of which one was chosen on seed {study.pick}: of those that raised the perplexity "
        f"of general text to at most {bound}, the one with most questions right. The result is of "
        f"{_plural('seed', len(study.seeds))} {', '.join(map(str, study.seeds))} at that rate; the runs that chose it "
        "are no part of it. They chose it by the same questions, though, so the shares are somewhat too high, of every "
        "arm that had a choice."
    )


def _table(study: StudySettings, found: dict[str, Standing], untrained: list[float]) -> str:
    rows = [
        ["arm", "learning rate", "trained parameters", "questions right", "seed by seed", "minus base"],
        ["base model", "", "0", _share(mean_interval(untrained)), "", ""],
    ]
    rows[0] += [f"minus {study.reference}", "perplexity", "seconds"]
    rows[1] += ["", "× 1.00", ""]
    for arm, standing in found.items():
        one = standing.results[0]
        rows.append(
            [
                arm,
                f"{one.learning_rate:g}",
                f"{one.trainable_parameters:,}",
                _share(standing.knowledge),
                ", ".join(f"{100 * result.knowledge:.1f}" for result in standing.results),
                _points(paired_interval(untrained, standing.scores)),
                "" if arm == study.reference else _points(compare(found[study.reference], standing)),
                f"× {standing.forgetting:.2f}",
                f"{sum(result.train_seconds for result in standing.results) / len(standing.results):.0f}",
            ]
        )
    return _markdown(rows)


def _sentences(study: StudySettings, found: dict[str, Standing], chosen: dict[str, Choice]) -> list[str]:
    questions, seeds = len(found[study.subject].scores), len(study.seeds)
    others = [arm for arm in found if arm != study.subject]
    compared = []
    for arm in others:
        mean, low, high = compare(found[arm], found[study.subject])
        verdict = "includes 0" if low <= 0 <= high else "does not include 0"
        compared.append(
            f"- {study.subject} minus {arm} is {_points((mean, low, high))} points: the interval {verdict}."
        )
    covers = (
        f"In brackets: 95 % intervals over the choice of questions, each question's score averaged over {seeds} "
        f"{_plural('seed', seeds)}. They do not cover how results differ from seed to seed (the shares of each are in "
        "the table), from corpus to corpus or from model to model, and none is corrected for their number."
    )
    return [
        f"On these {questions} questions, over {seeds} {_plural('seed', seeds)}:\n\n" + "\n".join(compared),
        covers,
        "Forgetting is measured on the held-out text of `evaluate.retention`: where that is of the kind of "
        "`data.replay`, on which all arms train, a ratio below 1 says that the replay taught this kind of text, not "
        "that nothing was forgotten.",
        *warnings(study, chosen),
        *(
            f"{arm}: training diverged with seed {result.seed}."
            for arm, standing in found.items()
            for result in standing.results
            if result.has_diverged
        ),
    ]


def _sweep(study: StudySettings, results: list[Result], chosen: dict[str, Choice]) -> str:
    rows = [["arm", "learning rate", "questions right", "perplexity", "final loss"]]
    for arm, rates in study.learning_rates.items():
        for rate in sorted(rates):
            one = next(r for r in results if (r.arm, r.learning_rate, r.seed) == (arm, rate, study.pick))
            mark = "**" if rate == chosen[arm].learning_rate else ""
            row = [arm, f"{rate:g}", f"{one.knowledge:.1%}", f"× {one.forgetting:.2f}", f"{one.final_loss:.2f}"]
            if one.has_diverged:
                row[2:] = ["diverged", "", ""]
            rows.append([f"{mark}{cell}{mark}" for cell in row])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def _share(interval: Interval) -> str:
    mean, low, high = (100 * value for value in interval)
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def _points(interval: Interval) -> str:
    mean, low, high = map(points, interval)
    return f"{mean} [{low}, {high}]"


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"
