"""What must hold after a random fault: the failure report, what is left behind, the attempt after it."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launch.checkpoint.directory import checkpoints_dir
from launch.equivalence.compare_metrics import (
    describe_unpaired,
    describe_wrong_steps,
    pair_numbers,
    same_weights,
    training_steps,
)
from launch.equivalence.observed_run import is_saving, last_saved_step, read_metrics, resumed_from
from launch.equivalence.subprocesses import ProcessResult, RankLayout

STEPS = 30
"""of each run"""
PROCESS_MARK = "RANKZERO_CHAOS"
"""by this variable a run's processes are found, whoever their parent is"""
LEFT_BY_OTHERS = ("torchelastic_", "torchinductor_", "pymp-")
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


# what must be reported --------------------------------------------------------------------------------------

Check = Callable[[Fault, Path, int, list[str], set[int]], Iterator[str]]


def check_failed(
    fault: Fault,
    run_dir: Path,
    code: int,
    messages: list[str],
    codes: set[int],
) -> Iterator[str]:
    """One report, of the right kind and on the right rank, with exit code 1."""
    report: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        report = json.loads((run_dir / "failure.json").read_text())
    kind, pattern = EXPECTED_REPORTS[fault.kind]
    if code == 0:
        yield "torchrun has ended with 0"
    if len(messages) != 1:
        yield f"{len(messages)} reports: {messages}"
    if report.get("kind") != kind:
        yield f"failure.json says {report.get('kind')}, not {kind}: {report.get('message')}"
    elif not re.search(pattern.format(rank=fault.rank, step=fault.step), describe_report(report)):
        yield f"the report does not name rank {fault.rank} in step {fault.step}: {describe_report(report)}"
    expected = {-signal.SIGKILL, 1} if kind == "lost" else {1}
    if not codes <= expected:
        yield f"exit codes of the ranks: {sorted(codes)}"


def describe_report(report: Mapping[str, Any]) -> str:
    """What a report says of ranks, as one text."""
    if report["kind"] == "exception":
        return f"rank {report['rank']} step {report['step']} {report['error']}: {report['message']}"
    return "; ".join([f"lost {report.get('lost')}", report["message"], *report.get("ranks", ())])


def check_finished(
    fault: Fault,  # noqa: ARG001
    run_dir: Path,
    code: int,
    messages: list[str],
    codes: set[int],  # noqa: ARG001
) -> Iterator[str]:
    """The run has come to its end."""
    if code or messages or (run_dir / "failure.json").exists():
        yield f"exit code {code}, {messages}"


def check_stopped(
    fault: Fault,
    run_dir: Path,
    code: int,
    messages: list[str],
    codes: set[int],
) -> Iterator[str]:
    """The run has stopped and is saved, soon after the fault; one that was in its last steps has finished.

    torchrun sends SIGTERM to the others as soon as one rank has ended, and may meet an interpreter that no
    longer listens.
    """
    if fault.step >= STEPS - 1 and not code and not messages:
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
        or len(messages) != 1
        or "stopped (" not in messages[0]
        or not codes <= {75, -signal.SIGTERM}
        or (run_dir / "failure.json").exists()
    ):
        yield f"exit code {code}, of the ranks {sorted(codes)}, {messages}"


CHECKS: dict[str, Check] = {"slow": check_finished, "sigterm": check_stopped}
"""of the kinds that are no failure"""
LOST = r"lost \[{rank}\].*rank {rank} on \S+, last seen in step \d+, .*ended without a word"
EXPECTED_REPORTS = {
    "kill": ("lost", LOST),
    "torn_checkpoint": ("lost", LOST),
    "stall": ("hang", r"rank {rank}: step {step}, forward, .* in stall"),
    "nan": ("words", r"the loss is nan at step {step}: micro-batch 0 of rank {rank}, first in module "),
    "oom": ("exception", r"rank {rank} step {step} RuntimeError: .*can't allocate memory"),
}
"""the kind of report for a kind of fault, and what it says"""


# what is left -----------------------------------------------------------------------------------------------


def remains(run_dir: Path) -> Iterator[str]:
    """Processes of the run and its temporary files, in words."""
    time.sleep(0.5)  # a data worker looks for its parent now and then
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if (
                process.environ().get(PROCESS_MARK) == str(run_dir)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                yield f"process {process.pid} ({' '.join(process.cmdline()[-3:])})"
    files = run_dir.with_name(f"{run_dir.name}.tmp").iterdir()
    yield from (str(path) for path in files if not path.name.startswith(LEFT_BY_OTHERS))


def shared_memory() -> set[str]:
    """What lies in /dev/shm of processes that are no more; others use it too, while they live."""
    alive = {str(number) for number in psutil.pids()}
    return {
        str(path) for path in Path("/dev/shm").iterdir() if alive.isdisjoint(re.findall(r"\d+", path.name))
    }


def check_next_attempt(
    fault: Fault, run_dir: Path, reference: Path, ended: ProcessResult, saved: int, checkpoints: int
) -> Iterator[str]:
    """What is wrong with the attempt after the fault. Before it step `saved` was saved last, in so many
    `checkpoints`.
    """
    if (
        fault.kind == "torn_checkpoint"
        and checkpoints == 1
        and "no intact checkpoint is left" in " ".join(ended.error_lines())
    ):
        return  # the only one was torn, and nothing is begun anew in silence
    if ended.reason == "killed" or ended.exit_code:
        yield f"the next attempt: {ended.problem or 'hangs'}: {ended.error_lines(8)}"
        return
    found, torn = resumed_from(run_dir, ended), fault.kind == "torn_checkpoint" and saved > 0
    names = [path.name for path in checkpoints_dir(run_dir).iterdir()]
    # a save that was in flight may have ended after the torn one: then it is the newest, and complete
    if saved < STEPS and (found != saved if not torn else found > saved):
        yield f"the next attempt goes on from step {found}, saved was {saved}"
    if torn and found < saved and not list(checkpoints_dir(run_dir).glob("*.damaged")):
        yield f"no checkpoint was set aside as damaged: {names}"
    if is_saving(run_dir):
        yield f"a partial checkpoint is left: {names}"
    expected, made = read_metrics(reference), read_metrics(run_dir)
    yield from filter(
        None,
        [
            describe_wrong_steps(training_steps(expected), training_steps(made)),
            describe_unpaired(expected, made),
        ],
    )
    yield from [str(number) for number in pair_numbers(expected, made) if number.deviation > 0][:3]
    if not same_weights(reference, run_dir):
        yield "the final weights are not the same bytes"
    yield from (f"{name} is left after the next attempt" for name in remains(run_dir))
