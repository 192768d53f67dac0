"""Signs of life between the ranks: which one failed, ended or fell silent first is known to all within moments.

Rank 0 holds a connection to each other rank, on which both sides send a line every few seconds: some bytes a rank,
however many there are. A connection that closes is a process that ended; one that stays silent is a process that was
stopped, or a host that was lost. Not by way of torch's own store: a request to a stopped server never returns, whatever
its timeout (torch 2.13).
"""

import asyncio
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple, NoReturn

PATIENCE = 300.0
"""Seconds after a rank's last sign of life in which the others end, until the config says otherwise."""
_BEATS = 10  # that a rank may miss
_GRACE = 5.0  # seconds that a rank has to end by itself once it is known that another has failed
_STUCK = 10  # seconds in one collective after which a rank that has come to its end will not join it any more
_SILENT = "gave no sign of life"
_KILLED = "ended without a word (it crashed, or was killed)"
_BYE, _DONE = "bye", "done"
_LINE = 1 << 20  # bytes of the longest line


class Verdict(NamedTuple):
    """The first cause: which rank, and what became of it."""

    rank: int
    reason: str
    code: int
    """With which all ranks exit."""
    is_told: bool
    """Whether that rank prints the cause itself."""


@dataclass
class _Peer:
    """The other end of a connection."""

    rank: int
    writer: asyncio.StreamWriter | None = None
    silent: int = 0
    """Beats of this rank since the other's last."""
    has_left: bool = False
    waiting: list[str] = field(default_factory=list)
    """What was to be said before there was a connection."""

    def connect(self, writer: asyncio.StreamWriter, *greeting: str) -> None:
        self.writer = writer
        for line in (*greeting, *self.waiting):
            self.send(line)

    def send(self, line: str) -> None:
        if self.writer is not None:
            self.writer.write(f"{line}\n".encode())
        elif line:
            self.waiting.append(line)


class Watchdog:
    """A thread that exchanges signs of life, and ends this process when another rank is the cause of a failure."""

    def __init__(self, rank: int, hosts: list[str]) -> None:
        """Of rank `rank` among those on `hosts`."""
        self._rank, self._hosts, self._patience = rank, hosts, PATIENCE
        self.hint = ""
        """What to do about a rank that was killed."""
        self._peers = {other: _Peer(other) for other in (range(1, len(hosts)) if rank == 0 else [0])}
        self._main_thread = threading.get_ident()
        self._loop = asyncio.new_event_loop()
        self._expecting: asyncio.Task[None] | None = None
        self._verdict: Verdict | None = None
        self._is_known, self._has_joined = threading.Event(), threading.Event()
        self._has_changed = asyncio.Event()
        self._is_done = self._is_failing = False
        self.stage = ""
        """What the run is at, as in `step 7`."""
        self.at_abort: Callable[[int], None] = lambda code: None
        """Called, on a thread of its own, when the verdict is that this process ends with a code."""

    def start(self, token: str, listener: socket.socket | None, address: tuple[str, int]) -> None:
        """Start the thread: rank 0 listens, the others connect to its address. Local.

        `token` is what a rank must say to be let in.
        """
        self._token = token
        watch = self._watch(listener, address)
        threading.Thread(target=self._loop.run_until_complete, args=[watch], daemon=True).start()
        if listener is None:  # killed before rank 0 could hear of it, a rank would be missed by its silence alone
            self._has_joined.wait(self._patience)

    def be_patient(self, patience: float) -> None:
        """End so many seconds after a rank's last sign of life, from now on; on all ranks at once. Local."""

        def change() -> None:
            self._patience = patience
            self._has_changed.set()

        self._loop.call_soon_threadsafe(change)

    def finish(self) -> None:
        """Tell the others that this rank has done its part: it joins no collective but the last barrier. Local."""
        self._is_done = True
        self._loop.call_soon_threadsafe(self._send_all, f"{_DONE} {self._rank}")

    def leave(self) -> None:
        """Say goodbye: that this rank ends now is no failure. Local."""
        said = threading.Event()
        self._loop.call_soon_threadsafe(self._send_all, _BYE)
        self._loop.call_soon_threadsafe(said.set)
        said.wait(_GRACE)

    def accuse(self, reason: str, code: int) -> Verdict:
        """Tell the others that this rank has failed, and return the first cause: this, or another rank's. Local."""
        mine = Verdict(self._rank, f"failed: {reason}", code, is_told=True)
        self._is_failing = True
        self._loop.call_soon_threadsafe(self._report, mine)
        verdict = self.verdict_on_another() or mine
        if verdict.rank == self._rank:
            time.sleep(0.5)  # the others say now that they end: the cause is to be the last thing printed
        return verdict

    def verdict_on_another(self) -> Verdict | None:
        """The first cause of what failed here, if it becomes known in the next moments. Local."""
        self._is_known.wait(_GRACE)
        if self._verdict is not None and self._verdict.rank != self._rank:
            time.sleep(1)  # launchers end all ranks with the first: the cause is to be printed before
        return self._verdict

    async def _watch(self, listener: socket.socket | None, address: tuple[str, int]) -> NoReturn:
        if listener:
            self._server = await asyncio.start_server(self._admit, sock=listener, limit=_LINE)
        else:
            self._reading = asyncio.create_task(self._join(address))
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._has_changed.wait(), self._silence() / (_BEATS + 1))
            self._send_all("")
            for peer in self._peers.values():
                # Counted in beats of this rank: a job that was suspended as a whole goes on afterwards.
                peer.silent = 0 if self._has_changed.is_set() else peer.silent + 1
                if peer.silent > _BEATS and not peer.has_left:
                    self._report(Verdict(peer.rank, f"{_SILENT} for {self._silence():g} s", code=1, is_told=False))
            self._has_changed.clear()

    async def _join(self, address: tuple[str, int]) -> None:
        try:
            reader, writer = await asyncio.open_connection(*address)
        except OSError as error:
            self._report(Verdict(0, f"cannot be reached at {address[0]}:{address[1]}: {error}", code=1, is_told=False))
            return
        self._peers[0].connect(writer, f"{self._token} {self._rank}")
        self._has_joined.set()
        await self._listen(self._peers[0], reader)

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        greeting = b""
        with suppress(OSError, ValueError):  # reset, or an endless line
            greeting = await reader.readline()
        token, _, rank = greeting.decode(errors="replace").strip().partition(" ")
        if token != self._token:
            writer.close()  # a stranger, such as a port scan
            return
        peer = self._peers[int(rank)]
        peer.connect(writer)
        await self._listen(peer, reader)

    async def _listen(self, peer: _Peer, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):  # reset by a rank that ended
            async for line in reader:
                peer.silent = 0
                self._hear(peer, line.decode().strip())
        if not peer.has_left:
            self._report(Verdict(peer.rank, _KILLED, code=1, is_told=False))

    def _hear(self, peer: _Peer, line: str) -> None:
        if line == _BYE:
            peer.has_left = True
        elif line.startswith(_DONE):
            if self._expecting is None:
                if self._rank == 0:
                    self._send_all(line)
                self._expecting = asyncio.create_task(self._expect_end(int(line.removeprefix(_DONE))))
        elif line:
            verdict = Verdict(*json.loads(line))
            if peer.rank == 0:
                self._conclude(verdict)
            else:
                self._report(verdict)

    def _report(self, verdict: Verdict) -> None:
        """Rank 0 tells all what came first; where it is lost itself, each of the others finds so."""
        if self._verdict is None:
            self._send_all(json.dumps(verdict))
            if 0 in (self._rank, verdict.rank):
                self._conclude(verdict)

    def _conclude(self, verdict: Verdict) -> None:
        if self._verdict is not None:
            return
        self._verdict = verdict
        if verdict.rank != self._rank or not verdict.is_told:
            if not (self._is_failing and verdict.is_told):  # ranks that fail alike, or are all stopped by a scheduler
                self._say(verdict)
            _fall_silent()
            self._loop.run_in_executor(None, self.at_abort, verdict.code)
            rest = self._patience - self._silence() if verdict.reason.startswith(_SILENT) else _GRACE
            self._loop.call_later(rest, os._exit, verdict.code)
        self._is_known.set()

    def _say(self, verdict: Verdict) -> None:
        prefix = "" if verdict.is_told else "error: "
        hint = f" {self.hint}" if verdict.reason == _KILLED else ""
        me, operation = self._name(self._rank), self._operation()[0]
        line = f"{prefix}{self._name(verdict.rank)} {verdict.reason}; {me} was in {operation}, and ends.{hint}"
        print(f"\n{line}", file=sys.stderr, flush=True)  # a progress bar leaves its line open

    async def _expect_end(self, ended: int) -> None:
        """Another rank has done its part: a collective that this one waits in will not come about any more."""
        waited = 0
        while waited < _STUCK:
            await asyncio.sleep(1)
            waited = waited + 1 if self._operation()[1] and not self._is_done else 0
        self._report(Verdict(ended, "came to its end before the others", code=1, is_told=False))

    def _silence(self) -> float:
        """Seconds after which a rank is given up: the others end within the patience."""
        return self._patience - min(_GRACE, self._patience / 5)

    def _send_all(self, line: str) -> None:
        for peer in self._peers.values():
            peer.send(line)

    def _name(self, rank: int) -> str:
        return f"rank {rank} (host {self._hosts[rank]})"

    def _operation(self) -> tuple[str, bool]:
        """What the main thread is in, or has been thrown out of, and whether it waits for other ranks there."""
        active = sys._current_exceptions().get(self._main_thread, (None, None, None))
        raised = [frame for frame, _ in traceback.walk_tb(active[2])][::-1]
        stack = traceback.walk_stack(sys._current_frames()[self._main_thread])
        # DeepSpeed (0.19.8) wraps each of its functions in one of nvtx's.
        now = [frame for frame, _ in stack if _module(frame) != "deepspeed.utils.nvtx"]
        frames = raised if raised and _is_waiting(raised[0]) else now
        ours = [f for f in frames if _module(f).startswith("mica_ds.") and _module(f) != "mica_ds.comm"]
        called_from = f", called from {_describe(ours[0])}" if ours else ""
        stage = f", {self.stage}" if self.stage else ""
        return f"{_describe(frames[0])}{called_from}{stage}", _is_waiting(frames[0])


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def _is_waiting(frame: FrameType) -> bool:
    """Whether a function waits for other ranks, where it is the innermost one."""
    # NCCL's collectives are waited for in torch.cuda.
    return _module(frame).startswith(("torch.distributed", "torch.cuda", "deepspeed.", "mica_ds.comm"))


def _describe(frame: FrameType) -> str:
    return f"{_module(frame).replace('.distributed_c10d', '')}.{frame.f_code.co_qualname}"


def _fall_silent() -> None:
    """Drop whatever this process would still print: libraries that lose their peers would bury the cause."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
