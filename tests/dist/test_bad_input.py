"""What a user can get wrong: one sentence, an exit code on every rank within 30 s, nothing half-written."""

import fcntl
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..conftest import Finished, start, start_fresh_ranks, start_ranks

pytestmark = pytest.mark.dist

LIMIT = 30  # seconds
HOST = socket.gethostname()


def assert_refused(finished: Finished, *parts: str) -> None:
    assert all(code != 0 for code in finished.codes), finished.output
    errors = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, finished.output
    for part in parts:
        assert part in errors[0]
    assert "Traceback" not in finished.output
    assert finished.seconds < LIMIT


def train(config: Path, *overrides: str, **variables: str) -> Finished:
    return start_ranks(2, ["train", str(config), *overrides], **variables)


@pytest.fixture
def broken_model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be damaged."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "broken"))


def test_missing_model(tiny_config: Callable[..., Path], broken_model: Path) -> None:
    (broken_model / "model.safetensors").unlink()
    assert_refused(train(tiny_config(model={"path": str(broken_model)})), "model.safetensors is missing")


def test_truncated_model(tiny_config: Callable[..., Path], broken_model: Path) -> None:
    file = broken_model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(train(tiny_config(model={"path": str(broken_model)})), "model.safetensors is truncated or damaged")


def test_incomplete_model(tiny_config: Callable[..., Path], broken_model: Path) -> None:
    weights = load_file(broken_model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken_model / "model.safetensors", metadata={"format": "pt"})
    assert_refused(train(tiny_config(model={"path": str(broken_model)})), "lacks model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("verb", ["train", "evaluate", "basis"])
def test_a_config_of_no_model(verb: str, tiny_config: Callable[..., Path], broken_model: Path, tmp_path: Path) -> None:
    about = json.loads((broken_model / "config.json").read_text())
    (broken_model / "config.json").write_text(json.dumps({**about, "num_attention_heads": 3}))
    finished = start_ranks(2, [verb, str(tiny_config(model={"path": str(broken_model)}))])
    assert_refused(finished, "config.json is not usable", "hidden size (40) is not a multiple")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_disk_that_is_not_there_or_another_runs(
    tiny_config: Callable[..., Path], nvme_settings: Path, tmp_path: Path
) -> None:
    config = tiny_config(deepspeed=str(nvme_settings))
    with (tmp_path / "rank1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a run does for as long as it lives
        assert_refused(train(config), "nvme_path", "another run has its weights", HOST)
    nvme_settings.write_text(nvme_settings.read_text().replace(str(tmp_path), "/nowhere"))
    assert_refused(train(config), "nvme_path: /nowhere is no folder that can be written: No such file or directory")
    nvme_settings.write_text(nvme_settings.read_text().replace('"nvme_path": "/nowhere",', ""))
    assert_refused(train(config), "offload_param goes to nvme and needs its nvme_path")
    assert not (tmp_path / "run" / "basis").exists()


def test_nan_in_a_weight(tiny_config: Callable[..., Path], broken_model: Path, tmp_path: Path) -> None:
    weights = load_file(broken_model / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][-1, -1] = torch.nan  # in the last rank's slice
    save_file(weights, broken_model / "model.safetensors", metadata={"format": "pt"})
    finished = train(tiny_config(model={"path": str(broken_model)}))
    assert_refused(finished, "model.layers.1.self_attn.k_proj.weight in", "holds NaN or Inf")
    assert not (tmp_path / "run" / "basis").exists()


def test_unknown_key(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    assert_refused(train(tiny_config(), "adapter.rang=3"), "unknown key adapter.rang")
    assert not (tmp_path / "run").exists()


def test_wrong_type(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    assert_refused(train(tiny_config(), "adapter.r=sixteen"), "adapter.r", "'sixteen'")
    assert not (tmp_path / "run").exists()


def test_r_too_large(tiny_config: Callable[..., Path]) -> None:
    assert_refused(train(tiny_config(), "adapter.r=21"), "adapter.r=21 exceeds min(out, in)=20 of", "k_proj")


def test_targets_that_match_nothing(tiny_config: Callable[..., Path]) -> None:
    refused = train(tiny_config(), "adapter.targets=[q_proj, query]")
    assert_refused(refused, "query matches no linear module", "q_proj")


def test_empty_corpus(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config = tiny_config()
    (tmp_path / "corpus.txt").write_text("  \n")
    assert_refused(train(config), "data.corpus", "holds no text")


def test_unreadable_corpus(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config = tiny_config()
    (tmp_path / "corpus.txt").write_bytes(b"\xff\xfe\x00\xd8")
    assert_refused(train(config), "corpus.txt is not UTF-8 text")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"question": "Who?", "options": ["Edda"], "answer": 0}, "two or more"),
        ({"question": "Who?", "options": ["Edda", "Tor"]}, '"answer" must be the index'),
    ],
)
def test_malformed_question(
    question: dict[str, object], message: str, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config()
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    assert_refused(train(config), "questions.jsonl, line 1", message)


def test_output_folder_that_cannot_be_written(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(train(tiny_config(), f"output_dir={tmp_path}/file/run"), "output_dir", "cannot be written")


def test_global_batch_that_the_ranks_cannot_divide(tiny_config: Callable[..., Path]) -> None:
    assert_refused(train(tiny_config(), "data.global_batch=6"), "data.global_batch=6 is not divisible by 2 ranks")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr_scheduler_type=cosine_with_min_lr", "train: transformers refuses these arguments: One of min_lr"),
        ("train.num_train_epochs=0", "train.num_train_epochs=0 makes no step"),
        ("train.per_device_train_batch_size=0", "train.per_device_train_batch_size=0: a micro-batch has a sequence"),
    ],
)
def test_a_training_that_cannot_begin(
    override: str, message: str, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config(train={"max_steps": -1})
    assert_refused(start_ranks(1, ["train", str(config), override]), message)
    assert not (tmp_path / "run" / "basis").exists()


def test_no_compiler(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    refused = train(tiny_config(), CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path / "ops"))
    assert_refused(refused, "no C++ compiler", "g++")


def test_nothing_to_export(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    assert_refused(start_ranks(2, ["export", str(tiny_config())]), "holds no checkpoint to export")
    assert not (tmp_path / "run").exists()


def test_ranks_that_cannot_meet(tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    command = [sys.executable, "-m", "mica_ds", "train", str(tiny_config())]
    finished = start(command, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    assert_refused(finished, "no MASTER_ADDR and MASTER_PORT")


def test_a_port_that_is_taken(tiny_config: Callable[..., Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        finished = start_ranks(1, ["train", str(tiny_config())], WORLD_SIZE="2", MASTER_PORT=port)
    assert_refused(finished, "rank 0 on", "did not meet the others", "address already in use")


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_never_comes(rank: str, tiny_config: Callable[..., Path]) -> None:
    variables = {"RANK": rank, "WORLD_SIZE": "2", "DEEPSPEED_TIMEOUT": "1"}
    finished = start_fresh_ranks(1, ["train", str(tiny_config())], "mica_ds", **variables)
    assert finished.codes == [2], finished.output
    assert f"error: rank {rank} on" in finished.output
    assert "did not meet the others" in finished.output
    assert "Traceback" not in finished.output
