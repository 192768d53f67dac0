"""How ranks find each other, before they have met."""

import os
import socket
from pathlib import Path

import pytest
import torch

from mica_ds import comm, process
from mica_ds.errors import UserError

from .conftest import free_ports


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MASTER_ADDR": "no host"}, "no MASTER_ADDR and MASTER_PORT to meet at; export both"),
        ({"MASTER_ADDR": "no host", "MASTER_PORT": "29500"}, "MASTER_ADDR=no host and MASTER_PORT=29500 name no place"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "first"}, "MASTER_PORT=first name no place to meet"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, ""),
    ],
)
def test_a_place_to_meet_must_be_known(variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    if said:
        with pytest.raises(UserError, match=said):
            process.find_ranks()
    else:
        process.find_ranks()


def test_a_free_port_is_below_those_that_linux_hands_out() -> None:
    assert max(process.free_port() for _ in range(100)) < 32768


def test_a_port_that_is_listened_on_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = free_ports(2)
    drawn = [taken - 10000, free - 10000]
    monkeypatch.setattr(process.secrets, "randbelow", lambda _: drawn.pop(0))
    with socket.create_server(("127.0.0.1", taken)):
        assert process.free_port() == free


def test_a_rank_of_slurms_is_known_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "")  # so that they are restored
        monkeypatch.delenv(name)
    given = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16"}
    given |= {
        "SLURM_NTASKS": "64",
        "SLURM_STEP_TASKS_PER_NODE": "4,8(x2)",
        "SLURM_NODEID": "1",
    }  # the first is the job's
    for name, value in {**given, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    process.find_ranks()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["9", "1", "16"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    process.require_own_gpu()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as with --gpus-per-task
    with pytest.raises(UserError, match=r"8 ranks on .*, but each sees 1 of its GPUs: start one rank a GPU"):
        process.require_own_gpu()


@pytest.mark.parametrize(("asked", "visible"), [("cpu", ""), ("cuda", "0,1"), (None, "0,1")])
def test_no_gpu_is_seen_where_deepspeed_shall_use_none(
    asked: str | None, visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if asked:
        monkeypatch.setenv("DS_ACCELERATOR", asked)
    seen = []

    def is_available() -> bool:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return bool(seen[-1])

    def stop(*_: object, **__: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(process, "find_ranks", lambda: None)
    for name in ("require_compiler", "require_own_gpu"):
        monkeypatch.setattr(process, name, lambda: None)
    monkeypatch.setattr(process, "load_deepspeed", stop)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InterruptedError):  # not the UserError of `require_no_gpu`
        comm.start()
    assert seen == [visible]


@pytest.mark.parametrize(
    ("variables", "is_refused"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, True),
        ({"SLURM_GPUS_ON_NODE": "8", "DS_ACCELERATOR": "cpu"}, False),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}, False),
        ({"PATH": "with nvidia-smi", "CUDA_VISIBLE_DEVICES": "-1"}, False),
        ({"SLURM_GPUS_ON_NODE": "0"}, False),
        ({"PATH": "with nvidia-smi"}, True),
        ({"PATH": "with nvidia-smi", "DS_ACCELERATOR": "cpu"}, False),
        ({}, False),
    ],
)
def test_gpus_that_torch_does_not_see_are_no_reason_to_train_on_the_cpu(
    variables: dict[str, str], is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    for name, value in {"PATH": "nowhere", **variables}.items():
        monkeypatch.setenv(name, value.replace("with nvidia-smi", str(tmp_path)))
    if is_refused:
        with pytest.raises(UserError, match=r"has GPUs, but torch .* sees none"):
            process.require_no_gpu()
    else:
        process.require_no_gpu()


@pytest.mark.parametrize(("has_gpu", "toolkit"), [(False, None), (True, "/usr/local/cuda"), (True, None)])
def test_nvme_beside_a_gpu_needs_the_toolkit(
    has_gpu: bool, toolkit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", toolkit)
    process.require_compiler()
    if has_gpu and not toolkit:
        with pytest.raises(UserError, match=r"no CUDA toolkit on .* set CUDA_HOME to it"):
            process.require_compiler(for_nvme=True)
    else:
        process.require_compiler(for_nvme=True)


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1), ("50000 100000", 1), ("max 100000", 64), ("", 64)])
def test_a_quota_of_time_is_as_few_cores(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(process, "_control_groups", lambda: [tmp_path, tmp_path / "none"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert process.cores() == cores
