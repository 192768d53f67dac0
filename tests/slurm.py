"""A real SLURM of two nodes on this one machine, all of its files in one folder."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .conftest import environment, free_ports, start

# Without cgroups, which containers may lack. Job IDs name folders in runs/slurm: these are no real job's.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
KillWait=2
FirstJobId={first_job}
NodeName=n1 NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=main Nodes=n1,n2 Default=YES
"""
DAEMONS = {"slurmctld": ["slurmctld", "-D"], **{node: ["slurmd", "-D", "-N", node] for node in ("n1", "n2")}}


def obstacle() -> str | None:
    """Why the cluster cannot run here, and what to do about it."""
    if not all(map(shutil.which, ("munged", "slurmctld", "slurmd"))):
        return "no SLURM here: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "SLURM starts jobs as their owners: run as root"
    try:
        for node in ("n1", "n2"):
            socket.gethostbyname(node)
    except OSError:
        return "the nodes have no address: echo 127.0.0.1 n1 n2 >> /etc/hosts"
    return None


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Run SLURM in `folder`, its logs included; gives the variables its programs need, leaves no process behind."""
    variables = {"SLURM_CONF": str(folder / "slurm.conf")}
    names = {"host": socket.gethostname(), "folder": folder, "ports": free_ports(3)}
    (folder / "slurm.conf").write_text(CONFIG.format(**names, first_job=60_000_000 + os.getpid()))
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    # --force: the socket is in a folder that only root may enter.
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munged += [f"--{file}-file={folder}/munge.{file}" for file in ("key", "log", "pid", "seed")]

    def query(*command: str) -> str:
        return start(list(command), **variables).output.strip()

    with ExitStack() as stack:
        _start_daemon(stack, munged, folder / "munged.log", variables)
        wait_until((folder / "munge.socket").exists, folder)
        for name, command in DAEMONS.items():
            _start_daemon(stack, command, folder / f"{name}.log", variables)
        wait_until(lambda: query("sinfo", "--noheader", "--format=%T %D") == "idle 2", folder)
        try:
            yield variables
        finally:  # what a test has left running would outlive the daemons
            query("scancel", "--me")
            wait_until(lambda: not query("squeue", "--noheader"), folder)


def _start_daemon(stack: ExitStack, command: list[str], log: Path, variables: dict[str, str]) -> None:
    """Start a daemon that ends with the stack, not at Ctrl-C: the jobs must end before it."""
    output = stack.enter_context(log.open("w"))
    daemon = subprocess.Popen(
        command, env=environment(**variables), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    stack.callback(daemon.wait)
    stack.callback(daemon.kill)


def wait_until(is_done: Callable[[], bool], folder: Path, limit: float = 30) -> None:
    """Ask until it is so; where it is not within the limit (seconds), fail with the logs in the folder."""
    deadline = time.monotonic() + limit
    while not is_done():
        if time.monotonic() > deadline:
            logs = [f"{log.name}:\n{log.read_text()}" for log in sorted(folder.glob("*.log"))]
            raise TimeoutError("\n".join([f"not within {limit} s", *logs]))
        time.sleep(0.2)
