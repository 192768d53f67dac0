"""Pull the plug of a run at random moments, start it again, and compare what comes out with an undisturbed run.

    python -m tests.faults.campaign [--moments 20] [--seed 0] [--folder DIR] [--out FILE.json]

Each moment is a run of its own of the real model on two ranks (fp32, ZeRO-3, offloaded to the CPU). When its output or
its files show that a phase has begun, and a random moment has passed, a random rank is killed with SIGKILL. Then the
same command is given again until it ends well. A moment passes where all ranks had ended within 30 s with codes that
are not 0 and had named the lost rank, the final loss and every tensor of the adapter equal the undisturbed run's to
1e-5, and the run folder holds exactly the files that the undisturbed run's holds. Three more moments: SIGTERM and
SIGUSR1 to both ranks, which must end with code 75, and SIGSTOP to one, which the other must name. Updates, checkpoints
and exports are slowed (`slow.py`), so that they can be hit; a moment that misses its phase, by what the run has left,
by the step that was gone on from and by what the other rank was in when it heard, does not pass. Half an hour on 2
cores.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from ..conftest import SMOLLM2, launch_ranks, write_config
from ..preloaded import Program

RANKS, STEPS, SAVE_EVERY = 2, 6, 2
LIMIT = 30  # seconds within which all ranks must have ended
PATIENCE = 5  # seconds after a rank's last sign of life in which the others end
TOLERANCE = 1e-5
SIGNALS = (Signals.SIGTERM, Signals.SIGUSR1)  # after which a run ends by itself, with a checkpoint


Sight = Callable[[Path, str], bool]  # what the run folder, or the output of all ranks, shows


@dataclass(frozen=True)
class Phase:
    """A part of a run, and by what a moment in it is known."""

    has_begun: Sight
    length: float
    """Seconds over which moments are spread from then on."""
    has_ended: Sight
    resumed_from: tuple[int, ...]
    """The steps that the next start may go on from."""
    survivor_in: str
    """A pattern of what the other rank was in when it heard."""
    is_of_rank_0: bool = False
    """Whether rank 0 works alone, and the others wait for it."""
    left: str = ""
    """What rank 0 leaves unfinished there when it is killed."""


def _said(what: str, times: int = 1) -> Sight:
    return lambda run, output: output.count(what) >= times


def _exists(what: str) -> Sight:
    return lambda run, output: any(run.glob(what))


def _is_evaluating_again(run: Path, output: str) -> bool:
    *steps, rest = output.split("{'loss'")
    return len(steps) == STEPS and "evaluation:" in rest


_FIRST, _THIRD = f"checkpoints/step-{SAVE_EVERY:06d}", f"step {SAVE_EVERY + 1}"
_FORWARD, _BACKWARD, _UPDATE = (_said(f"{_THIRD}: {what}", RANKS) for what in ("forward", "backward", "update"))
_EVALUATION = r"mica_ds\.(evaluate|inference|loss|adapter)\.\S+$"
PHASES = {
    "forward": Phase(
        _FORWARD,
        0.8,
        _said(f"{_THIRD}: backward"),
        (2,),
        rf"mica_ds\.(trainer\.\S+compute_loss|adapter\.\S+|loss\.\S+), {_THIRD}$",
    ),
    "backward": Phase(
        _BACKWARD, 0.25, _said(f"{_THIRD}: update"), (2,), rf"mica_ds\.(recipe|adapter|loss)\.\S+, {_THIRD}$"
    ),
    "update": Phase(_UPDATE, 0.4, _said("step 4: forward"), (2,), rf"heeding, {_THIRD}$"),
    "gathering for a checkpoint": Phase(  # the log is printed just before
        _said("{'loss'", SAVE_EVERY), 0.3, _exists(f"{_FIRST}*"), (0,), r"mica_ds\.(optimizer|checkpoint)\.\S+, step 2$"
    ),
    "writing a checkpoint": Phase(
        _exists(f"{_FIRST}.partial"),
        1.5,
        _exists(_FIRST),
        (0, SAVE_EVERY),
        r"mica_ds\.checkpoint\._write\S*, step 2$",
        is_of_rank_0=True,
        left=f"{_FIRST}.partial",
    ),
    "exporting": Phase(
        _exists("adapter.partial"),
        0.1,
        _exists("adapter"),
        (STEPS,),
        r"mica_ds\.export\.\S+$",
        is_of_rank_0=True,
        left="adapter.partial",
    ),
    "recording": Phase(
        _exists("adapter"),
        1.5,
        _exists("summary.json"),
        (STEPS,),
        r"mica_ds\.(figures|page|report|record|tracking|files|scores)\.\S+$",
        is_of_rank_0=True,
    ),
    "loading": Phase(_said(" sequences of "), 0.8, _exists("basis"), (0,), r"mica_ds\.(?!basis)\S+$"),
    "bases": Phase(_exists("basis"), 3.0, _said(" solved"), (0,), r"mica_ds\.(?!recipe\.train|inference)\S+$"),
    "evaluating before": Phase(_said("evaluation:"), 4.0, _said("step 1: forward"), (0,), _EVALUATION),
    "evaluating after": Phase(_is_evaluating_again, 1.0, _exists("adapter*"), (STEPS,), _EVALUATION),
}


@dataclass(frozen=True)
class Moment:
    """When which signal goes to which ranks."""

    phase: str
    delay: float
    """Seconds after the phase has been seen."""
    ranks: list[int]
    signal: Signals = Signals.SIGKILL


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    moment: Moment
    seconds: float
    """From the signal to the end of all ranks."""
    codes: list[int]
    survivor_in: str
    """What the other rank was in when it heard: computing, or a collective of gathering, reducing or saving."""
    left: list[str]
    """Unfinished files and folders that the signal left."""
    resumed_from: list[int]
    """The step that each further start went on from, by the steps that it took."""
    loss_difference: float
    adapter_difference: float
    faults: list[str]
    """What did not come out as promised."""


def plan_moments(number: int, seed: int) -> list[Moment]:
    """Random moments, spread evenly over the phases, and in each phase over the ranks."""
    draw = random.Random(seed)
    ranks = {phase: itertools.cycle(draw.sample(range(RANKS), RANKS)) for phase in PHASES}
    phases = itertools.islice(itertools.cycle(PHASES), number)
    return [Moment(phase, draw.uniform(0, PHASES[phase].length), [next(ranks[phase])]) for phase in phases]


OTHER_SIGNALS = [
    Moment("forward", 0.3, [0, 1], Signals.SIGTERM),
    Moment("backward", 0.2, [0, 1], Signals.SIGUSR1),
    Moment("backward", 0.1, [1], Signals.SIGSTOP),
]


class Campaign:
    """Runs of one config, each in a run folder of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        """Make the config in `folder`, and the undisturbed run."""
        self._folder = folder
        train = {"max_steps": STEPS, "save_steps": SAVE_EVERY, "save_strategy": "steps"}
        self._config = write_config(folder, model, train=train, patience=PATIENCE)
        self._clean = folder / "undisturbed"
        self._start_to_the_end(self._clean)

    def try_moment(self, moment: Moment, name: str) -> Outcome:
        """Disturb a run, start it again until it ends well, and compare it."""
        run = self._folder / name
        is_over, seconds, codes, output = self._disturb(run, moment)
        heard = re.search(r"rank \d \(host [^)]*\) was in (.*), and ends", output)
        survivor_in = heard[1] if heard else ""
        left = sorted(str(path.relative_to(run)) for path in run.rglob("*.partial"))
        resumed_from: list[int] = []
        differences = (float("nan"), float("nan"))
        faults = _faults_of_the_end(moment, seconds, codes, output)
        try:
            resumed_from = self._start_to_the_end(run)
            differences = self._compare(run, faults)
            if is_over or not _is_hit(moment, survivor_in, left, resumed_from[0]):
                faults.append(f"came beside {moment.phase}")
        except RuntimeError as error:
            faults.append(str(error))
        return Outcome(moment, seconds, codes, survivor_in, left, resumed_from, *differences, faults)

    def _start(self, run: Path, program: str = "mica_ds") -> tuple[list[Program], Path]:
        log = run.with_suffix(".log")
        with log.open("w") as file:
            arguments = ["train", str(self._config), f"output_dir={run}", f"data.cache={run}-cache"]
            return launch_ranks(RANKS, arguments, program, file, OMP_NUM_THREADS="1"), log

    def _disturb(self, run: Path, moment: Moment) -> tuple[bool, float, list[int], str]:
        """Send the signal, and return whether its phase had ended, how long the ranks took to end, codes and output."""
        processes, log = self._start(run, "tests.faults.slow")
        phase = PHASES[moment.phase]
        try:
            while not phase.has_begun(run, log.read_text()) and all(process.poll() is None for process in processes):
                time.sleep(0.002)
            time.sleep(moment.delay)
            is_over = phase.has_ended(run, log.read_text())
            started = time.monotonic()
            for rank in moment.ranks:
                processes[rank].send_signal(moment.signal)
            is_stop = moment.signal == Signals.SIGSTOP
            for process in [p for rank, p in enumerate(processes) if not (is_stop and rank in moment.ranks)]:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, started + 2 * LIMIT - time.monotonic()))
            seconds = time.monotonic() - started
        finally:
            for process in processes:
                process.kill()
        return is_over, seconds, [process.wait() for process in processes], log.read_text()

    def _start_to_the_end(self, run: Path, attempts: int = 3) -> list[int]:
        """Give the command until it ends well, and return where each start went on from."""
        resumed_from = []
        for _ in range(attempts):
            processes, log = self._start(run)
            codes = [process.wait(600) for process in processes]
            output = log.read_text()
            resumed_from.append(STEPS - output.count("{'loss'"))
            if codes == [0] * RANKS:
                return resumed_from
        raise RuntimeError(f"did not end well in {attempts} starts: {output[-500:]}")

    def _compare(self, run: Path, faults: list[str]) -> tuple[float, float]:
        losses = [json.loads((folder / "summary.json").read_text())["final_loss"] for folder in (run, self._clean)]
        ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (run, self._clean))
        loss = abs(losses[0] - losses[1])
        adapter = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
        if not (loss <= TOLERANCE and adapter <= TOLERANCE):
            faults.append("another result")
        for difference, what in (
            (_files(run) - _files(self._clean), "left"),
            (_files(self._clean) - _files(run), "lacks"),
        ):
            if difference:
                faults.append(f"{what} {', '.join(sorted(difference))}")
        return loss, adapter


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _faults_of_the_end(moment: Moment, seconds: float, codes: list[int], output: str) -> list[str]:
    faults = []
    if 0 in codes:
        faults.append(f"exit codes {codes}: not disturbed at all, or not noticed")
    if seconds > LIMIT:
        faults.append(f"ranks ended only after {seconds:.0f} s")
    if moment.signal in SIGNALS:
        if codes != [75] * RANKS:
            faults.append(f"exit codes {codes}")
    elif not output.strip().splitlines()[-1].startswith(f"error: rank {moment.ranks[0]} (host"):
        faults.append("the lost rank was not named at last")
    return faults


def _is_hit(moment: Moment, survivor_in: str, left: list[str], resumed_from: int) -> bool:
    """Whether the other rank was in the phase, too, and what was left and gone on from is of it."""
    phase = PHASES[moment.phase]
    if moment.signal in SIGNALS:
        return resumed_from == SAVE_EVERY + 1  # the end of the step that they came in
    waits = phase.is_of_rank_0 and moment.ranks == [0]
    if waits and phase.left and left != [phase.left]:
        return False
    expected = r"^torch\.distributed\.all_gather, called from mica_ds\." if waits else phase.survivor_in
    return resumed_from in phase.resumed_from and re.search(expected, survivor_in) is not None


def show(outcomes: list[Outcome], console: Console) -> None:
    """Print the table of moments."""
    columns = ["", "phase", "s after", "signal", "rank", "ended in s", "codes", "the other was in", "left behind"]
    table = Table(*columns, "resumed from step")
    table.add_column("Δ loss")
    table.add_column("Δ adapter")
    table.add_column("outcome", overflow="fold")
    for number, outcome in enumerate(outcomes, start=1):
        moment = outcome.moment
        table.add_row(
            str(number),
            moment.phase,
            f"{moment.delay:.3f}",
            moment.signal.name,
            " ".join(map(str, moment.ranks)),
            f"{outcome.seconds:.1f}",
            " ".join(map(str, outcome.codes)),
            outcome.survivor_in,
            " ".join(outcome.left),
            ", ".join(map(str, outcome.resumed_from)),
            f"{outcome.loss_difference:.1g}",
            f"{outcome.adapter_difference:.1g}",
            "; ".join(outcome.faults) or "as promised",
        )
    console.print(table)


def main() -> None:
    """The command; exits with 1 where a moment did not come out as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept afterwards; else one for the time being")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        campaign = Campaign(folder.absolute(), SMOLLM2)
        outcomes: list[Outcome] = []
        for number, moment in enumerate([*plan_moments(arguments.moments, arguments.seed), *OTHER_SIGNALS]):
            outcomes.append(campaign.try_moment(moment, f"moment-{number + 1}"))
            verdict = "; ".join(outcomes[-1].faults) or "as promised"
            console.print(f"{number + 1}. {moment.phase}, {moment.signal.name} to {moment.ranks}: {verdict}")
            if arguments.out:  # after each, so that nothing is lost
                rows = [dataclasses.asdict(outcome) for outcome in outcomes]
                arguments.out.write_text(json.dumps(rows, indent=1))
    show(outcomes, console)
    os._exit(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    main()
