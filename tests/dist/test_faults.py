"""Faults between ranks: all end soon with codes that are not 0, and the first cause is said once, and last."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from mica_ds.config import load_config
from mica_ds.delivery import unsent
from mica_ds.footprint import count_footprint, micro_batch
from mica_ds.watchdog import PATIENCE

from ..conftest import LAUNCH_LIMIT, Finished, finish, launch_ranks, start_ranks
from ..slurm import wait_until

pytestmark = pytest.mark.dist

LIMIT = 30  # seconds
HOST = socket.gethostname()
IN_TRAINING = "mica_ds.callback.RunCallback.on_log"


def break_down(rank: int, place: str, act: str, config: Path, log: Path) -> tuple[Finished, list[str]]:
    """Train on two ranks, on one of which a function raises, exits or returns early.

    Returns what has finished, with the seconds from the fault on, and the lines that both have printed.
    """
    with log.open("w") as output:
        arguments = [str(rank), place, act, "train", str(config)]
        processes = launch_ranks(2, arguments, "tests.dist.faulty", output)
        wait_until(lambda: "FAULT" in log.read_text(), log.parent, LAUNCH_LIMIT)
        finished = finish(processes)
    return finished, log.read_text().strip().splitlines()


@pytest.mark.parametrize(("rank", "place"), [(0, IN_TRAINING), (1, "mica_ds.basis._solve_one")])
def test_a_rank_that_raises_is_the_last_to_speak(
    rank: int, place: str, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    finished, lines = break_down(rank, place, "raise", tiny_config(), tmp_path / "log")
    assert finished.codes == [1, 1], lines
    assert finished.seconds < LIMIT
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "\n".join(lines).count("Traceback") == 1, lines
    (line,) = [line for line in lines if f"rank {1 - rank} (host {HOST}) was in " in line]
    assert f"rank {rank} (host {HOST}) failed: ZeroDivisionError: division by zero" in line
    journal, store = tmp_path / "run/journal.jsonl", f"sqlite:///{tmp_path}/mlflow.db"
    wait_until(lambda: not unsent(journal.parent, store), tmp_path, 120)  # the sender goes on by itself
    (found,) = mlflow.MlflowClient(store).search_runs(["1"])
    assert found.info.status == "FAILED"


def test_a_rank_that_exits_is_named(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    finished, lines = break_down(0, IN_TRAINING, "exit", tiny_config(), tmp_path / "log")
    assert finished.codes == [0, 1], lines
    assert finished.seconds < LIMIT
    assert f"error: rank 0 (host {HOST}) ended without a word" in lines[-1]
    assert f"rank 1 (host {HOST}) was in torch.distributed." in lines[-1]
    assert "step 1, and ends" in lines[-1]
    assert "train.per_device_train_batch_size=2" in lines[-1]  # should it have been killed for its memory


def test_a_rank_that_returns_early_is_named(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    finished, lines = break_down(1, IN_TRAINING, "return", tiny_config(), tmp_path / "log")
    assert finished.codes == [1, 1], lines
    assert finished.seconds < LIMIT
    said = [line for line in lines if f"rank 1 (host {HOST}) came to its end before the others" in line]
    assert len(said) == 2, lines
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
        assert time.monotonic() - began < 5 + LIMIT
        last = log.read_text().strip().splitlines()[-1]
        assert f"error: rank {stopped} (host {HOST}) gave no sign of life for 5 s" in last
        assert f"rank {other} (host {HOST}) was in " in last
        assert re.search(r"called from mica_ds\.\S+, step \d", last)
        os.kill(processes[stopped].pid, signal.SIGCONT)
        assert processes[stopped].wait(60) == 1  # it has been given up, and ends when it goes on
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_that_is_stopped_before_it_knows_the_config(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    with log.open("w") as output:
        arguments = ["1", "mica_ds.cli.load_config", "stop", "train", str(tiny_config(patience=5))]
        processes = launch_ranks(2, arguments, "tests.dist.faulty", output)
    try:
        assert processes[0].wait(1.1 * PATIENCE + 3 * LIMIT) == 1
        last = log.read_text().strip().splitlines()[-1]
        assert f"error: rank 1 (host {HOST}) gave no sign of life for {PATIENCE:g} s" in last
    finally:
        for process in processes:
            process.kill()


def test_out_of_memory_says_what_to_change(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    length, batch = 200, 2
    config = tiny_config(data={"sequence_length": length}, evaluate={"questions": None, "retention": None})
    program = "tests.dist.limited"
    finished = start_ranks(2, ["train", str(config), f"train.per_device_train_batch_size={batch}"], program)
    assert all(code != 0 for code in finished.codes), finished.output
    (error,) = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert "ran out of memory while training" in error
    settings = load_config(config, [f"train.per_device_train_batch_size={batch}"])
    counted = count_footprint(settings.model, settings.adapter, micro_batch(settings)).activations
    assert f"keeps {counted / 2**20:.1f} MiB of activations" in error
    assert "train.activation_checkpointing=true" in error
    assert "Traceback" not in finished.output
