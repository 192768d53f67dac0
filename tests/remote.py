"""Two hosts, n1 and n2, that ssh reaches: this one machine, by a server on loopback with keys of its own."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .conftest import environment, free_ports
from .slurm import NODES, unresolved, wait_until

SERVER = """
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
PasswordAuthentication no
StrictModes no
UsePAM no
"""
CLIENT = """
Host {nodes}
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known
  StrictHostKeyChecking accept-new
"""


def obstacle() -> str | None:
    """Why nothing can be started on the hosts here, and what to do about it."""
    if not all(map(shutil.which, ("/usr/sbin/sshd", "ssh", "pdsh"))):
        return "no ssh server or no pdsh here: apt-get install openssh-server pdsh"
    if os.geteuid() != 0:
        return "the ssh server needs its folder, /run/sshd: run as root"
    return unresolved()


@contextmanager
def hosts(folder: Path) -> Iterator[dict[str, str]]:
    """Run the server; gives the variables with which `ssh n1` reaches it, and nothing but these hosts."""
    [port] = free_ports(1)
    names = {"folder": folder, "port": port, "nodes": " ".join(NODES)}
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "server").write_text(SERVER.format(**names))
    (folder / "client").write_text(CLIENT.format(**names))
    # ssh reads no variable that names its settings, and looks for the user's in no other home.
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/client "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "sshd.log").open("w") as log:
        server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", folder / "server"], stderr=log)
    try:
        wait_until(lambda: _listens(port), folder)
        yield {"PATH": f"{folder}/bin:{environment()['PATH']}"}
    finally:
        server.terminate()
        server.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
