"""What a process has to know of its machine before it meets others: its rank, compiler, GPUs, cores and memory."""

import errno
import math
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from threadpoolctl import threadpool_limits

from mica_ds.errors import UserError

_CGROUP = Path("/sys/fs/cgroup")


def find_ranks() -> None:
    """Set RANK, LOCAL_RANK and WORLD_SIZE where the launcher has not, as srun says or for one rank alone. Local.

    Raises: UserError where these are no numbers, or there are several ranks and no place to meet that this host knows.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    slurm = {
        "RANK": "SLURM_PROCID",
        "LOCAL_RANK": "SLURM_LOCALID",
        "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",  # SLURM_NTASKS is the job's, also in the shell that salloc opens
    }
    if "RANK" not in os.environ and "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_PROCID"):
        os.environ.update({ours: os.environ[theirs] for ours, theirs in slurm.items()})
        groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])  # 8(x2),4
        sizes = [size for size, times in groups for _ in range(int(times or 1))]
        os.environ["LOCAL_SIZE"] = sizes[int(os.environ["SLURM_NODEID"])]
    is_mpi = "RANK" not in os.environ and os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1"
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    if is_mpi:
        raise UserError(
            "mpirun sets no RANK, LOCAL_RANK and WORLD_SIZE: start the ranks by torchrun, deepspeed or srun"
        )
    for key in alone:
        if not os.environ[key].isdecimal():
            raise UserError(f"{key}={os.environ[key]} in the environment is no number: take it out, or set it right")
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    elif not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(f"{os.environ['WORLD_SIZE']} ranks, but no MASTER_ADDR and MASTER_PORT to meet at; export both")
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.getaddrinfo(address, port)  # torch (2.13) would ask again for ten minutes
    except OSError as error:
        where = f"MASTER_ADDR={address} and MASTER_PORT={port} name no place to meet"
        raise UserError(f"{where} that {socket.gethostname()} knows: {error.strerror}") from None


def free_port() -> int:
    """A port that nothing listens on, for ranks that take it seconds later. Local.

    It is below those that Linux hands out, or another's connection could take it before they do.
    """
    while True:
        port = 10000 + secrets.randbelow(20000)
        try:
            with socket.create_server(("", port)):
                return port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise


def why_apart(error: Exception) -> str:
    """What to tell the user where this rank did not meet the others for this reason. Local."""
    rank, size, address, port = (os.environ[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    reason = str(error).split("\n")[0].rstrip(".")
    return (
        f"rank {rank} on {socket.gethostname()} did not meet the others at {address}:{port} ({reason}); see whether "
        f"all {size} ranks have started, rank 0 on {address}, and whether the nodes let one another reach that port"
    )


def heed_accelerator() -> None:
    """Hide the GPUs where DS_ACCELERATOR=cpu says that DeepSpeed shall not use them. Local, before CUDA is asked.

    What torch saw of them would be used by all but DeepSpeed.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def require_no_gpu() -> None:
    """Raise a UserError where this process has GPUs that torch does not see: it would train on the CPU. Local.

    DS_ACCELERATOR=cpu says that it shall.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    if os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0") or _lists_gpus():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
        raise UserError(
            f"{socket.gethostname()} has GPUs, but torch {torch.__version__}, built {built}, sees none: the driver may "
            "be too old, or a container without access (--nv); DS_ACCELERATOR=cpu in the environment means the CPU"
        )


def _lists_gpus() -> bool:
    try:
        return b"GPU" in subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False


def require_own_gpu() -> None:
    """Raise a UserError where a node has more ranks than this one sees GPUs. Local, alike on all ranks of the node.

    Each takes the GPU of its local rank, as DeepSpeed does. Nothing where the launcher does not say how many there are.
    """
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun's, or DeepSpeed's and srun's
    ranks, gpus = int(told or 1), torch.cuda.device_count()
    if ranks > gpus:
        raise UserError(
            f"{ranks} ranks on {socket.gethostname()}, but each sees {gpus} of its GPUs: start one rank a GPU, and let "
            "each see all of them (without --gpus-per-task and --gpu-bind)"
        )


def require_compiler(for_nvme: bool = False) -> None:
    """Raise a UserError where DeepSpeed could not compile its C++ ops, or the one for NVMe beside a GPU. Local."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise UserError(f"no C++ compiler ({compiler}) on {socket.gethostname()}; DeepSpeed compiles ops: install g++")
    if not for_nvme or not torch.cuda.is_available():
        return
    from torch.utils.cpp_extension import CUDA_HOME  # which takes time to find out

    if CUDA_HOME is None:
        raise UserError(
            f"no CUDA toolkit on {socket.gethostname()}; DeepSpeed compiles its NVMe offload against it: install the "
            "one of torch's version, or set CUDA_HOME to it"
        )


def load_deepspeed(is_quiet: bool) -> None:
    """Import DeepSpeed, before any module that does; `is_quiet` lets it and other libraries show only errors. Local.

    It finds what compiles its ops beside this interpreter, and those that setup.sh has compiled, activated or not.
    """
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if (ops := Path(sys.prefix) / "ops").is_dir():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ops))
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed (0.19.8) imports MLflow if it can, for its autotuner alone: 1.4 s and 47 MiB of every rank.
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    import transformers
    from deepspeed.utils import logger

    if sys.modules["mlflow"] is None:
        del sys.modules["mlflow"]
    logger.setLevel("ERROR" if is_quiet else "WARNING")
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about one another
    if is_quiet:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


def cores() -> int:
    """How many cores this process may keep busy: those it is bound to, or the quota of its control groups. Local."""
    return min([len(os.sched_getaffinity(0)), *map(_quota, _control_groups())])


def _quota(group: Path) -> int:
    """The cores of time that a control group gets, at least 1; a large number without a limit."""
    with suppress(OSError, ValueError):
        share, period = map(int, (group / "cpu.max").read_text().split())
        return max(1, share // period)
    return sys.maxsize


def own_cores() -> tuple[str, frozenset[int]]:
    """The host, and the cores that this process may use. Local."""
    return socket.gethostname(), frozenset(os.sched_getaffinity(0))


def share_cores(ranks: int) -> None:
    """Take a part of the cores that so many ranks share: two with all cores each slow each other tenfold (measured).

    Ranks that their launcher has bound to cores of their own, and a thread count in OMP_NUM_THREADS, are left alone;
    but not torchrun's, which is 1 whatever the machine (accelerate's launcher is torchrun, too). Local.
    """
    threads = max(1, cores() // ranks)
    if "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # accelerate would raise torch's threads again (1.15)
        torch.set_num_threads(threads)
        threadpool_limits(threads)  # OpenBLAS in numpy and scipy


def free_memory() -> int:
    """Bytes that are free on this host, or in the control groups that a job runs in, where that is less. Local."""
    return int(min([psutil.virtual_memory().available, *map(_free_in, _control_groups())]))


def _control_groups() -> list[Path]:
    """The folders of this process's control group and those above it; none where they are not of version 2."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = _CGROUP / next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        return [group for group in (own, *own.parents) if group.is_relative_to(_CGROUP)]
    return []


def _free_in(group: Path) -> int | float:
    """What a control group may still take; infinite without a limit. What it keeps of files can be given up."""
    with suppress(OSError, ValueError, StopIteration):
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (group / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return limit - used + cached
    return math.inf
