"""Random faults (`chaos=`), one a run: does each run end, in time, and name the right rank?

    OMP_NUM_THREADS=1 python tests/benchmarks/random_faults.py runs=100 ranks=2 strategies=fsdp kinds=kill

Kind, rank, step and strategy of run N follow from `seed` and N: `first=N runs=1` repeats it, `folder=PATH`
keeps what it leaves. After the fault no process of the run is alive, and nothing of it is in /dev/shm or in
the folder for temporary files. Then the same command once more: it ends in order, goes on from the newest
checkpoint that is whole, leaves no partial checkpoint, and its losses, gradient norms and final weights are
equal, bit by bit, to those of a run without a fault. Exit code 1 if anything is not.
"""

from __future__ import annotations

import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from threading import Event

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.checkpoint.directory import list_checkpoints
from launch.cli.command import read_command
from launch.cli.fault_syntax import FAULT_KINDS
from launch.equivalence.observed_run import last_saved_step, read_metrics
from launch.equivalence.subprocesses import ProcessResult, RankLayout, run_process, subprocess_environment
from tests.benchmarks.fault_checks import (
    CHECKS,
    PROCESS_MARK,
    STEPS,
    Fault,
    check_failed,
    check_next_attempt,
    remains,
    shared_memory,
)

EVERY, HANG_S = 4, 8
RECIPE = Path(__file__).parents[1] / "launch" / "tiny.py"
RUN_ARGS = (
    *(f"recipe={RECIPE}:Broken", f"steps={STEPS}", "batch_size=16", "micro_batch_size=4"),
    *(
        "held_out=20",
        "eval.every=7",
        "workers=1",
        f"checkpoint.every={EVERY}",
        "log.every=1",
        f"hang_timeout={HANG_S}",
    ),
    "pause=0.05",  # in shorter steps the ranks ask each other less often, and stop some steps later
)
START_S = 120.0
"""seconds until a run has started, on a machine that does other things too"""
END_S = HANG_S + 15.0
"""seconds from the fault to the end"""
INTERRUPTED = Event()
"""set when this program is to end, by Ctrl-C"""


@dataclass
class Outcome:
    """The result of one run."""

    fault: Fault
    seconds: float = 0.0
    """from the fault to the end of the command"""
    message: str = ""
    """what the run reported"""
    problems: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Options:
    """The options of this benchmark."""

    runs: int = 100
    """runs with a fault"""
    ranks: int = 2
    """processes of each run"""
    seed: int = 0
    """of kind, rank, step and strategy"""
    parallel: int = 1
    """runs at a time"""
    first: int = 1
    """number of the first run: `first=N runs=1` repeats one"""
    strategies: list[str] = field(default_factory=lambda: ["ddp", "fsdp"])
    """strategies to draw from, separated by commas"""
    kinds: list[str] = field(default_factory=lambda: list(FAULT_KINDS))
    """faults to draw from"""
    folder: str | None = None
    """where the runs are kept (default: a temporary folder)"""


def main(argv: list[str]) -> int:
    """Print the table; returns the exit code."""
    options = read_command(argv, __doc__, Options, name="random_faults.py").options
    started_at = time.monotonic()
    folders = nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory(prefix="faults-")
    with folders as name:
        folder = Path(name).resolve()
        references = {strategy: folder / f"reference-{strategy}" for strategy in options.strategies}
        for strategy, run_dir in references.items():
            if trouble := run_attempt(run_dir, RankLayout(strategy, options.ranks)).problem:
                print(f"{strategy} without a fault: {trouble}")
                return 1
        outcomes = run_faults(options, folder, references)
    for kind in options.kinds:
        if times := [outcome.seconds for outcome in outcomes if outcome.fault.kind == kind]:
            summary = f"from fault to end {median(times):.1f} s, at most {max(times):.1f} s"
            print(f"{kind:<16}{len(times):>4} runs, {summary}")
    wrong = [outcome for outcome in outcomes if outcome.problems]
    print(f"{len(outcomes)} runs in {time.monotonic() - started_at:.0f} s, {len(wrong)} of them wrong")
    return int(bool(wrong))


def run_faults(options: Options, folder: Path, references: Mapping[str, Path]) -> list[Outcome]:
    """One run after another, or `parallel` at a time, each with its line of the table."""
    faults = [
        draw_fault(number, random.Random(f"{options.seed} {number}"), options)
        for number in range(options.first, options.first + options.runs)
    ]
    print(" run  strategy  fault                            seconds  message", flush=True)
    outcomes = []
    threads = ThreadPoolExecutor(options.parallel)
    try:
        done = threads.map(lambda fault: try_fault(fault, folder, references[fault.layout.strategy]), faults)
        for outcome in done:
            outcomes.append(outcome)
            wrong = [f"     WRONG: {problem}" for problem in outcome.problems]
            print(row(outcome), *wrong, sep="\n", flush=True)
    finally:
        INTERRUPTED.set()
        threads.shutdown(cancel_futures=True)
    return outcomes


def row(outcome: Outcome) -> str:
    """A line of the table."""
    fault = outcome.fault
    head = f"{fault.number:>4}  {fault.layout.strategy:<8}  {fault.chaos:<30}"
    return f"{head}{outcome.seconds:>10.1f}  {outcome.message[:120]}"


def draw_fault(number: int, draw: random.Random, options: Options) -> Fault:
    """The fault of run `number`."""
    layout = RankLayout(draw.choice(options.strategies), options.ranks)
    kind, rank = draw.choice(options.kinds), draw.randrange(options.ranks)
    return Fault(number, kind, rank, draw.randint(1, STEPS), layout)


def run_attempt(
    run_dir: Path, layout: RankLayout, *args: str, kill_when: Callable[[], bool] = lambda: False
) -> ProcessResult:
    """An attempt of a run: its processes are marked, and have a folder of their own for temporary files."""
    temporary = run_dir.with_name(f"{run_dir.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    variables = {**subprocess_environment(layout.ranks), PROCESS_MARK: str(run_dir), "TMPDIR": str(temporary)}
    return run_process(
        [*RUN_ARGS, *args], layout, run_dir=run_dir, environment=variables, kill_when=kill_when
    )


def try_fault(fault: Fault, folder: Path, reference: Path) -> Outcome:
    """A run that meets the fault, and the attempt after it."""
    run_dir, outcome = folder / f"run-{fault.number}", Outcome(fault)
    before, started_at = shared_memory(), time.time()
    hanging = partial(hangs, run_dir, started_at)
    ended = run_attempt(run_dir, fault.layout, f"chaos={fault.chaos}", kill_when=hanging)
    outcome.seconds = ended.started + ended.seconds - fault_time(run_dir, fault, started_at)
    left = [*remains(run_dir), *sorted(shared_memory() - before)]
    text = ended.log.read_text(errors="replace")
    messages = [line for line in text.splitlines() if line.startswith("rankzero: ")]
    outcome.message = " | ".join(messages)
    outcome.problems += (
        [f"hangs, so it was killed: {ended.error_lines(8)}"] if ended.reason == "killed" else []
    )
    check = CHECKS.get(fault.kind, check_failed)
    outcome.problems += check(fault, run_dir, ended.exit_code, messages, worker_exit_codes(text))
    if outcome.seconds > END_S + (2 * STEPS if fault.kind == "slow" else 0):
        outcome.problems.append(f"{outcome.seconds:.0f} s from the fault to the end")
    saved, checkpoints = last_saved_step(run_dir), len(list_checkpoints(run_dir))
    again = run_attempt(run_dir, fault.layout, kill_when=partial(hangs, run_dir, time.time()))
    outcome.problems += check_next_attempt(fault, run_dir, reference, again, saved, checkpoints)
    # another program of this machine may have made and removed a file of /dev/shm meanwhile
    outcome.problems += [
        f"{name} is left" for name in left if not name.startswith("/dev/shm") or Path(name).exists()
    ]
    return outcome


def hangs(run_dir: Path, started_at: float) -> bool:
    """Whether a run will not end: no start, or no end long after its last line. None is waited for
    once this program is to end.
    """
    if INTERRUPTED.is_set():
        return True
    last = max((float(line["time"]) for line in read_metrics(run_dir)[-3:] if "time" in line), default=0.0)
    return time.time() > max(started_at + START_S, last + 60)


def fault_time(run_dir: Path, fault: Fault, started_at: float) -> float:
    """When it struck: about when the step before it was written, or for a first step the configuration."""
    times = {line["step"]: float(line["time"]) for line in read_metrics(run_dir) if "time" in line}
    with suppress(FileNotFoundError):
        started_at = (run_dir / "config.yaml").stat().st_mtime
    return times.get(fault.step - 1, started_at)


def worker_exit_codes(text: str) -> set[int]:
    """How the workers ended, by torchrun's report: of those that ended before it ended them."""
    return {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", text)}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `run_process` then leaves no process behind
    sys.exit(main(sys.argv[1:]))
