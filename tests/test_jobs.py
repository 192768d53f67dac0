"""What the SLURM jobs ask of srun and do about its exit code; tests/dist/test_slurm.py runs them on a real SLURM."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import ROOT

SRUN = """#!/bin/sh
case "$*" in *--overlap*) exit $LOST ;; esac
echo "$*" >srun
echo "$MASTER_ADDR $MASTER_PORT" >meeting
echo "${DS_ACCELERATOR-any}" >accelerator
exit $CODE
"""
SBATCH = """#!/bin/sh
echo "$*" >>sbatch
case "$*" in *"$REFUSED"*) exit 1 ;; esac
wc -l <sbatch
"""
SCONTROL = """#!/bin/sh
case $1 in show) printf 'n7\\nn8\\n' ;; *) echo "$*" >>scontrol ;; esac
"""
SCANCEL = """#!/bin/sh
echo "$*" >scancel
"""
ALLOCATED = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}


def submit(folder: Path, verb: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a job's script where SLURM's programs only note what they are asked for."""
    return call(folder, f"{verb}.sbatch", *arguments, **variables)


def call(folder: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The same for any script of the folder."""
    shutil.copytree(ROOT / "slurm", folder / "slurm", dirs_exist_ok=True)
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH), ("scancel", SCANCEL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    ours = ("SLURM_", "CLUSTER_", "DS_ACCELERATOR")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    given = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "CODE": "0", "LOST": "0", "REFUSED": "none", **variables}
    command = ["bash", f"slurm/{script}", *arguments]
    return subprocess.run(command, cwd=folder, env=clean | given, capture_output=True, text=True)


@pytest.mark.parametrize("verb", ["doctor", "basis", "train", "evaluate", "export"])
def test_a_job_has_one_task_for_each_gpu(verb: str, tmp_path: Path) -> None:
    done = submit(tmp_path, verb, "my.yaml", "train.seed=3", **ALLOCATED)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "srun").read_text()
    assert asked.startswith("--ntasks=16 --ntasks-per-node=8 --distribution=block --cpu-bind=none --export=ALL ")
    assert asked.endswith(f" .venv/bin/python -m mica_ds {verb} my.yaml train.seed=3\n")
    assert (tmp_path / "meeting").read_text() == "n7 11234\n"  # the first node, and a port of the job's own


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({"SLURM_NTASKS_PER_NODE": "2"}, 2),  # a site without --gpus-per-node
        ({"SLURM_GPUS_PER_NODE": "0", "SLURM_NTASKS_PER_NODE": "2"}, 2),  # bases, on nodes with GPUs
        ({"SLURM_GPUS_PER_NODE": "1"}, 1),  # of all that --exclusive gives
        ({"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_NTASKS_PER_NODE": "1"}, 4),  # the latter is a shell's in salloc
    ],
)
def test_as_many_ranks_as_were_asked_for(variables: dict[str, str], ranks: int, tmp_path: Path) -> None:
    done = submit(tmp_path, "train", "my.yaml", **ALLOCATED, **variables)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "srun").read_text().startswith(f"--ntasks={2 * ranks} --ntasks-per-node={ranks} ")
    expected = "cpu" if variables.get("SLURM_GPUS_PER_NODE") == "0" else "any"
    assert (tmp_path / "accelerator").read_text() == f"{expected}\n"


@pytest.mark.parametrize(
    ("code", "lost", "is_requeued"),
    [(0, 0, False), (2, 0, False), (75, 0, True), (1, 0, False), (137, 1, True)],
)
def test_a_job_is_requeued_after_a_signal_or_the_loss_of_a_node(
    code: int, lost: int, is_requeued: bool, tmp_path: Path
) -> None:
    done = submit(tmp_path, "train", "my.yaml", **ALLOCATED, CODE=str(code), LOST=str(lost))
    assert done.returncode == code, done.stderr
    assert (tmp_path / "scontrol").exists() is is_requeued
    if is_requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 41234\n"


@pytest.mark.parametrize(
    ("arguments", "variables", "reason"),
    [
        ([], ALLOCATED, "no config; sbatch [options] slurm/<verb>.sbatch CONFIG"),
        (["my.yaml"], {**ALLOCATED, "SLURM_GPUS_ON_NODE": ""}, "no GPUs allocated; source slurm/cluster.env before"),
        (["my.yaml"], {**ALLOCATED, "CLUSTER_ENV": "other.env"}, "other.env is missing; CLUSTER_ENV names the file"),
        (["my.yaml"], {**ALLOCATED, "SLURM_ARRAY_TASK_ID": "1"}, "the jobs of an array would share a run folder"),
    ],
)
def test_a_job_that_cannot_be_meant_says_why(
    arguments: list[str], variables: dict[str, str], reason: str, tmp_path: Path
) -> None:
    refused = submit(tmp_path, "train", *arguments, **variables)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: {reason}")
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "srun").exists()


def test_an_array_numbers_its_folders_and_requeues_one_by_one(tmp_path: Path) -> None:
    settings, last = ["output_dir=runs/study-%a", "train.seed=%a"], ALLOCATED["SLURM_JOB_ID"]
    array = {"SLURM_ARRAY_JOB_ID": last, "SLURM_ARRAY_TASK_ID": "3", "CODE": "75"}
    done = submit(tmp_path, "train", "my.yaml", *settings, **ALLOCATED, **array)
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "scontrol").read_text() == f"requeue {last}_3\n"  # without _3 it would be all of them
    assert (tmp_path / "srun").read_text().endswith(" my.yaml output_dir=runs/study-3 train.seed=3\n")


def test_a_job_elsewhere_than_in_the_repository_says_so(tmp_path: Path) -> None:
    refused = subprocess.run(
        ["bash", ROOT / "slurm/train.sbatch", "my.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert refused.stderr == f"error: {tmp_path} is not the repository's root; submit from there, or with --chdir\n"


def test_a_pipeline_is_four_jobs_that_wait_for_one_another(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").touch()
    done = call(tmp_path, "pipeline.sh", "--nodes=2", "--format=merged", "my.yaml", "train.seed=3")
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        [f"{verb}:", "job", str(number)] for number, verb in enumerate(("basis", "train", "evaluate", "export"), 1)
    ]
    on_cpus, after = "--gpus-per-node=0 --nodes=1 --ntasks-per-node=8", "--kill-on-invalid-dep=yes"
    assert (tmp_path / "sbatch").read_text().splitlines() == [
        f"--parsable {on_cpus} slurm/basis.sbatch my.yaml train.seed=3",
        f"--parsable --nodes=2 --dependency=afterok:1 {after} slurm/train.sbatch my.yaml train.seed=3",
        f"--parsable --nodes=2 --dependency=afterok:2 {after} slurm/evaluate.sbatch my.yaml train.seed=3",
        f"--parsable {on_cpus} --dependency=afterok:3 {after} slurm/export.sbatch my.yaml train.seed=3 --format=merged",
    ]


@pytest.mark.parametrize(
    ("arguments", "variables", "reason", "cancelled"),
    [
        (["--nodes=2"], {}, "no config; bash slurm/pipeline.sh --nodes=2 CONFIG", ""),
        (["--nodes", "2", "my.yaml"], {}, "2 is not a file; options of sbatch are written as --name=value", ""),
        (["my.yaml"], {"CLUSTER_ENV": "other.env"}, "other.env is missing; CLUSTER_ENV names the file", ""),
        (["my.yaml"], {"REFUSED": "evaluate"}, "sbatch refused the job for evaluate, for the reason above", "1 2\n"),
    ],
)
def test_a_pipeline_that_cannot_be_meant_says_why(
    arguments: list[str], variables: dict[str, str], reason: str, cancelled: str, tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").touch()
    refused = call(tmp_path, "pipeline.sh", *arguments, **variables)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {reason}")
    assert refused.stderr.count("\n") == 1
    assert (tmp_path / "scancel").exists() is bool(cancelled)
    if cancelled:
        assert (tmp_path / "scancel").read_text() == cancelled


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({}, "--num_accelerators 4 "),
        ({"NUM_RANKS": "2"}, "--num_accelerators 2 "),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, "--include localhost:2,3 "),
        ({"CUDA_VISIBLE_DEVICES": "1,2,3", "NUM_RANKS": "2"}, "--include localhost:1,2 "),
        ({"CUDA_VISIBLE_DEVICES": ""}, "--num_accelerators 2 "),  # on the CPU
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "--num_accelerators 2 "),
        ({"CUDA_VISIBLE_DEVICES": "2,3,4", "DS_ACCELERATOR": "cpu"}, "--num_accelerators 2 "),
    ],
)
def test_one_node_starts_a_rank_for_each_gpu_that_it_may_use(
    variables: dict[str, str], asked: str, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name, text in (("nvidia-smi", "seq 0 3"), ("deepspeed", 'echo "$* ${CUDA_VISIBLE_DEVICES-unset}"')):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    ours = ("CUDA_VISIBLE_DEVICES", "NUM_RANKS", "DS_ACCELERATOR")
    clean = {key: value for key, value in os.environ.items() if key not in ours}
    environment = clean | {"PATH": f"{programs}:{os.environ['PATH']}"} | variables
    command = ["bash", str(tmp_path / "launch/train.sh"), "my.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"--no_local_rank {asked}--master_port 29500 --module mica_ds train my.yaml")
    if "--include" in asked:
        assert done.stdout.endswith(" unset\n")
    for wrong in ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, {"CUDA_VISIBLE_DEVICES": "1,2", "NUM_RANKS": "3"}):
        told = environment | {"DS_ACCELERATOR": ""} | wrong
        refused = subprocess.run(command, env=told, capture_output=True, text=True)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: ")
