"""Studies: what is refused as unfair, the choice of a rate, the comparison, and a whole one, killed and resumed."""

import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from scipy.stats import binom

from mica_ds.account import ACCOUNT, PLOTS, TABLE
from mica_ds.arms import StudySettings, check_folder, load_study, run_config, sweep, trials
from mica_ds.crew import carry_out, slots
from mica_ds.errors import UserError
from mica_ds.findings import (
    Result,
    check_budget,
    choices,
    choose,
    compare,
    read_results,
    read_run,
    standings,
    write_results,
)
from mica_ds.journal import Reader
from mica_ds.settings import save_settings
from mica_ds.statistics import mean_interval, paired_interval, points
from mica_ds.study import RESULTS, conduct, report

from .conftest import ROOT, environment, start

SHIPPED = [
    file for file in sorted((ROOT / "configs/study").glob("*.yaml")) if "arms" in yaml.safe_load(file.read_text())
]
TRAIN = [sys.executable, "-m", "mica_ds", "train"]
# The same, but the run with this rate ends at once; and the others never.
FAILING = ["bash", "-c", 'case "$*" in *=0.0005*) echo "error: no luck today"; exit 3;; esac; exec "$@"', "-", *TRAIN]
STOPPING = [*FAILING[:2], FAILING[2].replace('exec "$@"', "echo $$; exec sleep 600"), "-"]


def result(arm: str = "lora", rate: float = 1e-3, seed: int = 1, right: str = "1100", **changes: Any) -> Result:
    made = Result(arm, rate, seed, 10, 500 + seed, 1000, 60.0, 80.0, 2.5, 0.25, 20.0, 22.0, "0100", right)
    return dataclasses.replace(made, **changes)


@pytest.fixture
def study_file(tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a study of two arms; keyword arguments replace its keys."""

    def write(**changes: Any) -> Path:
        settings = {
            "base": str(tiny_config(train={"max_steps": 2, "save_steps": 1.0})),
            "arms": {"lora": {"adapter.method": "lora"}, "mica": {"adapter": {"method": "mica", "subspace": "minor"}}},
            "learning_rates": {"lora": [5e-4, 5e-3], "mica": [1e-2, 1e-3]},
            "pick": 1,
            "seeds": [2],
            "max_forgetting": 1e6,
            "subject": "mica",
            "reference": "lora",
            "parallel": 2,
            "ranks": 1,
            "launch": TRAIN,
            "output_dir": str(tmp_path / "study"),
        }
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump({**settings, **changes}, sort_keys=False))
        return file

    return write


@pytest.fixture
def study(study_file: Callable[..., Path]) -> StudySettings:
    return load_study(study_file())


def test_runs_differ_in_arm_rate_and_seed_alone(study_file: Callable[..., Path], tmp_path: Path) -> None:
    study = load_study(study_file(settings={"train": {"warmup_steps": 1}}), ["seeds=[2, 3]"])
    runs = [*sweep(study), *trials(study, {"lora": 5e-3, "mica": 1e-2})]
    assert [(run.arm, run.learning_rate, run.seed) for run in runs] == [
        *[("lora", 5e-4, 1), ("lora", 5e-3, 1), ("mica", 1e-2, 1), ("mica", 1e-3, 1)],
        *[("lora", 5e-3, 2), ("mica", 1e-2, 2), ("lora", 5e-3, 3), ("mica", 1e-2, 3)],
    ]
    assert len({run.folder for run in runs}) == len(runs)
    assert runs[2].folder == tmp_path / "study/mica/lr-0.01/seed-1"
    assert runs[2].overrides == (
        *("train.warmup_steps=1", 'adapter.method="mica"', 'adapter.subspace="minor"', "train.learning_rate=0.01"),
        *("train.seed=1", f'output_dir="{runs[2].folder}"', "checkpoint.max_skipped=1000000000"),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [2]}, "unknown key sedes; did you mean seeds?"),
        ({"base": "missing.yaml"}, "config missing.yaml cannot be read"),
        ({"arms": {"lora": {}}}, "arms: dictionary should have at least 2 items"),
        ({"learning_rates": {"lora": [1e-3, 1e-2], "mica": [1e-2]}}, "as many rates as the others, not lora 2, mica 1"),
        ({"learning_rates": {"lora": [1e-3, 1e-3], "mica": [1e-2, 1e-3]}}, "not lora 1, mica 2"),
        ({"learning_rates": {"lora": [1e-3]}}, "only one of the two has mica"),
        (
            {"learning_rates": {"lora": [1e-3, 0], "mica": [1, 2]}},
            "learning_rates.lora: input should be greater than 0",
        ),
        ({"pick": 2}, "pick: seed 2 chooses the rates, so a result that includes it is biased"),
        ({"seeds": [2, 2]}, "seeds: a seed stands there twice"),
        ({"subject": "full"}, "subject: 'full' is none of the arms, lora, mica"),
        ({"reference": "mica"}, "subject and reference are both mica"),
        ({"settings": {"train.seed": 3}}, "settings: train.seed is set by the study itself"),
        ({"arms": {"mica": {"adapter.rr": 2}, "lora": {}}}, "unknown key adapter.rr; did you mean adapter.r?"),
        (
            {"arms": {"mica": {"data.corpus": ["x"]}, "lora": {}}},
            "arms.mica: data.corpus must be the same for all arms",
        ),
        ({"arms": {"mica": {}, "lora": {"train": {"max_steps": 9}}}}, "train.max_steps must be the same for all arms"),
        ({"settings": {"evaluate.questions": None}}, "must set evaluate.questions and evaluate.retention"),
        (
            {"settings": {"evaluate": {"patience": 1, "every": 1}}},
            "evaluate.patience would give runs different",
        ),
        ({"settings": {"checkpoint.max_skipped": 3}}, "checkpoint.max_skipped is set by the study itself"),
        ({"arms": {"../mica": {}, "lora": {}}}, "arms: '../mica' is no name for a folder"),
    ],
)
def test_a_study_that_is_unfair_or_wrong_is_refused(
    study_file: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    if arms := changes.get("arms"):
        changes = {"learning_rates": [1e-3, 1e-2], "subject": next(iter(arms)), **changes}
    file = study_file(**changes)
    with pytest.raises(UserError) as caught:
        load_study(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_study_needs_a_multiple_choice_question(study_file: Callable[..., Path], tmp_path: Path) -> None:
    questions = tmp_path / "open.jsonl"
    questions.write_text('{"question": "Who built the press?", "answer": "Edda"}\n')
    with pytest.raises(UserError, match=r"open\.jsonl holds no multiple-choice question"):
        load_study(study_file(settings={"evaluate.questions": str(questions)}))


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"checkpoint.export": "best", "evaluate.every": 1}, r"made with checkpoint\.export='last'"),
        ({"evaluate.every": 1}, r"made with evaluate\.every=0"),
        ({"data.sequence_length": 16}, r"made with data\.sequence_length=32"),
        ({"checkpoint.keep": 1, "capacity": "warn", "patience": 9, "tracking.experiment": "other"}, None),
        ({"data.cache": "elsewhere", "evaluate.batch_tokens": 64}, None),
    ],
)
def test_what_bears_on_results_may_not_differ_between_starts(
    study_file: Callable[..., Path], change: dict[str, Any], refused: str | None
) -> None:
    study = load_study(study_file())
    run = sweep(study)[0]
    run.folder.mkdir(parents=True)
    save_settings(run_config(study, run), run.folder / "config.yaml")
    changed = load_study(study_file(settings=change))
    with pytest.raises(UserError, match=refused) if refused else nullcontext():
        check_folder(changed, sweep(changed)[0])


@pytest.mark.parametrize("file", SHIPPED, ids=str)
def test_the_shipped_studies_are_fair(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(file)
    assert set(study.arms) == {"mica-minor", "mica-principal", "mica-random", "lora", "full"}
    assert len(study.seeds) >= 3
    full, lora = study.learning_rates["full"], study.learning_rates["lora"]
    assert all(lower < rate for lower, rate in zip(full, lora, strict=True))


@pytest.mark.parametrize("file", SHIPPED, ids=str)
def test_the_published_tables_come_from_the_committed_results(
    file: Path, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`configs/study/NAME/` holds what the study `configs/study/NAME.yaml` has come to, and the README tells it."""
    folder = file.with_suffix("")
    if not (folder / RESULTS).exists():
        pytest.skip("not run yet")
    monkeypatch.chdir(ROOT)
    (tmp_path / RESULTS).write_bytes((folder / RESULTS).read_bytes())
    report(load_study(file), tmp_path / RESULTS)
    for name in (TABLE, ACCOUNT):
        assert (tmp_path / name).read_text() == (folder / name).read_text()
    table, readme = (folder / TABLE).read_text(), (ROOT / "README.md").read_text()
    assert table.split("\n\n")[0] in readme
    for sentence in (line for line in table.splitlines() if line.startswith("- ")):
        assert sentence in " ".join(readme.split())  # it may be wrapped there
    for where, text in ((folder, (folder / ACCOUNT).read_text()), (ROOT, readme)):
        assert all((where / image).is_file() for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text))


def test_the_rate_with_most_knowledge_is_chosen_within_the_bound() -> None:
    swept = [
        result(rate=1e-4, right="1000", retention_after=20.0),
        result(rate=1e-3, right="1100", retention_after=24.0),
        result(rate=1e-2, right="1111", retention_after=40.0),
    ]
    assert choose(swept, max_forgetting=1.3) == choose(swept[::-1], 1.3)
    assert (choose(swept, 1.3).learning_rate, choose(swept, 1.3).is_at_edge) == (1e-3, False)
    assert (choose(swept, 2.5).learning_rate, choose(swept, 2.5).is_at_edge) == (1e-2, True)
    assert choose(swept, 1.3).is_within_bound
    assert (choose(swept, 1.3).beyond, choose(swept, 2.5).beyond) == (1e-2, None)


def test_equal_knowledge_is_decided_by_forgetting_and_then_by_the_lower_rate() -> None:
    swept = [
        result(rate=1e-2, retention_after=21.0),
        result(rate=1e-3, retention_after=22.0),
        result(rate=2e-3, retention_after=21.0),
    ]
    assert choose(swept, 1.3).learning_rate == 2e-3


def test_where_no_rate_is_within_the_bound_the_one_that_forgets_least_is_chosen() -> None:
    swept = [
        result(rate=1e-4, right="0000", retention_after=30.0),
        result(rate=1e-3, right="1111", retention_after=31.0),
        result(rate=1e-2, right="1111", retention_after=float("nan")),  # diverged
    ]
    assert choose(swept, 1.3).learning_rate == 1e-4
    assert not choose(swept, 1.3).is_within_bound


def test_a_rate_at_which_training_diverged_is_shown_so_and_never_chosen(
    study: StudySettings, tmp_path: Path, alone: None
) -> None:
    nan = float("nan")
    swept = [
        *(result("lora", rate, right="1000") for rate in study.learning_rates["lora"]),
        result("mica", 1e-3, right="0000", retention_after=1e9),
        result("mica", 1e-2, right="1111", final_loss=nan, retention_after=nan),
    ]
    write_results([*swept, result("lora", 5e-4, 2), result("mica", 1e-3, 2, final_loss=nan)], tmp_path / RESULTS)
    report(study, tmp_path / RESULTS)
    account = (tmp_path / ACCOUNT).read_text()
    assert "| mica | 0.01 | diverged |  |  |" in account
    assert "| **mica** | **0.001** | **0.0%** |" in account
    assert "mica: training diverged with seed 2." in account
    assert "lora: training diverged" not in account
    swept[2] = dataclasses.replace(swept[2], retention_after=float("inf"))
    with pytest.raises(UserError, match="mica: training diverged at each of its learning_rates"):
        choices(study, swept)


def test_arms_are_compared_question_by_question_over_the_mean_of_the_seeds(study: StudySettings) -> None:
    study = study.model_copy(update={"seeds": [2, 3]})
    swept = [result(arm, rate, 1) for arm, rates in study.learning_rates.items() for rate in rates]
    rates = {arm: choice.learning_rate for arm, choice in choices(study, swept).items()}
    assert rates == {"lora": 5e-4, "mica": 1e-3}
    rng = np.random.default_rng(0)
    answers = {(arm, seed): rng.random(400) < 0.5 for arm in rates for seed in study.seeds}
    finals = [
        result(arm, rates[arm], seed, "".join("01"[int(right)] for right in answers[arm, seed]), right_before="0" * 400)
        for arm, seed in answers
    ]
    swept = [dataclasses.replace(one, right_before="0" * 400, right_after="01" * 200) for one in swept]
    found = standings(study, swept + finals)
    means = {arm: np.mean([answers[arm, seed] for seed in study.seeds], axis=0) for arm in rates}
    difference = means["mica"] - means["lora"]
    mean, low, high = compare(found["lora"], found["mica"])
    assert mean == pytest.approx(difference.mean())
    assert high - low == pytest.approx(2 * 1.96 * difference.std(ddof=1) / 20, rel=0.05)
    assert found["mica"].knowledge[0] == pytest.approx(means["mica"].mean())
    assert found["mica"].scores == means["mica"].tolist()
    back = compare(found["mica"], found["lora"])
    assert back == pytest.approx((-mean, -high, -low))


def test_the_table_compares_each_arm_with_the_base_model_and_with_the_reference(
    study: StudySettings, tmp_path: Path, alone: None
) -> None:
    swept = [result(arm, rate, 1) for arm, rates in study.learning_rates.items() for rate in rates]
    finals = [result("lora", 5e-4, 2), result("mica", 1e-3, 2, "1110")]
    write_results([*swept, *finals], tmp_path / RESULTS)
    report(study, tmp_path / RESULTS)
    header, _, base, lora, mica = (tmp_path / TABLE).read_text().splitlines()[:5]
    assert "| seed by seed | minus base | minus lora | perplexity |" in header
    assert "| 0 | 25.0 % [" in base
    minus_base, minus_lora = (
        " [".join([points(mean), f"{points(low)}, {points(high)}]"])
        for mean, low, high in (
            paired_interval([0, 1, 0, 0], [1, 1, 1, 0]),
            paired_interval([1, 1, 0, 0], [1, 1, 1, 0]),
        )
    )
    assert f"| 75.0 | {minus_base} | {minus_lora} | × 1.10 |" in mica
    assert "| 50.0 | +25.0 [" in lora
    assert "] |  | × 1.10 |" in lora


@pytest.mark.parametrize("share", [0.05, 0.28, 0.5, 0.9])
def test_the_interval_of_a_share_of_questions_holds_its_level(share: float) -> None:
    number = 72
    covered = 0.0
    for right in range(number + 1):
        mean, low, high = mean_interval([1.0] * right + [0.0] * (number - right))
        assert mean == pytest.approx(right / number)
        assert low <= mean <= high
        covered += binom.pmf(right, number, share) * (low <= share <= high)
    assert 0.94 <= covered <= 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 9}, "same data and budget: lora at 0.0005 with seed 1 and mica at 0.01 with seed 1 differ in steps"),
        ({"tokens": 499}, "differ in tokens, 501 and 499"),
        ({"right_after": "110"}, "differ in questions, (4, 4) and (4, 3)"),
        ({"retention_before": 20.1, "seed": 3}, "differ in the base model's perplexity, 20.0 and 20.1"),
    ],
)
def test_another_budget_is_refused(study: StudySettings, changes: dict[str, Any], message: str) -> None:
    swept = [result(arm, rate, 1) for arm, rates in study.learning_rates.items() for rate in rates]
    with pytest.raises(UserError) as caught:
        standings(study, [*swept[:2], dataclasses.replace(swept[2], **changes), swept[3]])
    assert message in str(caught.value)
    check_budget([*swept, result(seed=3, retention_before=20.01)])  # as on another number of ranks


def test_an_account_needs_all_runs_and_says_which_is_missing(study: StudySettings, tmp_path: Path) -> None:
    swept = [result(arm, rate, 1) for arm, rates in study.learning_rates.items() for rate in rates]
    for results, message in [(swept[1:], "lora has not all rates of seed 1"), (swept, "lora has no result of seed 2")]:
        write_results(results, tmp_path / RESULTS)
        with pytest.raises(UserError, match=message):
            report(study, tmp_path / RESULTS)
    (tmp_path / RESULTS).write_text('{"arm": "lora"}\n')
    with pytest.raises(UserError, match=f"{RESULTS}, line 1 is no result"):
        report(study, tmp_path / RESULTS)


def test_a_run_of_another_version_is_one_sentence(study: StudySettings) -> None:
    run = sweep(study)[0]
    (run.folder / "evaluation").mkdir(parents=True)
    for when in ("before", "after"):
        (run.folder / f"evaluation/{when}.jsonl").write_text('{"right": true}\n')
    facts = dataclasses.asdict(result())
    (run.folder / "summary.json").write_text(json.dumps(facts))
    assert read_run(run) == result(run.arm, run.learning_rate, run.seed, "1", tokens=501, right_before="1")
    del facts["tokens"]
    (run.folder / "summary.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"summary.json has no valid tokens: of another version; remove"):
        read_run(run)


def test_an_account_that_cannot_be_written_is_one_sentence(study: StudySettings, tmp_path: Path, alone: None) -> None:
    swept = [result(arm, rate, 1) for arm, rates in study.learning_rates.items() for rate in rates]
    write_results(
        [*swept, *(result(arm, rate, 2) for arm, rate in (("lora", 5e-4), ("mica", 1e-3)))], tmp_path / RESULTS
    )
    (tmp_path / TABLE).mkdir()
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written .*Is a directory"):
        report(study, tmp_path / RESULTS)


def test_a_study_under_a_launcher_is_refused(study: StudySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it without a launcher"):
        conduct(study)
    assert not study.output_dir.exists()


def test_a_run_that_outlived_its_study_is_waited_for_and_not_started_twice(
    study: StudySettings, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sweep(study)[0]
    run.folder.mkdir(parents=True)
    summary, codes = run.folder / "summary.json", list[int]()
    held = (run.folder / "study.lock").open("w")  # as the run's command does, as long as it lives
    fcntl.flock(held, fcntl.LOCK_EX)
    ending = threading.Timer(1.5, lambda: (summary.touch(), held.close()))
    ending.start()
    carry_out(study, [run], "parent", lambda _, code: codes.append(code))
    assert codes == [0]
    assert not (run.folder / "study.log").exists()
    assert f"study: {run} still goes on from an earlier start; waiting for it" in capsys.readouterr().out


def test_an_interrupt_ends_the_runs_that_go_on(study_file: Callable[..., Path], alone: None) -> None:
    study = load_study(study_file(launch=STOPPING))
    log = sweep(study)[1].folder / "study.log"

    def interrupt() -> None:
        while not (log.exists() and log.read_text().endswith("\n")):
            time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            carry_out(study, sweep(study), "parent", lambda *_: None)
    finally:
        signal.signal(signal.SIGINT, previous)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets this machine seem to have so many GPUs, and the environment to name some of them."""

    def have(number: int, visible: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return have


def test_runs_at_once_have_gpus_of_their_own(
    study_file: Callable[..., Path], tmp_path: Path, gpus: Callable[..., None], alone: None
) -> None:
    gpus(4, "1,2,5,7")
    launcher = tmp_path / "train.sh"
    launcher.write_text("sleep 0.5; echo $CUDA_VISIBLE_DEVICES $NUM_RANKS")
    study = load_study(study_file(launch=["bash", str(launcher)], ranks=2))
    carry_out(study, sweep(study), "parent", lambda *_: None)
    told = [(run.folder / "study.log").read_text() for run in sweep(study)]
    assert told[:2] == ["1,2 2\n", "5,7 2\n"]
    assert set(told[2:]) <= set(told[:2])


@pytest.mark.parametrize(
    ("number", "changes", "found"),
    [
        (5, {"ranks": 2}, ["0,1", "2,3"]),
        (2, {"ranks": None, "parallel": 1}, [None]),
        (2, {"ranks": 2, "launch": TRAIN}, [None, None]),
        (0, {"ranks": 2}, [None, None]),
        (3, {"ranks": 2}, "parallel=2 runs at a time with ranks=2 each need 4 GPUs, and there are 3"),
        (3, {"ranks": None}, r"parallel=2 runs at a time with ranks=3 \(all\) each need 6 GPUs, and there are 3"),
    ],
)
def test_gpus_are_shared_out_where_there_are_enough(
    number: int,
    changes: dict[str, Any],
    found: list[str | None] | str,
    study_file: Callable[..., Path],
    gpus: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus(number)
    study = load_study(study_file(**{"launch": ["bash", "launch/train.sh"], **changes}))
    with pytest.raises(UserError, match=found) if isinstance(found, str) else nullcontext():
        assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in slots(study)] == found
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert slots(study) == [{}] * study.parallel


def test_a_launcher_that_is_missing_is_named(study_file: Callable[..., Path], alone: None) -> None:
    study = load_study(study_file(launch=["sbotch", "--wait"]))
    with pytest.raises(UserError, match="launch: sbotch cannot be started: No such file or directory"):
        carry_out(study, sweep(study), "parent", lambda *_: None)


def test_a_run_folder_that_cannot_be_made_is_named(study: StudySettings, alone: None) -> None:
    run = sweep(study)[0]
    run.folder.parent.mkdir(parents=True)
    run.folder.touch()
    with pytest.raises(UserError, match=f"{run.folder} cannot be written"):
        carry_out(study, [run], "parent", lambda *_: None)


def row(right: bool, answer: int = 1) -> str:
    """A line of an evaluation, whose question has two lines, as texts out of PDFs may."""
    made = {"question": "Who\u2028built it?", "answer": answer, "right": right}
    return json.dumps(made, ensure_ascii=False) + "\n"


@pytest.fixture
def finished_study(study_file: Callable[..., Path]) -> StudySettings:
    """A study of which all has been run, as far as it reads that again."""
    study = load_study(
        study_file(
            arms={"full": {"adapter.method": "full"}, "mica": {}},
            learning_rates={"full": [1e-4], "mica": [1e-2]},
            reference="full",
        )
    )
    for run in [*sweep(study), *trials(study, {"full": 1e-4, "mica": 1e-2})]:
        for name in ("evaluation", "checkpoints"):
            (run.folder / name).mkdir(parents=True)
        save_settings(run_config(study, run), run.folder / "config.yaml")
        for when in ("before", "after"):
            (run.folder / f"evaluation/{when}.jsonl").write_text("".join(map(row, (True, False))))
        (run.folder / "data.json").write_text('{"sources": [{"path": "corpus.txt", "digest": "a"}]}')
        (run.folder / "summary.json").write_text(json.dumps(dataclasses.asdict(result(seed=run.seed))))
    return study


def test_the_checkpoints_of_full_fine_tuning_alone_are_removed(finished_study: StudySettings, alone: None) -> None:
    conduct(finished_study)
    folder = finished_study.output_dir
    assert len(read_results(folder / RESULTS)) == 4
    assert [path.relative_to(folder).parts[0] for path in folder.rglob("checkpoints")] == ["mica", "mica"]


def test_a_corpus_or_an_answer_key_that_was_changed_on_the_way_ends_the_study(
    finished_study: StudySettings, alone: None
) -> None:
    run = trials(finished_study, {"full": 1e-4, "mica": 1e-2})[0]
    (run.folder / "evaluation/before.jsonl").write_text(row(True, answer=2) + row(False))
    with pytest.raises(UserError, match=f"not the same data: evaluate.questions was changed between full.* and {run}"):
        conduct(finished_study)
    (run.folder / "data.json").write_text('{"sources": [{"path": "corpus.txt", "digest": "b"}]}')
    with pytest.raises(UserError, match=f"not the same data: corpus.txt was changed between full.* and {run}"):
        conduct(finished_study)


@pytest.mark.exclusive  # after the study a sender has 10 s
@pytest.mark.dist
def test_a_study_killed_and_started_again_repeats_nothing_and_compares_fairly(
    study_file: Callable[..., Path], tmp_path: Path, alone: None
) -> None:
    folder = tmp_path / "study"
    first = _start_study(study_file(launch=FAILING), tmp_path / "first.log")
    _wait_for(lambda: any(folder.rglob("summary.json")), first)
    first.kill()  # alone: what it has started goes on
    first.wait()
    said = (tmp_path / "first.log").read_text()
    log = folder / "lora/lr-0.0005/seed-1/study.log"
    assert f"lora, learning rate 0.0005, seed 1 failed: no luck today ({log})" in said
    second = start([sys.executable, "-m", "mica_ds", "study", str(study_file())])
    assert second.codes == [0], second.output

    results = read_results(folder / RESULTS)
    assert [(one.arm, one.seed) for one in results[4:]] == [("lora", 2), ("mica", 2)]
    for one in results:
        run = folder / one.arm / f"lr-{one.learning_rate}" / f"seed-{one.seed}"
        lines = [line for line in Reader(run).read() if line]
        assert [line["kind"] for line in lines].count("start") == 1, run
        summary = json.loads((run / "summary.json").read_text())
        assert one.knowledge == summary["knowledge_after"]
        assert one.tokens == next(other.tokens for other in results if other.seed == one.seed)
        assert yaml.safe_load((run / "config.yaml").read_text())["train"]["learning_rate"] == one.learning_rate
        assert any((run / "checkpoints").iterdir())
    assert len({run.parent for run in folder.rglob("summary.json")}) == len(results) == 6

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("mica_ds").experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "study"]
    assert parent.info.status == "FINISHED"
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs if run is not parent} == {parent.info.run_id}
    assert len(runs) == 7
    assert parent.data.metrics["knowledge.mica"] == results[5].knowledge
    assert parent.data.params["learning_rates.lora"] == "[0.0005, 0.005]"
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert names == {"study.yaml", RESULTS, TABLE, ACCOUNT, *PLOTS}

    table = (folder / TABLE).read_text()
    assert table in second.output
    assert f"| lora | {results[4].learning_rate:g} |" in table
    (tmp_path / "again").mkdir()
    (folder / RESULTS).rename(tmp_path / "again" / RESULTS)
    report(load_study(study_file()), tmp_path / "again" / RESULTS)
    for name in (TABLE, ACCOUNT, *PLOTS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name

    changed = load_study(study_file(settings={"train.max_steps": 3}))
    with pytest.raises(UserError, match=r"was made with train.max_steps=2, and the study has 3"):
        check_folder(changed, sweep(changed)[0])


@pytest.mark.slow
def test_runs_that_fail_are_named_and_the_others_go_on(
    study_file: Callable[..., Path], alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    study = load_study(study_file(launch=[*FAILING[:3], "-", "false"]))
    with pytest.raises(UserError, match=r"4 runs failed, as said above; the same command tries them again"):
        conduct(study)
    said = capsys.readouterr().out
    for run in sweep(study):
        reason = "no luck today" if run.learning_rate == 5e-4 else "it has said nothing"
        assert f"{run} failed: {reason} ({run.folder}/study.log)" in said
    assert [line["status"] for line in Reader(study.output_dir).read() if line and line["kind"] == "end"] == ["FAILED"]
    assert read_results(study.output_dir / RESULTS) == []


@pytest.mark.slow
def test_a_signal_ends_the_study_and_its_runs(study_file: Callable[..., Path], tmp_path: Path) -> None:
    process = _start_study(study_file(launch=STOPPING), tmp_path / "study.log")
    sleeper = tmp_path / "study/mica/lr-0.01/seed-1/study.log"
    _wait_for(lambda: sleeper.exists() and sleeper.read_text().endswith("\n"), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == os.EX_TEMPFAIL
    with pytest.raises(ProcessLookupError):
        os.kill(int(sleeper.read_text()), 0)
    assert "stopped by SIGTERM; start again to go on" in (tmp_path / "study.log").read_text()


def _start_study(file: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as output:
        command = [sys.executable, "-m", "mica_ds", "study", str(file)]
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT)


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], limit: float = 240) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline
        time.sleep(0.1)
