"""A real SLURM of two nodes on this one machine, all of its files in one folder."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from .conftest import environment, free_ports, start

NODES = ("n1", "n2")
# Without cgroups, which containers may lack. Job IDs name folders in runs/slurm: these are no real job's. A requeued
# job starts as soon as its credential has expired (2 minutes, by default), a silent node is down after 10 s.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
KillWait=10
JobRequeue=0
SlurmdTimeout=10
MessageTimeout=5
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
FirstJobId={first_job}
NodeName=n1 NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1
PartitionName=urgent Nodes=n1,n2 PriorityTier=2
"""


def obstacle() -> str | None:
    """Why the cluster cannot run here, and what to do about it."""
    if not all(map(shutil.which, ("munged", "slurmctld", "slurmd"))):
        return "no SLURM here: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "SLURM starts jobs as their owners: run as root"
    return unresolved()


def unresolved() -> str | None:
    """The same for the names of the two nodes."""
    try:
        for node in NODES:
            socket.gethostbyname(node)
    except OSError:
        return "the nodes have no address: echo 127.0.0.1 n1 n2 >> /etc/hosts"
    return None


class Cluster:
    """A running SLURM; `variables` are what its programs need to find it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *command: str, **variables: str) -> str:
        """The output of one of SLURM's programs, or of one that calls them."""
        return start(list(command), **self.variables, **variables).output.strip()

    def start_node(self, name: str) -> None:
        self._nodes[name] = self.start_daemon(name, ["slurmd", "-D", "-N", name])

    def lose_node(self, name: str) -> None:
        """Kill all that runs there: the daemon, its keepers of steps and the ranks."""
        self._nodes[name].kill()
        place = {"SLURMD_NODENAME": name, **self.variables}
        processes = [process for process in psutil.process_iter() if _runs_in(process, place)]
        keepers = {process.parent() for process in processes} - {None, *processes}
        for process in [*keepers, *processes]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def start_daemon(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        """Start a daemon that ends with the cluster, not at Ctrl-C: the jobs must end before it."""
        output = self._stack.enter_context((self.folder / f"{name}.log").open("a"))
        daemon = subprocess.Popen(
            command, env=environment(**self.variables), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._stack.callback(daemon.wait)
        self._stack.callback(daemon.kill)
        return daemon


def _runs_in(process: psutil.Process, variables: dict[str, str]) -> bool:
    with suppress(psutil.Error):
        return variables.items() <= process.environ().items()
    return False


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Run SLURM in `folder`, its logs included; leaves no process behind."""
    names = {"host": socket.gethostname(), "folder": folder, "ports": free_ports(3)}
    first_job = 60_000_000 + 100 * (os.getpid() % 60_000)  # another cluster may run beside it
    (folder / "slurm.conf").write_text(CONFIG.format(**names, first_job=first_job))
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    # --force: the socket is in a folder that only root may enter.
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munged += [f"--{file}-file={folder}/munge.{file}" for file in ("key", "log", "pid", "seed")]

    with ExitStack() as stack:
        found = Cluster(folder, stack)
        found.start_daemon("munged", munged)
        wait_until((folder / "munge.socket").exists, folder)
        found.start_daemon("slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            found.start_node(node)
        wait_until(lambda: found.run("sinfo", "--noheader", "--partition=main", "--format=%T %D") == "idle 2", folder)
        try:
            yield found
        finally:  # what a test has left running would outlive the daemons
            found.run("scancel", "--me")
            wait_until(lambda: not found.run("squeue", "--noheader"), folder)


def wait_until(is_done: Callable[[], bool], folder: Path, limit: float = 30) -> None:
    """Ask until it is so; where it is not within the limit (seconds), fail with the logs in the folder."""
    deadline = time.monotonic() + limit
    while not is_done():
        if time.monotonic() > deadline:
            logs = [f"{log.name}:\n{log.read_text()}" for log in sorted(folder.glob("*.log"))]
            raise TimeoutError("\n".join([f"not within {limit} s", *logs]))
        time.sleep(0.2)
