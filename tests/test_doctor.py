"""Single checks of `mica-ds doctor` without ranks; `tests/dist/test_doctor.py` breaks a cluster."""

import json
import os
import shutil
import sqlite3
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mica_ds import checks, comm, links, suites
from mica_ds.config import load_config
from mica_ds.doctor import Check, Result, _look, print_results
from mica_ds.errors import UserError
from mica_ds.links import alike, clocks_agree, pairs_are_even, pairs_to_time

from .conftest import ROOT, write_nvme_settings


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "rank", lambda: 0)
    monkeypatch.setattr(comm, "world_size", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def test_the_minority_differs_and_without_one_rank_0_is_right() -> None:
    assert alike([{"torch": "2"}, {"torch": "2"}, {"torch": "1"}]) == ("torch 2", {2: "torch 1 instead of 2"})
    assert alike([{"torch": "1"}, {"torch": "2"}, {"torch": "2"}])[1] == {0: "torch 1 instead of 2"}
    assert alike([{"torch": "2"}, {}])[1] == {1: "torch none instead of 2"}


def test_clocks_may_differ_by_a_second() -> None:
    assert clocks_agree([10.0, 10.9, 9.2]) == ("1.70 s apart", {})
    assert clocks_agree([10.0, 10.1, 8.5])[1] == {2: "-1.5 s"}


def test_a_slow_pair_is_found_among_its_own_kind() -> None:
    fast, slow = (1e-5, 200e9), (1e-5, 20e9)
    even = [("n1", {1: fast}), ("n1", {2: slow}), ("n2", {3: fast}), ("n2", {0: slow})]
    detail, faults = pairs_are_even(even)
    assert detail == "within a node 200 to 200 GB/s, 10 to 10 µs; between nodes 20 to 20 GB/s, 10 to 10 µs"
    assert faults == {}
    even[1] = ("n1", {2: (1e-5, 5e9)})
    fault = "ranks 1 and 2 exchange 5 GB/s, usual between nodes are 20"
    assert pairs_are_even(even)[1] == {1: fault, 2: fault}
    even[3] = ("n2", {0: (2e-4, 20e9)})
    late = "ranks 3 and 0 need 200 µs for a word, usual between nodes are 10"
    assert pairs_are_even(even)[1] == {0: late, 1: fault, 2: fault, 3: late}


def test_gpus_of_two_nodes_that_are_all_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = (1e-5, 20e9), (1e-5, 0.12e9)
    for seen, together in (
        ([("n1", {1: slow}), ("n2", {})], 0.12),
        ([("n1", {1: fast, 2: slow}), ("n1", {3: slow}), ("n2", {}), ("n2", {})], 0.24),
    ):
        monkeypatch.setattr(links, "device", lambda: torch.device("cpu"))
        assert pairs_are_even(seen)[1] == {}
        monkeypatch.setattr(links, "device", lambda: torch.device("cuda"))
        faults = pairs_are_even(seen)[1]
        assert faults.keys() == set(range(len(seen)))
        pair = (0, 1) if len(seen) == 2 else (1, 3)
        said = f"exchange 0.12 GB/s, and their hosts {together}: nodes with GPUs need 1"
        assert faults[1] == f"ranks {pair[0]} and {pair[1]} {said}"
    shared = (1e-5, 0.39e9)  # eight GPUs by one adapter of 25 Gbit/s
    sound = [("n1", {8 + rank: shared}) for rank in range(8)] + [("n2", {})] * 8
    assert pairs_are_even(sound)[1] == {}


def test_each_rank_is_timed_with_its_neighbours_and_across_nodes() -> None:
    assert pairs_to_time(["n1"]) == []
    assert pairs_to_time(["n1"] * 2) == [(0, 1)]
    assert pairs_to_time(["n1"] * 4) == [(0, 1), (2, 3), (1, 2), (3, 0)]
    assert pairs_to_time(["n1", "n2", "n3"]) == [(0, 1), (2, 0), (1, 2)]
    across = pairs_to_time(["n1"] * 8 + ["n2"] * 8)[16:]
    assert across == [(rank, rank + 8) for rank in range(8)]


def test_a_look_that_hangs_or_raises_is_a_finding() -> None:
    released = threading.Event()
    assert _look(Check("stuck", released.wait, "", limit=0.1)) == (None, "nothing came of it in 0.1 s")
    released.set()
    assert _look(Check("broken", lambda: 1 / 0, "")) == (None, "ZeroDivisionError: division by zero")
    assert _look(Check("sound", lambda: 1, "")) == (1, "")


def test_the_table_has_one_line_of_advice_for_each_red(capsys: pytest.CaptureFixture[str]) -> None:
    print_results(
        [Result("clocks", True, "0.01 s apart", "", []), Result("room", False, "none", "make room", [1])], False
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if any(c.isalpha() for c in line)]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines[2:]]
    assert cells == [["clocks", "good", "0.01 s apart"], ["room", "BAD", "none"], ["", "", "→ make room"]]


GIB = 1 << 30
A100: dict[str, Any] = {
    "is_available": True,
    "is_bf16_supported": True,
    "get_device_name": "NVIDIA A100",
    "get_device_properties": SimpleNamespace(uuid="1"),
    "mem_get_info": (79 * GIB, 80 * GIB),
}


@pytest.mark.parametrize(
    ("changes", "free", "message"),
    [
        ({}, 64, ""),
        ({"is_available": False}, 6, "6.0 of 64 GiB of host memory are free"),
        ({"mem_get_info": (71 * GIB, 80 * GIB)}, 64, "71.0 of 80 GiB of the GPU are free"),
        ({"is_bf16_supported": False}, 64, "NVIDIA A100 has no bfloat16, which model.dtype asks for"),
    ],
)
def test_a_machine_must_have_its_memory_free(
    changes: dict[str, Any],
    free: int,
    message: str,
    tiny_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**A100, **changes}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 3))
    monkeypatch.setattr(checks, "_driver", lambda _: {"driver": "570.1", "compute mode": "Default"})
    memory = SimpleNamespace(total=64 * GIB, available=free * GIB)
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: memory)
    config = load_config(tiny_config(model={"dtype": "bfloat16"}))
    if message:
        with pytest.raises(UserError, match=message):
            checks.machine(config)
    else:
        found = checks.machine(config)
        assert found.keys() >= {"device", "driver", "memory", "compute mode", "CUDA", "NCCL", "cores", "host memory"}
        assert (found["device"], found["memory"], found["NCCL"]) == ("NVIDIA A100", "80 GiB", "2.29.3")


def test_room_is_asked_for_by_the_size_of_checkpoints(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    config = load_config(tiny_config(adapter={"method": "full"}), [f"output_dir={disk}/run"])
    assert "have room" in checks.room(config)
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {disk} 2>/dev/null"):
        pytest.skip("only root may mount the small disk")
    try:
        with pytest.raises(UserError, match=r"1\.0 MiB free in .*disk, but 4 checkpoints of"):
            checks.room(config)
    finally:
        os.system(f"umount {disk}")


def test_checkpoints_of_the_demonstration_have_the_size_of_the_readme() -> None:
    config = load_config(ROOT / "configs/demonstration.yaml")
    if not config.model.path.is_dir():
        pytest.skip("run `python launch/prepare_model.py` first: it makes the real model")
    assert round(checks.checkpoint_bytes(config) / 1e6) == 39


def test_nvme_needs_its_buffers(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "training_arguments", lambda *_: None)  # needs a process group
    file = write_nvme_settings(tmp_path, 4_000_000)
    config = load_config(tiny_config(deepspeed=str(file)))
    assert "goes with 1 ranks" in checks.deepspeed_settings(config)
    for section, key, value, message in (
        ("offload_param", "buffer_size", 1000, "less than the largest partition, 1966080"),
        ("offload_optimizer", "buffer_count", 3, "buffer_count is below 4"),
    ):
        settings = json.loads(write_nvme_settings(tmp_path, 4_000_000).read_text())
        settings["zero_optimization"][section][key] = value
        file.write_text(json.dumps(settings))
        with pytest.raises(UserError, match=message):
            checks.deepspeed_settings(config)


def test_the_run_folder_and_the_cache_must_be_shared(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config())
    assert str(config.data.cache) in checks.shared_folders(config, "seen")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache: .*file cannot be written"):
        checks.shared_folders(load_config(tiny_config(data={"cache": str(tmp_path / "file")})), "seen")
    monkeypatch.setattr(comm, "rank", lambda: 1)
    monkeypatch.setattr(checks, "_VISIBLE", 0)
    assert "is one folder" in checks.shared_folders(config, "seen")
    config = load_config(tiny_config(data={"cache": str(tmp_path / "other")}))
    with pytest.raises(UserError, match=r"data\.cache: .*other is not the folder that rank 0 writes to"):
        checks.shared_folders(config, "seen")


def test_the_template_must_take_the_first_chat(
    tiny_config: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "Who built it?"}, {"role": "assistant", "content": "Edda."}]
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": chat})] * 2))
    data = {"corpus": [str(tmp_path / "chats.jsonl")]}
    assert checks.data_files(load_config(tiny_config(data=data)))["corpus 1"].startswith("2 documents in 1 files")
    model = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))
    config = load_config(tiny_config(data={**data, "broken": "skip"}, model={"path": str(model)}))
    (model / "chat_template.jinja").write_text("{{ raise_exception('no chats') }}")
    assert checks.data_files(config)["corpus 1"].startswith("1 documents in 1 files")
    assert checks.data_files(config)["corpus 1"].endswith("1 broken")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        checks.data_files(config)


def test_suites_need_lm_eval(tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setattr(suites, "_manager", suites._manager.__wrapped__)
    with pytest.raises(UserError, match=r"evaluate\.suites needs lm-eval"):
        checks.data_files(load_config(tiny_config(evaluate={"suites": ["hellaswag"]})))


def test_a_global_batch_that_the_ranks_cannot_divide(tiny_config: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"data\.global_batch=3 is not divisible"):
        checks.deepspeed_settings(load_config(tiny_config(data={"global_batch": 3})))


def test_a_locked_store_is_found(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(tiny_config())
    assert "can be written" in checks.tracker(config)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as opened:
        opened.execute("CREATE TABLE runs (id)")
        assert "can be written" in checks.tracker(config)
        opened.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="database is locked"):
            checks.tracker(config)


def test_a_gpu_that_refuses_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho GPU-1, 570.1, Default\necho GPU-2, 570.1, Prohibited\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert checks._driver("1") == {"driver": "570.1", "compute mode": "Default"}
    with pytest.raises(UserError, match="GPU 2 has the compute mode Prohibited"):
        checks._driver("2")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="nvidia-smi does not run"):
        checks._driver("1")


def test_ops_that_cannot_be_compiled(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("c++")
    assert compiler
    (tmp_path / "c++").symlink_to(compiler)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"deepspeed_shm_comm cannot be compiled: .* ninja not being installed"):
        checks.compiled_ops(load_config(tiny_config()))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        checks.compiled_ops(load_config(tiny_config()))
