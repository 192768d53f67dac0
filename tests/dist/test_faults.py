"""Faults between ranks: all end soon with codes that are not 0, and the first cause is said once, and last."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest
import torch
import transformers

from mica_ds.config import load_config
from mica_ds.delivery import unsent
from mica_ds.footprint import count_footprint, micro_batch
from mica_ds.watchdog import PATIENCE

from ..conftest import LAUNCH_LIMIT, Finished, finish, launch_ranks, write_config
from ..slurm import wait_until

pytestmark = [pytest.mark.dist, pytest.mark.exclusive]

LIMIT = 30  # seconds
HOST = socket.gethostname()
LENGTH = 200  # tokens of a sequence, where memory is short
IN_TRAINING = "mica_ds.callback.RunCallback.on_log"
MEETING = "torch.distributed.new_group"


def break_down(
    rank: int, place: str, act: str, config: Path, log: Path, verb: str = "train", ranks: int = 2
) -> tuple[Finished, list[str]]:
    """Run a verb on some ranks, on one of which a function raises, exits, returns early, or has little memory.

    Returns what has finished, with the seconds from the fault on, and the lines that all have printed.
    """
    with log.open("w") as output:
        arguments = [str(rank), place, act, verb, str(config)]
        processes = launch_ranks(ranks, arguments, "tests.dist.faulty", output)
        wait_until(lambda: "FAULT" in log.read_text(), log.parent, LAUNCH_LIMIT)
        finished = finish(processes)
    return finished, log.read_text().strip().splitlines()


@pytest.mark.parametrize(("rank", "ranks", "place"), [(0, 2, IN_TRAINING), (1, 3, "mica_ds.basis._solve_one")])
def test_a_rank_that_raises_is_the_last_to_speak(
    rank: int, ranks: int, place: str, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config(data={"global_batch": 2 * ranks})
    finished, lines = break_down(rank, place, "raise", config, tmp_path / "log", ranks=ranks)
    assert finished.codes == [1] * ranks, lines
    assert finished.seconds < LIMIT
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "\n".join(lines).count("Traceback") == 1, lines
    for other in {*range(ranks)} - {rank}:
        (line,) = [line for line in lines if f"rank {other} (host {HOST}) was in " in line]
        assert f"rank {rank} (host {HOST}) failed: ZeroDivisionError: division by zero" in line
    journal, store = tmp_path / "run/journal.jsonl", f"sqlite:///{tmp_path}/mlflow.db"
    wait_until(lambda: not unsent(journal.parent, store), tmp_path, 120)  # the sender goes on by itself
    (found,) = mlflow.MlflowClient(store).search_runs(["1"])
    assert found.info.status == "FAILED"


@pytest.mark.parametrize(("act", "code"), [("exit", 0), ("kill", -9)])
def test_a_rank_that_vanishes_is_named(act: str, code: int, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    finished, lines = break_down(0, IN_TRAINING, act, tiny_config(), tmp_path / "log")
    assert finished.codes == [code, 1], lines
    assert finished.seconds < LIMIT
    assert f"error: rank 0 (host {HOST}) ended without a word" in lines[-1]
    assert f"rank 1 (host {HOST}) was in torch.distributed." in lines[-1]
    assert "step 1, and ends" in lines[-1]
    assert "train.per_device_train_batch_size=2" in lines[-1]  # should it have been killed for its memory


def test_a_rank_that_is_killed_while_the_ranks_meet(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    finished, lines = break_down(1, MEETING, "kill", tiny_config(), tmp_path / "log")
    assert finished.codes == [1, -9], lines
    assert finished.seconds < LIMIT
    assert f"error: rank 1 (host {HOST}) ended without a word" in lines[-1]
    assert f"rank 0 (host {HOST}) was in torch.distributed." in lines[-1]


@pytest.mark.parametrize(("rank", "ranks"), [(1, 2), (0, 3)])
def test_a_rank_that_returns_early_is_named(
    rank: int, ranks: int, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config(data={"global_batch": 2 * ranks})
    finished, lines = break_down(rank, IN_TRAINING, "return", config, tmp_path / "log", ranks=ranks)
    assert finished.codes == [1] * ranks, lines
    assert finished.seconds < LIMIT
    said = [line for line in lines if f"rank {rank} (host {HOST}) came to its end before the others" in line]
    assert len(said) == ranks, lines
    assert lines[-1] in said
    assert "Traceback" not in "\n".join(lines)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_is_named_in_time(
    stopped: int, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    log, other = tmp_path / "run.log", 1 - stopped
    config = tiny_config(patience=5, train={"max_steps": 10_000})
    with log.open("w") as output:
        processes = launch_ranks(2, ["train", str(config)], output=output)
    try:
        wait_until(lambda: "{'loss'" in log.read_text(), tmp_path, 120)
        os.kill(processes[stopped].pid, signal.SIGSTOP)
        began = time.monotonic()
        assert processes[other].wait(60) == 1
        assert time.monotonic() - began < 8  # the patience, and a busy machine
        last = log.read_text().strip().splitlines()[-1]
        assert f"error: rank {stopped} (host {HOST}) gave no sign of life for 4 s" in last
        assert f"rank {other} (host {HOST}) was in " in last
        assert re.search(r"called from mica_ds\.\S+, step \d", last)
        os.kill(processes[stopped].pid, signal.SIGCONT)
        assert processes[stopped].wait(60) == 1  # it has been given up, and ends when it goes on
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("place", [MEETING, "mica_ds.cli.load_config"])
def test_a_rank_that_is_stopped_before_it_knows_the_config(
    place: str, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    log = tmp_path / "run.log"
    with log.open("w") as output:
        arguments = ["1", place, "stop", "train", str(tiny_config(patience=5))]
        processes = launch_ranks(2, arguments, "tests.dist.faulty", output)
    try:
        wait_until(lambda: "FAULT" in log.read_text(), tmp_path, LAUNCH_LIMIT)
        assert processes[0].wait(PATIENCE + 3) == 1  # the patience, and a busy machine
        last = log.read_text().strip().splitlines()[-1]
        assert f"error: rank 1 (host {HOST}) gave no sign of life for {PATIENCE - 5:g} s" in last
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("place", "room", "phase", "advice"),
    [
        ("mica_ds.callback.RunCallback.on_step_begin", 100 << 20, "training", None),
        (
            "mica_ds.evaluate.Evaluator.score_base",
            20 << 20,
            "evaluating",
            "evaluate.batch_tokens=4096 has logits of 0.75 GiB (49152 a token, fp32); lower it",
        ),
        (
            "mica_ds.basis._solve_one",
            4 << 20,
            "computing bases",
            "32.0 MiB (fp32) and up to 64.0 MiB for the largest (4096 × 2048): run fewer ranks a node",
        ),
    ],
)
def test_out_of_memory_says_what_to_change(
    place: str, room: int, phase: str, advice: str | None, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    is_of_bases = phase == "computing bases"
    model = write_large_layer(tmp_path / "model") if is_of_bases else tiny_model("llama")
    config = write_config(tmp_path, model, data={"sequence_length": LENGTH})
    finished, lines = break_down(1, place, str(room), config, tmp_path / "log", "basis" if is_of_bases else "train")
    assert finished.codes == [2, 2], lines
    assert finished.seconds < LIMIT
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert error == lines[-1]
    assert f"rank 1 (host {HOST}) ran out of memory while {phase}" in error
    assert (advice or advice_on_training(config)) in error
    assert "Traceback" not in "\n".join(lines)


def test_a_rank_that_the_kernel_kills_for_its_memory(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    group = Path(f"/sys/fs/cgroup/memory/mica_ds-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("only root may make the memory cgroup (of version 1) that this needs")
    try:
        (group / "memory.limit_in_bytes").write_text(str(10 << 20))
        config, place = tiny_config(data={"sequence_length": LENGTH}), "mica_ds.callback.RunCallback.on_step_begin"
        finished, lines = break_down(1, place, str(group), config, tmp_path / "log")
    finally:
        with suppress(OSError):  # where what failed has left a process in it
            group.rmdir()
    assert finished.codes == [1, -signal.SIGKILL], lines
    assert finished.seconds < LIMIT
    assert lines[-1].startswith(f"error: rank 1 (host {HOST}) ended without a word")
    assert f"If the kernel killed it for lack of memory (see dmesg): {advice_on_training(config)}" in lines[-1]


def advice_on_training(config: Path) -> str:
    settings = load_config(config)
    counted = count_footprint(settings.model, settings.adapter, micro_batch(settings)).activations
    return (
        f"train.per_device_train_batch_size=2 × data.sequence_length={LENGTH} keeps {counted / 2**20:.1f} MiB of "
        "activations: lower either, or set train.activation_checkpointing=true"
    )


def write_large_layer(folder: Path) -> Path:
    """One layer, with weights of 16 and 32 MiB."""
    sizes = {"hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 8}
    config = transformers.AutoConfig.for_model("llama", vocab_size=96, **sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
