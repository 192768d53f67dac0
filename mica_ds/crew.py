"""A study's runs as processes: several at once, each with a log, and ended together."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from mica_ds import comm, process
from mica_ds.arms import Run, StudySettings
from mica_ds.errors import UserError
from mica_ds.files import lock_at_once
from mica_ds.process import free_port
from mica_ds.shelf import writing

LOG = "study.log"
_LOCK = "study.lock"
_GRACE = 60.0  # seconds for a checkpoint, after which a run that was told to stop is killed
_PAUSE = 0.2  # seconds between two looks at the runs


def carry_out(
    study: StudySettings,
    runs: list[Run],
    parent: str,
    on_end: Callable[[Run, int], None],
) -> None:
    """Have all runs done that are not finished, `study.parallel` at a time; an exception ends those that go on. Local.

    `parent` is what they name as `tracking.parent`; `on_end` is told of each run and its exit code, 0 where it was
    finished before.
    """
    waiting, going, free = list(runs), list[_Attempt](), slots(study)
    try:
        while waiting or going:
            # Whose GPUs a run of an earlier start has is not known.
            while waiting and free and not (free[0] and any(attempt.is_waiting for attempt in going)):
                going.append(_Attempt(study, waiting.pop(0), parent, free.pop(0)))
            for attempt in list(going):
                code = attempt.poll()
                if code is not None:
                    going.remove(attempt)
                    free.append(attempt.slot)
                    on_end(attempt.run, code)
            time.sleep(_PAUSE if going else 0)
    except BaseException:
        for attempt in going:
            attempt.signal(signal.SIGTERM)  # to all its processes: the ranks save a checkpoint
        try:
            deadline = time.monotonic() + _GRACE
            while any(attempt.signal(0) for attempt in going) and time.monotonic() < deadline:
                time.sleep(_PAUSE)
        finally:  # what does not end, or at a second interrupt
            for attempt in going:
                attempt.signal(signal.SIGKILL)
        raise


def slots(study: StudySettings) -> list[dict[str, str]]:
    """For each of the runs at a time what its environment names as its own: by launch/train.sh its GPUs. Local.

    Raises: UserError where these are too few.
    """
    gpus = _gpus() if any(Path(word).name == "train.sh" for word in study.launch) else []
    if not gpus or (study.parallel == 1 and study.ranks is None):
        return [{} for _ in range(study.parallel)]
    ranks = study.ranks or len(gpus)
    if study.parallel * ranks > len(gpus):
        raise UserError(
            f"parallel={study.parallel} runs at a time with ranks={study.ranks or f'{ranks} (all)'} each need "
            f"{study.parallel * ranks} GPUs, and there are {len(gpus)}: parallel × ranks may be no more"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot * ranks : (slot + 1) * ranks])} for slot in range(study.parallel)
    ]


class _Attempt:
    """One start of one run.

    Its command holds a lock as long as it lives: after a study that was killed, its runs go on, and the next start of
    the study waits for them instead of doing them twice.
    """

    def __init__(self, study: StudySettings, run: Run, parent: str, slot: dict[str, str]) -> None:
        self.run, self.slot = run, slot
        self._command = [*study.launch, str(study.base), *run.overrides, "resume=auto", f"tracking.parent={parent}"]
        self._environment = os.environ | _place(study) | slot
        self.is_waiting = False
        self._process: subprocess.Popen[bytes] | None = None
        with writing(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(run.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)

    def poll(self) -> int | None:
        """The exit code, 0 for a run that was finished before; None while it goes on."""
        if self._process is None:
            if not lock_at_once(self._file):
                if not self.is_waiting:
                    self.is_waiting = True
                    comm.say(f"study: {self.run} still goes on from an earlier start; waiting for it")
                return None
            self.is_waiting = False
            try:
                if self.run.is_finished:
                    return 0
                self._start()
            finally:
                os.close(self._file)
        assert self._process
        return self._process.poll()

    def _start(self) -> None:
        with writing(self.run.folder), (self.run.folder / LOG).open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's interrupt is the study's to pass on
                    pass_fds=[self._file],
                )
            except OSError as error:
                raise UserError(f"launch: {self._command[0]} cannot be started: {error.strerror}") from None

    def signal(self, number: int) -> bool:
        """Send a signal to every process of the run; whether there was one."""
        if self._process is None:
            return False
        self._process.poll()  # what has ended is no process any more
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
            return True
        return False


def last_words(folder: Path) -> str:
    """Why a run has ended, by its log: its error, or else its last line. Local."""
    text = (folder / LOG).read_text(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it has said nothing"])[-1].removeprefix("error: ")


def _gpus() -> list[str]:
    """The GPUs that this machine leaves to the study, by the numbers that CUDA_VISIBLE_DEVICES gives them."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    number = torch.cuda.device_count()  # without a context on any of them
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (list(map(str, range(number))) if asked is None else asked.split(","))[:number]


def _place(study: StudySettings) -> dict[str, str]:
    """Where the ranks of one run meet, and their part of the cores unless the environment has it."""
    place = {"MASTER_PORT": str(free_port())}
    if study.ranks is None:
        return place
    threads = max(1, process.cores() // (study.parallel * study.ranks))
    return place | {"NUM_RANKS": str(study.ranks), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
