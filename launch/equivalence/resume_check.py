"""Prove on your own recipe and storage that a killed run goes on as if nothing had happened.

    python launch/commands/resume_check.py recipe=gpt
    python launch/commands/resume_check.py recipe=./mine.py run_dir=/scratch/me ranks=2,4 strategies=ddp,fsdp compare=40 all=true

Starts the real command (launch/run.py) again and again, shortened to compare=20 steps. For each of
strategies=single,ddp,fsdp,zero3, on ranks=2 processes (single: one): a run without interruption; the same
run, ended by `kill -9` behind its first half, at a random moment or in the middle of a save; then the same
command once more, which resumes. Losses, gradient norms, learning rates and scores of all steps must be equal
bit by bit, and so must the final weights. Then the checkpoint that the killed run left is read by the next
strategy on another number of ranks: losses and gradient norms must stay within the tolerance of the precision
(fp32: 1e-5). all=true takes every pair of strategies and numbers of ranks, and both kinds of kill for each;
ranks=2,4 also reads on 4.

Proved is what was run: this recipe, these steps, this storage, processes on this machine. Not proved: that
the storage keeps what it has confirmed through a loss of power or on another node, nor that a longer run
meets no state that the first steps lack.

All keys of a run work here too, but for steps, epochs, resume, debug, checkpoint.every and log.every, which
are the check's own. Its runs lie in a new folder in run_dir (default: runs), removed if all passed. Exit
codes: 0 all passed; 1 a row failed; 2 a mistake in the command.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launch.checkpoint.directory import checkpoint_dir
from launch.cli import help
from launch.cli.config import exit_with_mistake, read_line
from launch.cli.resolve import Settings, resolve
from launch.equivalence.common import (
    TOLERANCE,
    choose_strategies,
    environment,
    for_strategy,
    whole_number,
    without,
)
from launch.equivalence.compare_metrics import Row, judge, same_files
from launch.equivalence.subprocesses import (
    Ended,
    Layout,
    is_saving,
    last_step,
    lines_of,
    resumed_at,
    run_process,
    saved_step,
    step_seconds,
)
from launch.runtime.world import World
from strategies import STRATEGIES

DEFAULT = ("single", "ddp", "fsdp", "zero3")
OWN_KEYS = ("ranks", "strategies", "compare", "all")
REPLACED = ("strategy", "steps", "epochs", "checkpoint.every", "checkpoint.every_minutes", "log.every")
"""keys of a run that the check sets itself"""
ATTEMPTS = 3
"""lives that are given to a kill which is meant for a moment that a fast run is through with before it is
seen
"""


@dataclass(frozen=True)
class Own:
    """What can be said to this command alone."""

    ranks: list[int]
    """the first is that of the runs that are killed; the others, and 1, only read"""
    strategies: list[str]
    steps: int
    all: bool

    @property
    def every(self) -> int:
        """Steps between checkpoints: a quarter of the run."""
        return max(self.steps // 4, 1)

    @property
    def half(self) -> int:
        """The step of the checkpoint after which a run is killed."""
        return self.steps // 2 // self.every * self.every


@dataclass(frozen=True)
class Writer:
    """A run that is killed, and who takes up what it left beside itself."""

    layout: Layout
    saving: list[bool]
    """for each time that it is killed, whether that is in the middle of a save"""
    readers: list[Layout]

    @property
    def lives(self) -> int:
        """How many processes, or sets of them, are started."""
        return 1 + 2 * len(self.saving) + len(self.readers)


def main(words: list[str]) -> int:
    """Check; returns the exit code."""
    try:
        if "--help" in words or "-h" in words:
            print(help.page(__doc__ or "", [word for word in words if word not in ("--help", "-h")]))
            return 0
        own, words = own_keys(words)
        settings, words = agree(words, own)
        base = Path(settings.config.run_dir or "runs")
        existed = base.exists()
        folder = new_folder(base)
    except (ValueError, FileNotFoundError) as error:
        exit_with_mistake(error, 0)
    start = time.monotonic()
    try:
        rows = Check(own, words, folder, settings).run()
    except KeyboardInterrupt:
        print(f"\nrankzero: interrupted; what was done is kept in {folder}", file=sys.stderr)
        return 130
    show(rows, settings, time.monotonic() - start)
    if any(row.news for row in rows):
        print(f"the runs and what they said are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    if not existed:
        with suppress(OSError):  # somebody else has put something there meanwhile
            base.rmdir()
    return 0


# what to do -------------------------------------------------------------------------------------------------


def own_keys(words: Sequence[str]) -> tuple[Own, list[str]]:
    """This command's own keys, and the other words. Raises ValueError for what they cannot be."""
    line = read_line(words)
    ranks = [whole_number("ranks", text, "processes", 2) for text in line.get("ranks", "2").split(",")]
    steps = whole_number("compare", line.get("compare", "20"), "steps", 4)
    if (everything := line.get("all", "false")) not in ("true", "false"):
        raise ValueError(f"all={everything} is not true or false")
    strategies = choose_strategies(line, list(STRATEGIES), DEFAULT)
    own = Own(ranks, strategies, steps, everything == "true")
    return own, without(words, (*OWN_KEYS, *REPLACED))


def agree(words: Sequence[str], own: Own) -> tuple[Settings, list[str]]:
    """What is run, checked for each strategy and number of ranks, and its words: micro-batches that fit them
    all.

    Raises ValueError or FileNotFoundError in words for the user.
    """
    sizes = [
        f"steps={own.steps}",
        f"checkpoint.every={own.every}",
        "checkpoint.every_minutes=null",
        "log.every=1",
    ]
    words = [f"eval.every={own.steps}", *words, *sizes]
    first = resolve([*for_strategy(words, "single"), "strategy=single"], World())
    if first.config.debug or first.config.resume != "auto":
        raise ValueError(
            "debug= and resume= have no meaning here: the check starts and resumes by itself; drop them"
        )
    # BatchNorm and dropout see micro-batches: where theirs is not fixed, two numbers of ranks are two
    # different runs
    micro = first.config.given_micro_batch_size or max(first.config.batch_size // max(own.ranks), 1)
    words.append(f"micro_batch_size={micro}")
    for strategy in own.strategies:
        for ranks in [1] if strategy == "single" else own.ranks:
            resolve([*for_strategy(words, strategy), f"strategy={strategy}"], World(world_size=ranks))
    return first, words


def plan(own: Own) -> list[Writer]:
    """Who is killed how, and who reads what it leaves.

    Without `all`, kills beside and in the middle of a save take turns, and the checkpoint of each strategy is
    read by the next.
    """
    everywhere = [
        Layout(name, ranks)
        for name in own.strategies
        for ranks in ([1] if name == "single" else [1, *sorted(set(own.ranks))])
    ]
    writers = []
    for turn, name in enumerate(own.strategies):
        layout = Layout(name, 1 if name == "single" else own.ranks[0])
        following = own.strategies[(turn + 1) % len(own.strategies)]
        readers = [reader for reader in everywhere if reader != layout]
        if not own.all:
            readers = [
                reader for reader in readers if reader.strategy == following and reader.ranks != layout.ranks
            ]
            readers = readers or [
                reader for reader in everywhere if reader.strategy == following and reader != layout
            ]
        saving = [False, True] if own.all or len(own.strategies) == 1 else [turn % 2 == 1]
        writers.append(Writer(layout, saving, readers))
    return writers


def new_folder(base: Path) -> Path:
    """A folder of our own in `base`. Raises ValueError in words for the user."""
    try:
        base.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="resume_check-", dir=base))
    except OSError as error:
        raise ValueError(
            f"run_dir={base}: no folder can be made there ({error.strerror}); name another"
        ) from None


# doing it ---------------------------------------------------------------------------------------------------


class Check:
    """All rows of a check, made one after the other."""

    def __init__(self, own: Own, words: Sequence[str], folder: Path, settings: Settings) -> None:
        self.own, self.words, self.folder, self.settings = own, words, folder, settings
        self.writers = plan(own)
        self.environment = environment(max(own.ranks))
        self.random = random.Random(settings.config.seed)
        self.done, self.lives = 0, sum(writer.lives for writer in self.writers)

    def run(self) -> list[Row]:
        """The rows."""
        return [row for writer in self.writers for row in self.rows(writer)]

    def rows(self, writer: Writer) -> Iterator[Row]:
        """The rows of one strategy that is killed. What is not needed any more is removed: a state can be
        large.
        """
        layout, end = writer.layout, self.done + writer.lives
        whole = self.folder / f"{layout.strategy}-whole"
        ended = self.run_process(layout, whole, "without interruption")
        shutil.rmtree(whole / "checkpoints", ignore_errors=True)
        for saving in writer.saving:
            run_dir = self.folder / f"{layout.strategy}-killed{'-saving' * saving}"
            first = Row(writer=layout, reader=layout, saving=saving)
            rows = [first] + [
                Row(writer=layout, reader=reader) for reader in writer.readers if saving == writer.saving[0]
            ]
            problem = (
                f"the uninterrupted run: {ended.trouble}, its error stands above"
                if ended.trouble
                else self.kill(first, run_dir)
            )
            for row in rows[::-1]:  # the others read before the run itself goes on and drops the checkpoint
                if problem:
                    row.news.append(problem)
                elif row is first:
                    self.resume_and_compare(row, run_dir, whole)
                else:
                    self.read(row, run_dir, whole)
            if not any(row.news for row in rows):
                shutil.rmtree(run_dir)
            yield from rows
        self.done = end  # also if some lives were spared

    def run_process(self, layout: Layout, run_dir: Path, what: str, *more: str, **when: Any) -> Ended:
        """One life, with its line on the screen; if it died of itself, with its own error."""
        self.done += 1
        print(f"{self.done:>3}/{self.lives}  {f'{layout}, {what}':<58}", end="", flush=True)
        words = [*for_strategy(self.words, layout.strategy), *more]
        ended = run_process(words, layout, run_dir=run_dir, environment=self.environment, **when)
        print(f"{ended.seconds:7.1f} s", flush=True)
        if ended.trouble:
            print(f"{ended.trouble}; its last words:", *ended.last_words(), sep="\n    ", flush=True)
        return ended

    def kill(self, row: Row, run_dir: Path) -> str:
        """Let a run live until its checkpoint of half the way is committed, and end it. Returns what is
        wrong, in words.
        """
        half, last, saving = self.own.half, self.own.steps - self.own.every, row.saving
        for attempt in range(ATTEMPTS):
            shutil.rmtree(run_dir, ignore_errors=True)
            self.done -= attempt > 0
            # at first anywhere in a quarter of the run; one that was too fast for this is killed as soon as
            # it can be
            aim = self.random.randrange(half, last) if attempt == 0 else half
            if saving and attempt < ATTEMPTS - 1:
                what, when = "killed in a save", partial(in_a_save, run_dir, half)
            else:
                what, when = (
                    f"killed after step {aim}",
                    partial(some_time_after, run_dir, half, aim, self.random.random()),
                )
            ended = self.run_process(
                row.writer, run_dir, what + f", attempt {attempt + 1}" * (attempt > 0), kill_when=when
            )
            row.killed, row.resumed, row.saving = last_step(run_dir), saved_step(run_dir), is_saving(run_dir)
            if ended.trouble:
                return f"before it was killed, {ended.trouble}: its error stands above"
            if ended.how == "killed" and half <= row.resumed < self.own.steps and row.saving >= saving:
                return ""
        if ended.how != "killed" or row.resumed >= self.own.steps:
            return f"{ATTEMPTS} times it ended before it could be killed: compare={5 * self.own.steps} leaves more time"
        row.note = "no kill met a save: they are too short here"
        return ""

    def resume_and_compare(self, row: Row, run_dir: Path, whole: Path) -> None:
        """Start the killed run again, and compare it with the whole one, bit by bit."""
        ended = self.run_process(row.reader, run_dir, f"resumed from step {row.resumed}")
        if ended.trouble:
            row.news.append(f"{ended.trouble}: its error stands above")
            return
        if (found := resumed_at(run_dir, ended)) != row.resumed:
            row.news.append(
                f"it went on from step {found}, not from the newest checkpoint, of step {row.resumed}"
            )
        judge(row, lines_of(whole), lines_of(run_dir), self.settings.config.precision)
        row.same_weights = same_files(whole, run_dir)
        if not row.same_weights:
            row.news.append("the final weights are not the same bytes")

    def read(self, row: Row, killed: Path, whole: Path) -> None:
        """Start another run from the killed one's checkpoint, and compare it with the whole one, to
        tolerance.
        """
        row.resumed = saved_step(killed)
        run_dir = self.folder / f"{row.reader.strategy}-{row.reader.ranks}-from-{row.writer.strategy}"
        saved = checkpoint_dir(killed, row.resumed)
        ended = self.run_process(
            row.reader, run_dir, f"from step {row.resumed} of {row.writer}", f"resume={saved}"
        )
        if ended.trouble:
            row.news.append(f"{ended.trouble}: its error stands above")
            return
        judge(row, lines_of(whole), lines_of(run_dir), self.settings.config.precision)
        if not row.news:
            shutil.rmtree(run_dir)


def in_a_save(run_dir: Path, half: int) -> bool:
    """Whether a save is under way, and that of step `half` is behind it."""
    return is_saving(run_dir) and saved_step(run_dir) >= half


def some_time_after(run_dir: Path, half: int, step: int, share: float) -> bool:
    """Whether `step` is done and the checkpoint of step `half` committed; answers after a `share` of the time
    of a step.
    """
    if last_step(run_dir) < step or saved_step(run_dir) < half:
        return False
    time.sleep(share * step_seconds(run_dir))
    return True


def show(rows: Sequence[Row], settings: Settings, seconds: float) -> None:
    """The table, and the bad news."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("saved by", "resumed by", "killed\nat step"):
        table.add_column(name, no_wrap=True)
    for name in ("from\nstep", "losses\ncompared", "off by\nat most"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("final\nweights", ""):
        table.add_column(name, no_wrap=True)
    for row in rows:
        killed = f"{row.killed}{', saving' * row.saving}" if row.killed else ""
        numbers = (
            [str(row.compared), f"{row.off_by:.1e}" if row.off_by else "0"] if row.compared else ["", ""]
        )
        weights = {None: "", True: "same", False: "differ"}[row.same_weights]
        verdict = "[red]FAIL" if row.news else "[green]pass"
        table.add_row(
            str(row.writer), str(row.reader), killed, str(row.resumed or ""), *numbers, weights, verdict
        )
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        for words in filter(None, [*row.news, row.note]):
            console.print(
                f"{row.writer} -> {row.reader}: {words}", style="red" if row.news else "", soft_wrap=True
            )
    allowed = TOLERANCE[settings.config.precision][0]
    print("off by: losses and gradient norms, relative; 0 is bit-equal")
    print(
        f"required: where the same strategy resumes on as many ranks, 0 and the same bytes of final weights; else {allowed:g}"
    )
    print(f"{sum(not row.news for row in rows)} of {len(rows)} passed in {seconds:.0f} s")
