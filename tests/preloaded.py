"""Programs forked from a process that has imported the libraries: a rank starts 6 s of CPU sooner than by itself.

What the tests start as users do (launchers, SLURM, the quickstart, MLflow's servers) starts by itself.
"""

import array
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import IO, Any

# What a run imports as it goes on.
_LATER = ("datasketch", "deepspeed.runtime.zero.muon.muon_optimizer", "matplotlib.backends.backend_svg", "scipy.stats")


class Program:
    """A forked `python -m MODULE`, with what the tests use of `subprocess.Popen`."""

    def __init__(self, module: str, arguments: list[str], cwd: Path, env: dict[str, str], output: IO[str]) -> None:
        """Start it in a session of its own, with stdout and stderr into `output`."""
        order = {"module": module, "arguments": arguments, "cwd": str(cwd), "env": env}
        self._output = output
        self.pid: int = _ask(order, output.fileno())
        self._end = os.pidfd_open(self.pid)
        self.returncode: int | None = None

    def __del__(self) -> None:
        os.close(self._end)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._code(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._code(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end; what has come out."""
        self.wait(timeout)
        if not self._output.readable():  # a file of the test's own
            return "", None
        self._output.seek(0)
        return self._output.read(), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _code(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._end], [], [], timeout)[0]:
            self.returncode = _ask({"ended": self.pid})
        return self.returncode


@cache
def _server() -> tuple[socket.socket, Any]:
    """The process to fork from, which ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.preloaded", str(theirs.fileno())]
    variables = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], env={**os.environ, **variables}, pass_fds=[theirs.fileno()]
    )
    theirs.close()
    return ours, process


def _ask(order: dict[str, Any], *descriptors: int) -> int:
    link, _ = _server()
    fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    link.sendmsg([json.dumps(order).encode()], fds)
    return int(link.recv(100))


def _serve(link: socket.socket) -> dict[str, Any] | None:
    """Fork at each order, and return it in the child; None at the end."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(link, 1 << 20, 1)
        if not message:
            return None
        order = json.loads(message)
        if "ended" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["ended"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                link.close()
                os.setsid()
                os.dup2(descriptors[0], 1)
                os.dup2(descriptors[0], 2)
                os.close(descriptors[0])
                return order
            os.close(descriptors[0])
        link.send(str(answer).encode())


def main() -> None:
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # as `comm.start` does
    import cpuinfo
    import torch
    from threadpoolctl import threadpool_limits

    import mica_ds.recipe  # noqa: F401

    for module in _LATER:
        importlib.import_module(module)
    about_cpu = cpuinfo.get_cpu_info()
    cpuinfo.get_cpu_info = lambda: about_cpu  # DeepSpeed asks three times, and each time takes a second
    gc.freeze()  # else each collection of a rank looks through all that the libraries hold
    del sys.modules["mlflow"]
    order = _serve(socket.socket(fileno=int(sys.argv[1])))
    if order:
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["env"])
        if "OMP_NUM_THREADS" in os.environ:  # which libraries read as they are imported
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
            threadpool_limits(int(os.environ["OMP_NUM_THREADS"]))
        time.tzset()
        sys.argv = [order["module"], *order["arguments"]]
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
