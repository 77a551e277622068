"""Random faults (`chaos=`), one a run: does each run end, in time, and name the right rank?

    OMP_NUM_THREADS=1 python tests/benchmarks/random_faults.py runs=100 ranks=2 seed=0 parallel=1 first=1 strategies=fsdp kinds=kill

Kind, rank, step and strategy of run N follow from `seed` and N: `first=N runs=1` repeats it, `folder=PATH`
keeps what it leaves. After the fault: nothing of the run lives, and nothing of it is in /dev/shm or in the
folder for temporary files. Then the same command once more: it ends in order, goes on from the newest
checkpoint that is whole, leaves no half of a checkpoint, and its losses, gradient norms and final weights are
equal, bit by bit, to those of a run without a fault. Exit code 1 if anything is not.
"""

from __future__ import annotations

import json
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

import psutil

from launch.checkpoint.directory import checkpoints_dir, list_checkpoints
from launch.cli.faults import FAULT_KINDS
from launch.cli.keys import read_argv
from launch.equivalence.compare_metrics import (
    describe_unpaired,
    describe_wrong_steps,
    pair_numbers,
    same_weights,
    training_steps,
)
from launch.equivalence.observed_run import is_saving, last_saved_step, read_metrics, resumed_from
from launch.equivalence.subprocesses import ProcessResult, RankLayout, run_process, subprocess_environment

STEPS, EVERY, HANG = 30, 4, 8
RECIPE = Path(__file__).parents[1] / "launch" / "tiny.py"
WORDS = (
    *(f"recipe={RECIPE}:Broken", f"steps={STEPS}", "batch_size=16", "micro_batch_size=4"),
    *(
        "held_out=20",
        "eval.every=7",
        "workers=1",
        f"checkpoint.every={EVERY}",
        "log.every=1",
        f"hang_timeout={HANG}",
    ),
    "pause=0.05",  # in shorter steps the ranks ask each other less often, and stop some steps later
)
START = 120.0
"""seconds until a run has started, on a machine that does other things too"""
WITHIN = HANG + 15.0
"""seconds from the fault to the end"""
MARK = "RANKZERO_CHAOS"
"""by this variable a run's processes are found, whoever their parent is"""
OVER = Event()
"""set when this program is to end, by Ctrl-C"""
NOT_OURS = ("torchelastic_", "torchinductor_", "pymp-")
"""temporary folders that torchrun leaves behind each time, torch for the next time, and Python in a process
that is killed
"""


@dataclass(frozen=True)
class Fault:
    """What happens in one run."""

    number: int
    kind: str
    rank: int
    step: int
    layout: RankLayout

    @property
    def chaos(self) -> str:
        """As the command line says it."""
        return f"{self.kind}:rank={self.rank},step={self.step}"


@dataclass
class Outcome:
    """What came of it."""

    fault: Fault
    seconds: float = 0.0
    """from the fault to the end of the command"""
    said: str = ""
    """the first line of the verdict"""
    problems: list[str] = field(default_factory=list)


def main(words: list[str]) -> int:
    """The table; returns the exit code."""
    given = {
        "runs": "100",
        "ranks": "2",
        "seed": "0",
        "parallel": "1",
        "first": "1",
        "strategies": "ddp,fsdp",
    }
    line = {**given, "kinds": ",".join(FAULT_KINDS), **read_argv(words)}
    ranks, first = int(line["ranks"]), int(line["first"])
    strategies, kinds = line["strategies"].split(","), line["kinds"].split(",")
    start = time.monotonic()
    with (
        nullcontext(line["folder"])
        if "folder" in line
        else tempfile.TemporaryDirectory(prefix="chaos-") as name
    ):
        folder = Path(name).resolve()
        whole = {strategy: folder / f"whole-{strategy}" for strategy in strategies}
        for strategy, run_dir in whole.items():
            if trouble := life(run_dir, RankLayout(strategy, ranks)).problem:
                print(f"{strategy} without a fault: {trouble}")
                return 1
        faults = [
            drawn(number, random.Random(f"{line['seed']} {number}"), kinds, strategies, ranks)
            for number in range(first, first + int(line["runs"]))
        ]
        print(" run  strategy  fault                            seconds  said", flush=True)
        outcomes = []
        threads = ThreadPoolExecutor(int(line["parallel"]))
        try:
            for outcome in threads.map(
                lambda fault: tried(fault, folder, whole[fault.layout.strategy]), faults
            ):
                outcomes.append(outcome)
                print(
                    row(outcome),
                    *(f"     WRONG: {problem}" for problem in outcome.problems),
                    sep="\n",
                    flush=True,
                )
        finally:
            OVER.set()
            threads.shutdown(cancel_futures=True)
    for kind in kinds:
        if times := [outcome.seconds for outcome in outcomes if outcome.fault.kind == kind]:
            print(
                f"{kind:<16}{len(times):>4} runs, from fault to end {median(times):.1f} s, at most "
                f"{max(times):.1f} s"
            )
    wrong = [outcome for outcome in outcomes if outcome.problems]
    print(f"{len(outcomes)} runs in {time.monotonic() - start:.0f} s, {len(wrong)} of them wrong")
    return int(bool(wrong))


def row(outcome: Outcome) -> str:
    """A line of the table."""
    fault = outcome.fault
    return (
        f"{fault.number:>4}  {fault.layout.strategy:<8}  {fault.chaos:<30}{outcome.seconds:>10.1f}  "
        f"{outcome.said[:120]}"
    )


def drawn(number: int, draw: random.Random, kinds: list[str], strategies: list[str], ranks: int) -> Fault:
    """The fault of run `number`."""
    layout = RankLayout(draw.choice(strategies), ranks)
    return Fault(number, draw.choice(kinds), draw.randrange(ranks), draw.randint(1, STEPS), layout)


def life(
    run_dir: Path, layout: RankLayout, *words: str, kill_when: Callable[[], bool] = lambda: False
) -> ProcessResult:
    """A life of a run, whose processes can be told from all others, and have a folder of their own for
    temporary files.
    """
    temporary = run_dir.with_name(f"{run_dir.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    places = {**subprocess_environment(layout.ranks), MARK: str(run_dir), "TMPDIR": str(temporary)}
    return run_process([*WORDS, *words], layout, run_dir=run_dir, environment=places, kill_when=kill_when)


def tried(fault: Fault, folder: Path, whole: Path) -> Outcome:
    """A run that the fault meets, and its next life."""
    run_dir, outcome = folder / f"run-{fault.number}", Outcome(fault)
    before, began = shared_memory(), time.time()
    ended = life(run_dir, fault.layout, f"chaos={fault.chaos}", kill_when=partial(hangs, run_dir, began))
    outcome.seconds = ended.started + ended.seconds - struck_at(run_dir, fault, began)
    left = [*remains(run_dir), *sorted(shared_memory() - before)]
    text = ended.log.read_text(errors="replace")
    told = [line for line in text.splitlines() if line.startswith("rankzero: ")]
    outcome.said = " | ".join(told)
    outcome.problems += (
        [f"hangs, so it was killed: {ended.error_lines(8)}"] if ended.reason == "killed" else []
    )
    outcome.problems += JUDGES.get(fault.kind, failed)(fault, run_dir, ended.exit_code, told, codes_of(text))
    if outcome.seconds > WITHIN + (2 * STEPS if fault.kind == "slow" else 0):
        outcome.problems.append(f"{outcome.seconds:.0f} s from the fault to the end")
    outcome.problems += next_life(fault, run_dir, whole)
    # what another program of this machine had made and removed is no remainder of ours
    outcome.problems += [
        f"{name} is left" for name in left if not name.startswith("/dev/shm") or Path(name).exists()
    ]
    return outcome


def hangs(run_dir: Path, began: float) -> bool:
    """Whether a run will not end: no start, or no end long after its last line. When we are to end, none is
    waited for.
    """
    if OVER.is_set():
        return True
    last = max((float(line["time"]) for line in read_metrics(run_dir)[-3:] if "time" in line), default=0.0)
    return time.time() > max(began + START, last + 60)


def struck_at(run_dir: Path, fault: Fault, began: float) -> float:
    """When it struck: about when the step before it was written, or for a first step the configuration."""
    times = {line["step"]: float(line["time"]) for line in read_metrics(run_dir) if "time" in line}
    with suppress(FileNotFoundError):
        began = (run_dir / "config.yaml").stat().st_mtime
    return times.get(fault.step - 1, began)


def codes_of(text: str) -> set[int]:
    """How the workers ended, by torchrun's report: of those that ended before it ended them."""
    return {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", text)}


# what must be said ------------------------------------------------------------------------------------------

Judge = Callable[[Fault, Path, int, list[str], set[int]], Iterator[str]]


def failed(fault: Fault, run_dir: Path, code: int, told: list[str], codes: set[int]) -> Iterator[str]:
    """One verdict, of the right kind and on the right rank, with exit code 1."""
    verdict: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        verdict = json.loads((run_dir / "failure.json").read_text())
    kind, words = VERDICTS[fault.kind]
    if code == 0:
        yield "torchrun has ended with 0"
    if len(told) != 1:
        yield f"{len(told)} verdicts: {told}"
    if verdict.get("kind") != kind:
        yield f"failure.json says {verdict.get('kind')}, not {kind}: {verdict.get('message')}"
    elif not re.search(words.format(rank=fault.rank, step=fault.step), list_named(verdict)):
        yield f"the verdict does not name rank {fault.rank} in step {fault.step}: {list_named(verdict)}"
    expected = {-signal.SIGKILL, 1} if kind == "lost" else {1}
    if not codes <= expected:
        yield f"exit codes of the ranks: {sorted(codes)}"


def list_named(verdict: Mapping[str, Any]) -> str:
    """What a verdict says of ranks, as one text."""
    if verdict["kind"] == "exception":
        return f"rank {verdict['rank']} step {verdict['step']} {verdict['error']}: {verdict['message']}"
    return "; ".join([f"lost {verdict.get('lost')}", verdict["message"], *verdict.get("ranks", ())])


def endured(fault: Fault, run_dir: Path, code: int, told: list[str], codes: set[int]) -> Iterator[str]:  # noqa: ARG001
    """The run has come to its end."""
    if code or told or (run_dir / "failure.json").exists():
        yield f"exit code {code}, {told}"


def stopped(fault: Fault, run_dir: Path, code: int, told: list[str], codes: set[int]) -> Iterator[str]:
    """The run has stopped and is saved, soon after the fault; one that was in its last steps has come to its
    end.

    torchrun sends SIGTERM to the others as soon as one rank has ended, and may meet an interpreter that no
    longer listens.
    """
    if fault.step >= STEPS - 1 and not code and not told:
        return
    note = (
        json.loads((run_dir / "stopped.json").read_text())
        if (run_dir / "stopped.json").exists()
        else {"step": 0}
    )
    if not fault.step <= note["step"] == last_saved_step(run_dir) <= fault.step + 2:
        yield f"struck in step {fault.step}, stopped: {note}, saved: step {last_saved_step(run_dir)}"
    if (
        code == 0
        or len(told) != 1
        or "stopped (" not in told[0]
        or not codes <= {75, -signal.SIGTERM}
        or (run_dir / "failure.json").exists()
    ):
        yield f"exit code {code}, of the ranks {sorted(codes)}, {told}"


JUDGES: dict[str, Judge] = {"slow": endured, "sigterm": stopped}
"""of the kinds that are no failure"""
LOST = r"lost \[{rank}\].*rank {rank} on \S+, last seen in step \d+, .*ended without a word"
VERDICTS = {
    "kill": ("lost", LOST),
    "torn_checkpoint": ("lost", LOST),
    "stall": ("hang", r"rank {rank}: step {step}, forward, .* in stall"),
    "nan": ("words", r"the loss is nan at step {step}: micro-batch 0 of rank {rank}, first in module "),
    "oom": ("exception", r"rank {rank} step {step} RuntimeError: .*can't allocate memory"),
}
"""the kind of verdict for a kind of fault, and what it says"""


# what is left -----------------------------------------------------------------------------------------------


def remains(run_dir: Path) -> Iterator[str]:
    """Processes of the run and its temporary files, in words."""
    time.sleep(0.5)  # a data worker looks for its parent now and then
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(run_dir) and process.status() != psutil.STATUS_ZOMBIE:
                yield f"process {process.pid} ({' '.join(process.cmdline()[-3:])})"
    files = run_dir.with_name(f"{run_dir.name}.tmp").iterdir()
    yield from (str(path) for path in files if not path.name.startswith(NOT_OURS))


def shared_memory() -> set[str]:
    """What lies in /dev/shm of processes that are no more; others use it too, while they live."""
    alive = {str(number) for number in psutil.pids()}
    return {
        str(path) for path in Path("/dev/shm").iterdir() if alive.isdisjoint(re.findall(r"\d+", path.name))
    }


def next_life(fault: Fault, run_dir: Path, whole: Path) -> Iterator[str]:
    """What is wrong with the life after, in words."""
    before, saved = last_saved_step(run_dir), len(list_checkpoints(run_dir))
    ended = life(run_dir, fault.layout, kill_when=partial(hangs, run_dir, time.time()))
    if (
        fault.kind == "torn_checkpoint"
        and saved == 1
        and "no intact checkpoint is left" in " ".join(ended.error_lines())
    ):
        return  # the only one was torn, and nothing is begun anew in redirect_output
    if ended.reason == "killed" or ended.exit_code:
        yield f"the next life: {ended.problem or 'hangs'}: {ended.error_lines(8)}"
        return
    found, torn = resumed_from(run_dir, ended), fault.kind == "torn_checkpoint" and before > 0
    # a save that was in flight may have come to its end after the torn one: then that is the newest, and
    # whole
    if before < STEPS and (found != before if not torn else found > before):
        yield f"the next life goes on from step {found}, saved was {before}"
    if torn and found < before and not list(checkpoints_dir(run_dir).glob("*.damaged")):
        yield (
            "no checkpoint was set aside as damaged: "
            f"{[path.name for path in checkpoints_dir(run_dir).iterdir()]}"
        )
    if is_saving(run_dir):
        yield f"half a checkpoint is left: {[path.name for path in checkpoints_dir(run_dir).iterdir()]}"
    expected, made = read_metrics(whole), read_metrics(run_dir)
    yield from filter(
        None,
        [
            describe_wrong_steps(training_steps(expected), training_steps(made)),
            describe_unpaired(expected, made),
        ],
    )
    yield from [str(number) for number in pair_numbers(expected, made) if number.deviation > 0][:3]
    if not same_weights(whole, run_dir):
        yield "the final weights are not the same bytes"
    yield from (f"{name} is left after the next life" for name in remains(run_dir))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `run_process` then leaves no process behind
    sys.exit(main(sys.argv[1:]))
