"""Preemption: all ranks stop at the same step, saved, with exit code 75; the next attempt resumes as if
nothing
had happened.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from launch.checkpoint.directory import list_checkpoints, step_of
from launch.checkpoint.resume import resume
from launch.training.loop import finish, train
from launch.watchdog import stop as stops
from launch.watchdog.stop import StopRequest
from tests.launch.processes import (
    COMMAND_TIMEOUT_S,
    PATIENCE,
    TINY,
    CommandResult,
    descendants,
    run_command,
    start_command,
    wait_for_command,
)
from tests.launch.runs import loop_parts, make_run, metric_values, read_metrics, uninterrupted_losses
from tests.ranks import CpuWorld, run_ranks

ARGS = ("batch_size=16", "micro_batch_size=4", "steps=12", "held_out=20", "eval.every=5", "optimizer=sgd")


class StopAfter(StopRequest):
    """Requests a stop from its Nth call on; a signal comes at any moment."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def requested(self, by_clock: bool) -> bool:
        del by_clock
        self.left -= 1
        if self.left <= 0:
            self.reason = "a test"
        return bool(self.reason)


def attempt(world: CpuWorld, folder: Path, asked: int, who: int) -> tuple[str, int, bool]:
    """An attempt in which rank `who` requests a stop in call `asked`: why and when it ended, and whether an
    evaluation is still to be made.
    """
    run = make_run(world, "Fit", *ARGS)
    resume(run, folder)
    folder.mkdir(exist_ok=True)
    parts = loop_parts(run, folder, None, StopAfter(asked) if world.rank == who else StopRequest())
    parts.requests.consensus.period = 0.0  # the ranks ask each other after each step, however short it is
    train(run, *parts)
    finish(run, *parts)
    return parts.requests.stop_reason, run.progress.step, run.progress.unevaluated


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nobody stopped."""
    folder = tmp_path_factory.mktemp("attempts") / "whole"
    run_ranks(2, attempt, folder, 10**9, 0)
    return folder


@pytest.mark.parametrize(
    "asked", [2, pytest.param(5, marks=pytest.mark.slow), 6, pytest.param(7, marks=pytest.mark.slow), 8]
)
def test_all_ranks_stop_at_the_same_step_and_go_on(tmp_path: Path, whole: Path, asked: int) -> None:
    """Between steps, and in the evaluation after step 5, which is then made in the next attempt."""
    never = 10**9
    first = run_ranks(2, attempt, tmp_path / "run", asked, 1)
    assert len({(step, owed) for _, step, owed in first}) == 1
    assert [why for why, *_ in first] == ["a signal to another rank", "a test"]
    _, step, owed = first[0]
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run")][-1] == step < 12
    assert owed == (asked in (5, 6)), "the request arrives one call later, in the evaluation"
    assert [why for why, *_ in run_ranks(2, attempt, tmp_path / "run", never, 0)] == ["", ""]
    for name in ("loss", "grad_norm", "eval/loss"):
        assert metric_values(tmp_path / "run", name) == metric_values(whole, name), name


def test_an_evaluation_that_is_cut_off_twice_is_made_in_the_third_attempt(tmp_path: Path) -> None:
    run_ranks(1, attempt, tmp_path / "whole", 10**9, 0)
    assert run_ranks(1, attempt, tmp_path / "run", 6, 0) == [("a test", 5, True)]
    assert run_ranks(1, attempt, tmp_path / "run", 2, 0) == [("a test", 5, True)], "no step is made before it"
    assert run_ranks(1, attempt, tmp_path / "run", 10**9, 0) == [("", 12, False)]
    for name in ("loss", "eval/loss"):
        assert metric_values(tmp_path / "run", name) == metric_values(tmp_path / "whole", name), name


def early(world: CpuWorld, folder: Path, asked: int) -> tuple[int, list[str]]:
    """An attempt of a run that no evaluation finds better than the first: it stops early after step 10."""
    run = make_run(world, "Fit", *ARGS, "lr=1e-12", "eval.patience=1", "batchnorm=false", "checkpoint.keep=9")
    resume(run, folder)
    folder.mkdir(exist_ok=True)
    parts = loop_parts(run, folder, None, StopAfter(asked))
    train(run, *parts)
    finish(run, *parts)
    return run.progress.step, [path.name for path in list_checkpoints(folder)]


def test_a_run_that_has_stopped_early_makes_no_further_step(tmp_path: Path) -> None:
    whole, saved = run_ranks(1, early, tmp_path / "run", 10**9)[0]
    assert whole == 10
    assert run_ranks(1, early, tmp_path / "run", 10**9)[0] == (whole, saved)
    # step 5 asks 6 times with its evaluation, so that of step 10 is asked for the 17th time
    assert run_ranks(1, early, tmp_path / "cut", 17)[0][0] == 10
    assert run_ranks(1, early, tmp_path / "cut", 10**9)[0][0] == 10


def test_the_nearer_of_two_limits_counts() -> None:
    began = psutil.Process().create_time()
    assert stops.deadline(None, {}) is None
    assert stops.deadline(None, {"SLURM_JOB_END_TIME": "1900000000"}) == 1_900_000_000
    assert stops.deadline("1", {"SLURM_JOB_END_TIME": "1900000000"}) == began + 60


def test_the_margin_before_the_limit_follows_what_a_save_takes() -> None:
    request = StopRequest(deadline=time.time() + 100)
    request.update_margin(step_s=1.0, save_s=20.0)
    assert not request.requested(by_clock=True)
    request.update_margin(step_s=1.0, save_s=50.0)
    assert not request.requested(by_clock=False), "the clock is that of rank zero"
    assert request.requested(by_clock=True)
    assert request.reason == "its time is up"


# real signals -----------------------------------------------------------------------------------------------

STEPS = 200
"""a run of ten seconds: a signal that a busy machine sends late still meets it"""
BUSY = (
    f"recipe={TINY}:Broken",
    "pause=0.05",
    "run_dir=run",
    "batch_size=10",
    f"steps={STEPS}",
    "log.every=1",
    "workers=1",
)


def busy(cwd: Path, *args: str, ranks: int = 0) -> subprocess.Popen[str]:
    """A run of ten seconds and more, after its first steps."""
    process = start_command(*BUSY, *args, cwd=cwd, ranks=ranks)
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not (cwd / "run" / "metrics.jsonl").exists() or len(read_metrics(cwd / "run")) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def stopped(cwd: Path, ended: CommandResult, reason: str) -> int:
    """The step at which a run has stopped; checks what it left behind."""
    note = json.loads((cwd / "run" / "stopped.json").read_text())
    assert note["reason"] == reason
    assert step_of(list_checkpoints(cwd / "run")[-1]) == note["step"] < STEPS
    assert f"stopped ({reason}); step {note['step']} is saved" in ended.stderr
    assert not descendants(cwd), "no data worker outlives the run"
    assert not [path for path in (cwd / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
    return int(note["step"])


def stop_by_signal(cwd: Path, name: str) -> int:
    """The step at which a run has stopped after the signal of that name."""
    process = busy(cwd)
    os.kill(process.pid, signal.Signals[name])
    ended = wait_for_command(process)
    assert ended.returncode == 75, ended.stderr
    return stopped(cwd, ended, name)


def test_a_signal_stops_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    step = stop_by_signal(tmp_path, "SIGTERM")
    again = run_command(*BUSY, "pause=0", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"at step {step}" in again.stdout
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert metric_values(tmp_path / "run") == uninterrupted_losses(tmp_path / "whole", *BUSY, "pause=0")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1", "SIGUSR2"])
def test_other_signals_stop_and_save_too(tmp_path: Path, name: str) -> None:
    stop_by_signal(tmp_path, name)


@pytest.mark.slow
def test_torchrun_hands_a_signal_on_to_all_ranks(tmp_path: Path) -> None:
    process = busy(tmp_path, ranks=2)
    os.kill(process.pid, signal.SIGTERM)
    ended = wait_for_command(process)
    assert ended.returncode != 0, "torchrun's own"
    stopped(tmp_path, ended, "SIGTERM")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(tmp_path: Path) -> None:
    process = busy(tmp_path, ranks=2)
    next(worker for worker in descendants(tmp_path) if worker.environ().get("RANK") == "1").send_signal(
        signal.SIGUSR1
    )
    ended = wait_for_command(process)
    stopped(tmp_path, ended, "a signal to another rank")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    process = busy(tmp_path, "pause=2")
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    pressed = time.monotonic()
    ended = wait_for_command(process)
    assert (ended.returncode, "Ctrl-C again" in ended.stderr) == (130, True), ended.stderr
    assert time.monotonic() - pressed < PATIENCE * 1.5
    assert not descendants(tmp_path)


@pytest.mark.slow
def test_the_clock_stops_it_in_time(tmp_path: Path) -> None:
    """Before it knows what a save takes: so at once."""
    since = time.time()
    ended = run_command(*BUSY, "steps=99999", "max_time=0:35", "checkpoint.every=99999", cwd=tmp_path)
    ended_after = time.time() - since
    assert ended.returncode == 75, ended.stderr
    note = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert ended_after < 35 or note["step"] <= 2, "in time, or at once where the start took longer than that"
    assert note["reason"] == "its time is up"


def test_a_data_worker_does_not_inherit_the_patience() -> None:
    """Forked off with our handlers, it must still end when it is asked to."""
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in stops.PREEMPTION_SIGNALS}
    request.listen(*stops.PREEMPTION_SIGNALS)
    try:
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writes, b"ready")
            time.sleep(COMMAND_TIMEOUT_S)
            os._exit(0)
        assert os.read(reads, 5) == b"ready", "its handlers are those that it will keep"
        psutil.Process(child).terminate()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not request.reason
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
