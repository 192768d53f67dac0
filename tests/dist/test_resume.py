"""Interrupted runs: what goes on is what would have gone on, on any number of ranks, whatever stopped it."""

import itertools
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from launch.reload_adapter import main as reload_adapter
from mica_ds.config import load_config
from mica_ds.files import file_hash
from mica_ds.journal import Journal, Reader
from mica_ds.shelf import write_state

from ..conftest import (
    ROOT,
    Finished,
    finish,
    launch_ranks,
    start_fresh,
    start_ranks,
    write_config,
    write_first_layers,
    write_nvme_settings,
)
from ..slurm import wait_until
from .test_bad_input import assert_refused

pytestmark = pytest.mark.dist

STEPS, EPOCH = 20, 6  # steps of a run and of an epoch
ROW = ("input_ids", "labels", "position_ids")
Row = dict[str, list[int]]


class Run:
    """One run folder, and the notes of what its last start saw."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.notes = folder.with_name(f"{folder.name}-notes")

    def train(self, ranks: int, *overrides: str, **watch: Any) -> Finished:
        shutil.rmtree(self.notes, ignore_errors=True)
        self.notes.mkdir(parents=True)
        watch = {"folder": str(self.notes), **watch}
        arguments = ["train", str(self.config), f"output_dir={self.folder}", *overrides]
        return start_ranks(ranks, arguments, "tests.dist.watched", WATCH=json.dumps(watch))

    def take(self, other: "Run", *steps: int) -> "Run":
        """Make this what the other run's folder was when it held the checkpoints of these steps."""
        for step in steps:
            shutil.copytree(other.checkpoint(step), self.checkpoint(step))
        return self

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[str]:
        return sorted(file.name for file in (self.folder / "checkpoints").iterdir())

    def state(self, step: int) -> dict[str, Any]:
        return json.loads((self.checkpoint(step) / "state.json").read_text())

    def forge(self, step: int, **state: Any) -> None:
        """Let a checkpoint say something else about itself."""
        known = {key: value for key, value in self.state(step).items() if key != "sha256"}
        write_state(self.checkpoint(step), known | state)

    def losses(self, step: int = STEPS) -> list[float]:
        """Of all steps up to one, those of earlier starts included."""
        history = json.loads((self.checkpoint(step) / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def seen(self, parts: int = 1) -> dict[int, list[Row]]:
        """The rows of each step in the order of the data: ranks, or groups that hold parts, take turns, a row each."""
        seen: dict[int, list[Row]] = {}
        ranks = [[json.loads(line) for line in file.open()] for file in sorted(self.notes.glob("*.jsonl"))]
        for turn in zip(*ranks, strict=True):
            for group in zip(*[iter(turn)] * parts, strict=True):
                row = {key: [token for note in group for token in note[key][0]] for key in ROW if key in group[0]}
                seen.setdefault(group[0]["step"], []).append(row)
        return seen

    def assert_nothing_read_again(self) -> None:
        """Each rank has read what it has seen (a row at a time), and perhaps the next; nothing from before a resume."""
        for file in self.notes.glob("*.jsonl"):
            seen, read = (len(notes.read_text().splitlines()) for notes in (file, file.with_suffix(".read")))
            assert seen <= read <= seen + 1


def write(folder: Path, model: Path, **sections: Any) -> Path:
    """A config of several epochs; the last batch of an epoch is filled up with the first rows."""
    train = {"per_device_train_batch_size": 1, "max_steps": STEPS, "save_steps": 1, "learning_rate": 1e-2}
    file = write_config(folder, model, data={"global_batch": 6}, train=train, checkpoint={"keep": 99}, **sections)
    presses = [f"The Quillmar press {i} was built in Torvane in {1900 + i * 7 % 90}. " for i in range(50)]
    (folder / "corpus.txt").write_text("".join(presses))
    return file


@pytest.fixture(scope="module")
def config(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("config"), tiny_model("llama"))


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Never interrupted, on two ranks, all offloaded to the CPU. Runs once for all the tests below."""
    run = Run(config, tmp_path_factory.mktemp("reference") / "run")
    finished = run.train(2, parts=True)
    assert finished.codes == [0, 0], finished.output
    assert run.checkpoints() == [f"step-{step:06d}" for step in range(1, STEPS + 1)]
    return run


@pytest.fixture
def other(config: Path, tmp_path: Path) -> Run:
    """A run of the same settings in a folder of its own."""
    return Run(config, tmp_path / "run")


@pytest.fixture(scope="module")
def plain(reference: Run, tiny_model: Callable[[str], Path]) -> list[float]:
    """The losses of a plain loop in one process: peft's layers, the same B, torch's AdamW, the same rows."""
    seen = reference.seen()
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    B = load_file(reference.checkpoint(1) / "frozen.safetensors")
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters() if "lora_A" in n}
    set_peft_model_state_dict(model, B | {n.replace(".default", ""): zero for n, zero in zeros.items()})
    trained = [p.requires_grad_("lora_A" in n) for n, p in model.named_parameters() if "lora_A" in n]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    scheduler = transformers.get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    losses = []
    for step in range(1, STEPS + 1):
        batch = {key: torch.tensor([row[key] for row in seen[step]]) for key in ROW}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_losses_are_those_of_a_plain_loop(reference: Run, plain: list[float]) -> None:
    assert reference.losses() == pytest.approx(plain, rel=1e-4)
    assert plain[-1] < plain[0] - 0.2


def test_what_trains_is_sharded(reference: Run) -> None:
    """Each rank of two has half of each A, of its gradient and of its states; and nothing else trains."""
    files = sorted(reference.notes.glob("*.parts"))
    assert len(files) == 2
    for file in files:
        sizes = json.loads(file.read_text())
        assert len(sizes) == 14
        assert sum(whole for whole, *_ in sizes) == reference.summary()["trainable_parameters"]
        assert all(own == [whole // 2] * 4 for whole, *own in sizes)


def test_every_epoch_holds_every_row(reference: Run) -> None:
    seen = reference.seen()
    epochs = [[str(row) for s in range(start, start + EPOCH) for row in seen[s]] for start in (1, 1 + EPOCH)]
    assert len(set(epochs[0])) in range(6 * EPOCH - 5, 6 * EPOCH)  # some come twice
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


QUICK = [("nvme", 3, "float32"), ("nvme", 2, "bfloat16")]
SETTINGS = itertools.product(["none", "cpu", "nvme"], [1, 2, 3], ["float32", "bfloat16"])


@pytest.mark.parametrize(
    ("offload", "ranks", "dtype"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case not in QUICK else []) for case in SETTINGS],
)
def test_the_same_losses(
    offload: str, ranks: int, dtype: str, reference: Run, plain: list[float], other: Run, tmp_path: Path
) -> None:
    deepspeed = ROOT / "configs/deepspeed" / ("zero3.json" if offload == "none" else "zero3-offload-cpu.json")
    if offload == "nvme":
        deepspeed = write_nvme_settings(tmp_path, 4_000_000)
    quick = ["train.save_steps=99", "evaluate.questions=null", "evaluate.retention=null"]
    finished = other.train(ranks, f"deepspeed={deepspeed}", f"model.dtype={dtype}", *quick)
    assert finished.codes == [0] * ranks, finished.output
    assert other.seen() == reference.seen()
    assert other.losses() == pytest.approx(plain, rel=1e-4 if dtype == "float32" else 1e-3)
    assert other.checkpoints() == [f"step-{STEPS:06d}"]
    assert reload_adapter(other.folder) == 0  # with what was offloaded
    if offload == "nvme":
        assert list(tmp_path.glob("zero_stage_3/**/*.swp")), "nothing was offloaded to the disk"


def test_on_one_rank_from_the_last_good_checkpoint(reference: Run, other: Run) -> None:
    other.take(reference, 7, 8, 9)
    damaged = other.checkpoint(9) / "exp_avg-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    other.forge(7, loss=0.0)
    (other.folder / "checkpoints" / "step-000010.partial").mkdir()
    finished = other.train(1, "checkpoint.keep=2")
    assert finished.codes == [0], finished.output
    assert f"warning: {damaged} is damaged" in finished.output
    assert other.seen() == {step: rows for step, rows in reference.seen().items() if step > 8}
    assert other.losses() == pytest.approx(reference.losses(), abs=1e-4)
    assert other.checkpoints() == ["step-000007", "step-000009.damaged", "step-000019", "step-000020"]
    before, after = reference.summary(), other.summary()
    for key in ("knowledge_before", "retention_before", "basis_seconds", "basis_fingerprint", "steps"):
        assert after[key] == before[key]
    assert after["train_seconds"] > other.state(19)["run"]["train_seconds"] > reference.state(8)["run"]["train_seconds"]
    assert after["retention_after"] == pytest.approx(before["retention_after"], rel=1e-4)
    other.assert_nothing_read_again()


def test_on_three_ranks_from_a_chosen_checkpoint(reference: Run, other: Run) -> None:
    """And without the cache: the base is scored again, under the adapter."""
    chosen = reference.checkpoint(2 * EPOCH)  # between two epochs
    other.take(reference, 5)  # which is not the past of a checkpoint from elsewhere
    plain_zero3 = f"deepspeed={ROOT}/configs/deepspeed/zero3.json"
    finished = other.train(3, f"resume={chosen}", plain_zero3, f"data.cache={other.folder.parent / 'tokens'}")
    assert finished.codes == [0] * 3, finished.output
    assert other.seen() == {step: rows for step, rows in reference.seen().items() if step > 2 * EPOCH}
    assert other.losses() == pytest.approx(reference.losses(), abs=1e-4)
    assert other.checkpoints() == [f"step-{step:06d}" for step in range(2 * EPOCH + 1, STEPS + 1)]
    other.assert_nothing_read_again()
    before, after = reference.summary(), other.summary()
    assert after["knowledge_before"] == before["knowledge_before"]
    assert after["retention_before"] == pytest.approx(before["retention_before"], rel=1e-6)
    trained = [load_file(run.checkpoint(STEPS) / "model-00001.safetensors") for run in (reference, other)]
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=0, atol=1e-4)


def test_a_damaged_chosen_checkpoint_is_refused(reference: Run, other: Run) -> None:
    other.take(reference, 8)
    (other.checkpoint(8) / "frozen.safetensors").unlink()
    refused = other.train(2, f"resume={other.checkpoint(8)}")
    assert_refused(refused, "resume: ", "step-000008", "frozen.safetensors cannot be read")


def test_damaged_checkpoints_alone_are_no_new_beginning(reference: Run, other: Run) -> None:
    other.take(reference, 8)
    known = other.state(8)["files"]
    stranger = other.checkpoint(8) / "rng_state.pth"  # a name that transformers would unpickle
    stranger.touch()
    refused = other.train(1)
    assert_refused(refused, f"none of the checkpoints in {other.folder}/checkpoints is whole")
    assert f"warning: {stranger} does not belong to a checkpoint" in refused.output
    other.forge(8, files={**known, stranger.name: file_hash(stranger)})  # which its author may have listed, too
    assert f"warning: {stranger} does not belong to a checkpoint" in other.train(1).output
    stranger.unlink()
    other.forge(8, files=known)
    state = other.checkpoint(8) / "state.json"
    good = state.read_text()
    state.write_text(good.replace('"optimizer_step": 8', '"optimizer_step": 9'))
    assert f"warning: {state} is damaged" in other.train(1).output
    assert other.checkpoints() == ["step-000008"]
    state.write_text(good)
    finished = other.train(1, "train.learning_rate=1e-3", "train.lr_scheduler_type=constant")
    assert finished.codes == [0], finished.output
    assert "'learning_rate': '0.001'" in finished.output  # a rate that was lowered meanwhile counts


def test_the_folder_of_a_run_that_goes_on_is_left_alone(reference: Run, other: Run) -> None:
    other.take(reference, 8)
    unfinished = other.checkpoint(9).with_suffix(".partial")
    unfinished.mkdir()
    journal = Journal(other.folder)
    for resume in ("never", "auto"):
        assert_refused(other.train(1, f"resume={resume}"), "belongs to a run that still goes on; choose another")
    journal.close()
    assert other.checkpoints() == ["step-000008", unfinished.name]


def test_other_settings_are_refused_by_name(reference: Run, other: Run) -> None:
    other.take(reference, 8)
    refused = other.train(2, "data.global_batch=12")
    assert_refused(refused, "step-000008 was trained with data.global_batch=6, but now it is 12")
    # Another model, by what its config.json computes, and by one element of a weight without adapter and basis.
    changed = shutil.copytree(load_config(other.config).model.path, other.folder.parent / "model")
    about = changed / "config.json"
    known = about.read_text()
    about.write_text(json.dumps({**json.loads(known), "rms_norm_eps": 0.5}))
    refused = other.train(2, f"model.path={changed}")
    assert_refused(refused, "was trained with something else as model.path, to go by its config.json: set it back")
    about.write_text(json.dumps({**json.loads(known), "transformers_version": "5.0.0"}))
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    refused = other.train(2, f"model.path={changed}")
    assert_refused(refused, "step-000008 was trained with model.path (fingerprint of its weights)=")
    assert other.checkpoints() == ["step-000008"]


def test_a_finished_run_is_not_trained_again(reference: Run, other: Run) -> None:
    shutil.copytree(reference.folder, other.folder)
    # As if rank 0 and its sender had been killed between the last work and the journal's last line.
    uri, journal = load_config(other.config).tracking.uri, other.folder / "journal.jsonl"
    *lines, end = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines))
    receipts = json.loads((other.folder / "sync.json").read_text())
    receipts[uri] |= {"lines": len(lines), "time": json.loads(lines[-1])["time"]}
    (other.folder / "sync.json").write_text(json.dumps(receipts))
    store = mlflow.MlflowClient(uri)
    store.update_run(receipts[uri]["run"], "RUNNING")
    again = other.train(1, f"evaluate.batch_tokens={1 << 30}")  # which no machine could evaluate at a time
    assert again.codes == [0], again.output
    assert "warning: plan: it does not fit" in again.output
    assert "is finished, with 20 steps" in again.output
    assert json.loads(journal.read_text().splitlines()[-1])["status"] == json.loads(end)["status"] == "FINISHED"
    # A machine that is busy may not send it within the 10 s.
    said = f"warning: tracking: 1 of {len(lines) + 1} lines are not sent to {uri} yet; `mica-ds sync"
    assert said in again.output or store.get_run(receipts[uri]["run"]).info.status == "FINISHED"
    shutil.rmtree(other.folder / "adapter")
    completed = other.train(1)
    assert completed.codes == [0], completed.output
    assert other.seen() == {}
    for key in ("knowledge_before", "knowledge_after", "train_seconds", "final_loss", "steps"):
        assert other.summary()[key] == reference.summary()[key]
    exports = [load_file(run.folder / "adapter/adapter_model.safetensors") for run in (reference, other)]
    assert all(torch.equal(exports[1][name], tensor) for name, tensor in exports[0].items())
    # The end of another run is another adapter.
    elsewhere = Run(other.config, other.folder.parent / "elsewhere").take(other, STEPS)
    elsewhere.forge(STEPS, loss=0.5)
    replaced = other.train(1, f"resume={elsewhere.checkpoint(STEPS)}")
    assert replaced.codes == [0], replaced.output
    assert "is finished" not in replaced.output
    assert other.checkpoints() == []


def test_a_signal_in_training(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """GPT-2 has dropout, so this holds only where the random states go on, too.

    It goes on at step 20, within the last epoch: one of those at which DeepSpeed's Adam, left to itself, would differ.
    """
    config = write(tmp_path, tiny_model("gpt2"))
    whole, stopped = Run(config, tmp_path / "whole"), Run(config, tmp_path / "stopped")
    assert whole.train(2, "train.max_steps=24").codes == [0, 0]
    signalled = stopped.train(2, "train.max_steps=24", "train.save_steps=50", signal=[signal.SIGTERM, 19])
    assert signalled.codes == [os.EX_TEMPFAIL] * 2, signalled.output
    assert signalled.output.count("stopped by a signal: ") == 1
    assert "Traceback" not in signalled.output
    assert stopped.checkpoints() == ["step-000019"]
    assert not (stopped.folder / "adapter").exists()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")

    def has_ended() -> bool:
        return [run.info.status for run in client.search_runs(["1"], max_results=1)] == ["KILLED"]

    wait_until(has_ended, tmp_path, 120)  # the sender goes on by itself
    resumed = stopped.train(2, "train.max_steps=24")
    assert resumed.codes == [0, 0], resumed.output
    assert stopped.losses(24) == whole.losses(24)
    trained = [load_file(run.checkpoint(24) / "model-00001.safetensors") for run in (whole, stopped)]
    assert all(torch.equal(trained[1][name], tensor) for name, tensor in trained[0].items())  # to the last bit


@pytest.mark.parametrize(
    ("method", "ranks"),
    [
        ("mica", 2),
        ("full", 2),
        pytest.param("mica", 1, marks=pytest.mark.slow),
        pytest.param("mica", 3, marks=pytest.mark.slow),
    ],
)
def test_with_all_on_nvme(method: str, ranks: int, config: Path, smollm2: Path, tmp_path: Path) -> None:
    """Stopped, and with a step that is skipped, as the same run on the CPU.

    DeepSpeed (0.19.8) swaps nothing of a rank below 1 MiB: A is of the real model's first layers, with a large r.
    """
    if method == "mica":
        config = write(tmp_path, write_first_layers(smollm2, tmp_path / "model"), adapter={"r": 96})
    whole, stopped = Run(config, tmp_path / "whole"), Run(config, tmp_path / "stopped")
    settings = [f"adapter.method={method}", "train.max_steps=8", "train.save_steps=8", "train.learning_rate=1e-3"]
    settings += ["evaluate.questions=null", "evaluate.retention=null"]
    assert whole.train(2, *settings, infinite_gradient=[3, 6]).codes == [0, 0]
    settings += [f"deepspeed={write_nvme_settings(tmp_path, 30_000_000 // ranks)}"]
    interrupted = stopped.train(ranks, *settings, signal_in_backward=[signal.SIGUSR1, 4], infinite_gradient=[3])
    assert interrupted.codes == [os.EX_TEMPFAIL] * ranks, interrupted.output
    assert stopped.checkpoints() == ["step-000004"]
    swapped = tmp_path / "zero_stage_3"
    shutil.rmtree(swapped)
    resumed = stopped.train(ranks, *settings, infinite_gradient=[6])
    assert resumed.codes == [0] * ranks, resumed.output
    assert stopped.losses(8) == pytest.approx(whole.losses(8), rel=1e-4)
    for run in (whole, stopped):
        assert (run.state(8)["run"]["skipped_steps"], run.state(8)["optimizer_step"]) == (2, 6)
    stopped.assert_nothing_read_again()
    for rank in range(ranks):
        files = (swapped / "float32params" / f"rank{rank}").iterdir()
        assert {file.stat().st_size > 1 << 20 for file in files} == {True}
        assert len(list((swapped / f"optimizer/rank{rank}").iterdir())) >= 3  # the masters and two moments


@pytest.mark.exclusive  # it has 10 s
def test_a_signal_before_training(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = launch_ranks(2, ["train", str(config), f"output_dir={folder}"])
    while not folder.exists() and all(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    stopped = finish(ranks)
    assert stopped.codes == [os.EX_TEMPFAIL] * 2, stopped.output
    assert "stopped by SIGTERM; start again to go on" in stopped.output  # of both, if one was told of the other's first
    assert "Traceback" not in stopped.output
    assert stopped.seconds < 10


def test_a_signal_while_libraries_are_imported(config: Path, tmp_path: Path) -> None:
    """A job that begins as its time ends is requeued, too."""
    (rank,) = start_fresh(1, ["train", str(config), f"output_dir={tmp_path}/run"])
    caught = 1 << signal.SIGUSR1 - 1
    while not int(Path(f"/proc/{rank.pid}/status").read_text().split("SigCgt:")[1].split()[0], 16) & caught:
        assert rank.poll() is None
        time.sleep(0.001)
    rank.send_signal(signal.SIGUSR1)
    stopped = finish([rank])
    assert stopped.codes == [os.EX_TEMPFAIL], stopped.output
    assert stopped.output == "stopped by SIGUSR1; start again to go on\n"


def test_a_signal_in_an_evaluation(other: Run) -> None:
    """No further step is taken, which could be one too many before a scheduler's patience ends."""
    watch = {"signal_in_evaluation": [signal.SIGUSR1, 3]}
    stopped = other.train(2, "train.save_steps=50", "evaluate.every=3", **watch)
    assert stopped.codes == [os.EX_TEMPFAIL] * 2, stopped.output
    assert other.checkpoints() == ["step-000003"]


def test_a_job_that_slurm_starts_again_goes_on_from_its_own(
    reference: Run, other: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.take(reference, 7)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stopped = other.train(2, "resume=never", signal_in_update=[signal.SIGTERM, 1])  # too late for this step's end
    assert stopped.codes == [os.EX_TEMPFAIL] * 2, stopped.output
    assert other.checkpoints() == ["step-000001", "step-000002"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = other.train(2, "resume=never", "train.max_steps=4")
    assert again.codes == [0, 0], again.output
    assert f"resume: {other.checkpoint(2)}, 2 steps to go" in again.output
    assert sorted(other.seen()) == [3, 4]
    journal = [json.loads(line) for line in (other.folder / "journal.jsonl").open()]
    assert [line["kind"] for line in journal].count("run") == 1


def test_an_interrupt(other: Run) -> None:
    finished = other.train(2, signal=[signal.SIGINT, 4])  # to one of the two
    assert finished.codes == [130, 130], finished.output
    assert finished.output.count("\ninterrupted\n") == 1
    assert "Traceback" not in finished.output
    *_, last = Reader(other.folder).read()
    assert (last or {})["status"] == "KILLED"


@pytest.mark.exclusive  # each run has 30 s
@pytest.mark.parametrize(
    ("what", "allowed", "settings"),
    [
        ("infinite_loss", 5, []),
        (
            "infinite_gradient",
            3,
            [
                "checkpoint.max_skipped=3",
                "model.dtype=bfloat16",
                f"deepspeed={ROOT}/configs/deepspeed/zero3.json",
                "data.sequence_parallel=2",
                "data.pack=false",
            ],
        ),
    ],
)
def test_steps_that_are_not_finite(what: str, allowed: int, settings: list[str], other: Run) -> None:
    in_a_row = list(range(6, 6 + allowed))
    last, good = in_a_row[-1], in_a_row[-2]
    finished = other.train(2, *settings, **{what: [3, *in_a_row]})
    assert_refused(finished, f"{allowed} steps in a row, up to step {last}", "train.learning_rate")
    assert finished.codes == [2, 2]
    assert finished.output.count("its loss or gradient is not finite") == 1 + allowed
    assert other.state(good)["run"]["skipped_steps"] == allowed
    assert other.state(good)["optimizer_step"] == 4
    lost = (3, *in_a_row) if what == "infinite_loss" else ()
    assert [math.isfinite(loss) for loss in other.losses(good)] == [step not in lost for step in range(1, last)]
    for key in ("model", "exp_avg", "exp_avg_sq"):
        tensors = [load_file(other.checkpoint(s) / f"{key}-00001.safetensors") for s in (2, 3, 4, 5, good)]
        for name, tensor in tensors[0].items():
            assert tensors[1][name].equal(tensor)  # skipped
            assert not tensors[2][name].equal(tensor)
            assert tensors[4][name].equal(tensors[3][name])
    resumed = other.train(2, *settings)
    assert resumed.codes == [0, 0], resumed.output
    assert sorted(other.seen()) == list(range(last, STEPS + 1))
    assert other.state(STEPS)["optimizer_step"] == STEPS - allowed


@pytest.mark.exclusive  # it has 30 s
def test_a_full_disk(config: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=500k tmpfs {disk} 2>/dev/null"):
        pytest.skip("only root may mount the small disk that this fills")
    try:
        run = Run(config, disk / "run")
        run.notes = tmp_path / "notes"
        finished = run.train(2)
        assert_refused(finished, "cannot be written", "No space left on device", "make room")
        assert finished.codes == [2, 2]
        left = run.checkpoints()
        assert len(left) > 2
        assert not any(name.endswith(".partial") for name in left)
        assert run.state(len(left))["step"] == len(left)
        assert os.system(f"mount -o remount,size=50m {disk}") == 0
        resumed = run.train(2)
        assert resumed.codes == [0, 0], resumed.output
        assert sorted(run.seen()) == list(range(len(left) + 1, STEPS + 1))
    finally:
        os.system(f"umount {disk}")
