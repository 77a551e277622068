"""One run, killed with SIGKILL again and again at random times, many of them during a save, and resumed until
it is done.

    OMP_NUM_THREADS=1 python tests/benchmarks/random_kills.py kills=30 ranks=2 strategy=fsdp seed=0

After each kill: every checkpoint that was committed is still there, or was removed because newer ones had
replaced it; the newest verifies; the next life starts from it. At the end: every loss, gradient norm and
learning rate, and the final weights, are equal bit by bit to those of a run that nobody killed. Exit code 1
if anything is not.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.checkpoint.directory import list_checkpoints, step_of
from launch.checkpoint.manifest import DamagedCheckpoint
from launch.checkpoint.reader import Checkpoint
from launch.cli.command import read_command
from launch.equivalence.compare_metrics import (
    describe_unpaired,
    describe_wrong_steps,
    pair_numbers,
    same_weights,
    training_steps,
)
from launch.equivalence.observed_run import (
    is_saving,
    last_logged_step,
    last_saved_step,
    read_metrics,
    resumed_from,
    step_seconds,
)
from launch.equivalence.subprocesses import ProcessResult, RankLayout, run_process, subprocess_environment

EVERY, KEEP = 3, 2
WORDS = (
    *(
        "recipe=gpt",
        "model.layers=2",
        "model.width=384",
        "data.block=32",
        "data.val=0.002",
        "data.test=0",
        "batch_size=8",
        "micro_batch_size=4",
        "workers=0",
    ),
    *(f"checkpoint.every={EVERY}", f"checkpoint.keep={KEEP}", "checkpoint.every_minutes=null", "log.every=1"),
)
"""4 million parameters, 44 MB with what AdamW keeps of them: a save takes as long as a few steps"""
STEPS_A_KILL = 8
"""length of the run: more than a life makes on average that is killed in it"""
START = 12.0
"""seconds: a kill by the clock comes at any time up to here, which is mostly before the first step"""


@dataclass(kw_only=True)
class Options:
    """The options of this benchmark."""

    kills: int = 30
    """how often the run is killed"""
    ranks: int = 2
    """processes of the run"""
    strategy: str = "fsdp"
    """strategy of the run"""
    seed: int = 0
    """of the moments at which it is killed"""


def main(argv: list[str]) -> int:
    """Print the table; returns the exit code."""
    options = read_command(argv, __doc__, Options, name="random_kills.py").options
    kills, layout, draw = (
        options.kills,
        RankLayout(options.strategy, options.ranks),
        random.Random(options.seed),
    )
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        asked = [*WORDS, f"eval.every={kills * STEPS_A_KILL}", f"steps={kills * STEPS_A_KILL}"]
        one_life = partial(run_process, asked, layout, environment=subprocess_environment(layout.ranks))
        problems = (
            [f"the run that nobody killed: {ended.problem}"]
            if (ended := one_life(run_dir=whole)).problem
            else []
        )
        print(
            f"{layout}, {kills * STEPS_A_KILL} steps, a checkpoint every {EVERY}; "
            f"without kills: {ended.seconds:.0f} s"
        )
        print("kill  started from  at step  in a save  newest whole  steps lost  seconds", flush=True)
        saves = lost = done = 0
        while not problems and done < kills:
            before, seen = last_saved_step(killed), set[int]()
            moment = partial(watched, killed, seen, aim(killed, draw, before))
            ended = one_life(run_dir=killed, kill_when=moment)
            if ended.reason != "killed":
                problems.append(
                    f"kill {done + 1} came too late: the run had ended ({ended.problem or 'in order'})"
                )
                problems += ended.error_lines() if ended.problem else []
                break
            done += 1
            problems = wrong_after(killed, ended, before, seen)
            saved, made = last_saved_step(killed), made_steps(killed, ended.started)
            step, saving = (last_logged_step(killed), is_saving(killed)) if made else (before, False)
            saves, lost = saves + saving, lost + step - saved
            numbers = (
                f"{done:>4}{before:>14}{step:>9}{'yes' if saving else '':>11}{saved:>14}{step - saved:>12}"
            )
            print(f"{numbers}{ended.seconds:>9.1f}", flush=True)
        if not problems:
            before = last_saved_step(killed)
            ended = one_life(run_dir=killed)
            problems = (
                [ended.problem, *ended.error_lines()] if ended.problem else wrong_start(killed, ended, before)
            )
            problems += [] if problems else differences(whole, killed)
    print(*problems, sep="\n")
    verdict = "anything but equal" if problems else "all losses, norms, scores and final weights bit-equal"
    print(
        f"{done} kills, {saves} of them during a save, {lost} steps made again, "
        f"{time.monotonic() - start:.0f} s: {verdict}"
    )
    return int(bool(problems))


def aim(run_dir: Path, draw: random.Random, before: int) -> Callable[[], bool]:
    """The moment of the next kill: in the first, second or third save of the life, some time after a step, or
    by the clock.
    """
    kind = draw.choices(("save", "step", "clock"), (5, 4, 1))[0]
    step, share = before + draw.randint(1, 3 * EVERY), draw.random()
    began = time.time()
    end = began + draw.uniform(0, START)

    def moment() -> bool:
        if kind == "clock":
            return time.time() > end
        if last_logged_step(run_dir) < step or not made_steps(
            run_dir, began
        ):  # what the life before left says nothing
            return False
        if kind == "save":
            return is_saving(run_dir)
        time.sleep(share * step_seconds(run_dir))
        return True

    return moment


def watched(run_dir: Path, seen: set[int], moment: Callable[[], bool]) -> bool:
    """`moment`, and on the way note which checkpoints there are."""
    seen.update(map(step_of, list_checkpoints(run_dir)))
    return moment()


def wrong_after(run_dir: Path, life: ProcessResult, before: int, seen: set[int]) -> list[str]:
    """What a kill has left that should not be, in words."""
    problems = wrong_start(run_dir, life, before) if made_steps(run_dir, life.started) else []
    there = [step_of(path) for path in list_checkpoints(run_dir)]
    for step in seen - set(there):
        if sum(other > step for other in there) < KEEP:
            problems.append(f"the checkpoint of step {step} was committed and is gone; there are {there}")
    if there:
        try:
            with Checkpoint(list_checkpoints(run_dir)[-1]) as newest:
                newest.verify_sizes()
                newest.verify()
        except DamagedCheckpoint as error:
            problems.append(str(error))
    return problems


def wrong_start(run_dir: Path, life: ProcessResult, before: int) -> list[str]:
    """Whether a life did not start from the newest checkpoint, in words."""
    found = resumed_from(run_dir, life)
    return (
        []
        if found == before
        else [f"started from step {found}, though the checkpoint of step {before} was committed"]
    )


def made_steps(run_dir: Path, began: float) -> bool:
    """Whether a life came to its first step, by which time it has swept up what the one before it left."""
    return any(line.get("time", 0) >= began for line in read_metrics(run_dir)[::-1])


def differences(whole: Path, killed: Path) -> list[str]:
    """What differs between the run that nobody killed and the other, in words."""
    expected, found = read_metrics(whole), read_metrics(killed)
    problems = [
        describe_wrong_steps(training_steps(expected), training_steps(found)),
        describe_unpaired(expected, found),
    ]
    problems += [str(number) for number in pair_numbers(expected, found) if number.deviation > 0][:3]
    problems += [] if same_weights(whole, killed) else ["the final weights are not the same bytes"]
    return [problem for problem in problems if problem]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `run_process` then leaves no process behind
    sys.exit(main(sys.argv[1:]))
