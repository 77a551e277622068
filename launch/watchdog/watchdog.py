"""The watchdog: a thread of each rank that shows the others that it lives, and that notices when they do not.

The training itself cannot: when one rank dies or hangs, the others wait for it in a collective, for as long
as that takes. So each rank leaves a heartbeat (alive, where in its run) with the store every second or so, on
a connection of its own; rank zero reads them all. The diagram is in the docstring of this package.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # its stubs forget it

from launch.runtime.exit_codes import ExitCode
from launch.runtime.process_exit import exit_at_once
from launch.runtime.rendezvous import RendezvousError, heartbeat_key, meet
from launch.runtime.restarts import reexec
from launch.runtime.store import is_open, rendezvous_endpoint, wait_for
from launch.watchdog import auto_micro_batch, hang_report
from launch.watchdog.failure_report import FailureReport, render, write_once, write_torchelastic_error
from launch.watchdog.heartbeats import FINISHED, Heartbeats, write_heartbeat

if TYPE_CHECKING:
    from launch.runtime.phase import Phase
    from launch.runtime.world import World

HEARTBEATS_PER_SECOND = 256
"""that the store gets at most: in a larger run the interval between two of a rank is longer"""
LOST = 30
"""intervals without a heartbeat after which a rank is lost: not after a garbage collection, on a swapping
host
"""
LOST_CONNECTION = 4
"""intervals without a heartbeat after which it is lost, when the others have lost their connection to it"""
CONNECT_TIMEOUT_S = 120.0
"""seconds for the watchdog's own connection to the store: a busy start is no failure"""
STACKS = 3.0
"""intervals for all ranks to write their stacks"""
REPORT_TIMEOUT_S = 3.0
"""seconds for rank zero to report what another rank has published"""
SLOW_PHASES = 3
"""the first step may take so many times `hang_timeout`: it compiles; an evaluation too, whose metrics are
imported and computed
"""
REPORT, REPORTED = "failure_report", "reported"
STORE_ERRORS = (dist.DistError, RuntimeError)
"""the store is gone: the host that serves it, or the launcher"""


class Watchdog:
    """The watchdog of one rank, from the rendezvous to the end of the run."""

    def __init__(self, world: World, phase: Phase, hang_timeout: float) -> None:
        self.world, self.phase, self.hang_timeout = world, phase, hang_timeout
        self.run_dir: Path | None = None
        """where failure.json is written, once this run has it"""
        self.before_shut_down: Callable[[], object] = lambda: None
        """called before this process ends for a failure: a save in flight may still be completed"""
        self.interval = max(1.0, world.world_size / HEARTBEATS_PER_SECOND)
        self.finished, self.closed = threading.Event(), threading.Event()
        self.shutting_down = threading.Lock()
        """held by the thread that ends this process"""
        self.published = False
        """whether the report that ends all ranks is this rank's"""
        self.connected, self.store_answered = False, threading.Event()
        self.threads = [
            threading.Thread(target=self.watch, name="watchdog", daemon=True),
            threading.Thread(target=self.guard_store, name="store guard", daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """The run has succeeded: this rank is not lost when it beats no more."""
        self.finished.set()
        self.closed.set()
        for thread in self.threads:
            thread.join()
        with suppress(*STORE_ERRORS):
            self.world.store.set(heartbeat_key(self.world.rank), FINISHED)

    # the threads --------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Until the end: beat, obey a report, show where this rank is; on rank zero: detect."""
        alone = self.world.world_size == 1
        try:
            store = self.world.store if alone else meet(self.world, CONNECT_TIMEOUT_S, again=True)
            self.connected = True
            self.beat(store)
        except (*STORE_ERRORS, RendezvousError):
            # the others have not succeeded, if this process is still there after a while
            if not self.finished.wait(LOST_CONNECTION * self.interval):
                self.shut_down(hang_report.disconnected(self.world, self.phase), None)

    def beat(self, store: Store) -> None:
        """One heartbeat each interval, and what goes with it."""
        heartbeats, rank = Heartbeats(self.world.world_size), self.world.rank
        count, last = 0, time.monotonic()
        while not self.finished.wait(self.interval):
            count += 1
            write_heartbeat(store, rank, count, self.phase)
            if store.check([REPORT]):
                self.shut_down(FailureReport.from_json(store.get(REPORT)), store)
            if store.check([hang_report.STACKS_WANTED]):
                hang_report.write_stack(store, rank, self.phase)
            if rank == 0:
                heartbeats.read(store)
                if time.monotonic() - last > 5 * self.interval:
                    heartbeats.reset_after_suspend()
                if (report := self.detect(store, heartbeats)) is not None:
                    self.shut_down(self.publish(report, store), store)
            last = time.monotonic()
            self.store_answered.set()

    def guard_store(self) -> None:
        """End this process if the store has not answered for LOST intervals.

        Whoever asks it waits for ever: a cable that was cut ends no connection. Intervals are counted, not
        seconds: a host that was suspended has missed none.
        """
        silent = 0
        while not self.closed.wait(self.interval):
            silent = 0 if self.store_answered.is_set() or not self.connected else silent + 1
            self.store_answered.clear()
            if silent > LOST:
                self.shut_down(hang_report.disconnected(self.world, self.phase), None)

    # 1. detect ----------------------------------------------------------------------------------------------

    def detect(self, store: Store, heartbeats: Heartbeats) -> FailureReport | None:
        """On rank zero: the report on ranks that are lost, or on a hang of all; None if all is well."""
        if lost := heartbeats.silent_ranks(LOST * self.interval):
            return hang_report.lost_ranks(lost, store, heartbeats, self.world, self.phase)
        slow = self.phase.step <= 1 or self.phase.name == "evaluate"
        timeout = self.hang_timeout * (SLOW_PHASES if slow else 1)
        if heartbeats.seconds_without_progress() <= timeout:
            return None
        patience = STACKS * self.interval
        report = hang_report.hang(store, self.world, self.phase, timeout, self.hang_timeout, patience)
        heartbeats.read(store)
        if heartbeats.seconds_without_progress() > timeout:
            return report
        store.delete_key(hang_report.STACKS_WANTED)  # there was progress after all
        return None

    def fail(self, report: FailureReport, lost_peer: bool = False) -> NoReturn:
        """In the main thread: end all ranks with `report`. With `lost_peer` it says only that another rank is
        gone, and the report on the cause takes its place.
        """
        self.finished.set()
        store = self.world.store
        try:
            if lost_peer:
                report = self.cause(store) or report
            report = self.publish(report, store)
        except STORE_ERRORS:
            report = hang_report.disconnected(self.world, self.phase) if lost_peer else report
            self.shut_down(report, None)
        self.shut_down(report, store)

    def cause(self, store: Store) -> FailureReport | None:
        """Why connections broke: the report of another rank, or a new one on ranks that are lost."""
        heartbeats = Heartbeats(self.world.world_size)
        heartbeats.read(store)
        if wait_for(lambda: store.check([REPORT]), (LOST_CONNECTION + 1) * self.interval):
            return FailureReport.from_json(store.get(REPORT))
        heartbeats.read(store)
        silent = heartbeats.silent_ranks(LOST_CONNECTION * self.interval)
        lost = [rank for rank in silent if rank != self.world.rank]
        return hang_report.lost_ranks(lost, store, heartbeats, self.world, self.phase) if lost else None

    # 2. publish ---------------------------------------------------------------------------------------------

    def publish(self, report: FailureReport, store: Store) -> FailureReport:
        """Publish a report to all ranks; returns the one that ends them: the first that was published."""
        there_already = store.check([REPORT])
        text = report.to_json()
        first = store.compare_set(REPORT, "", text).decode()
        self.published = first == text and not there_already
        if self.published and not report.restarts:
            write_torchelastic_error(report)
        return FailureReport.from_json(first)

    # 3. shut down -------------------------------------------------------------------------------------------

    def shut_down(self, report: FailureReport, store: Store | None) -> NoReturn:
        """End this process, or restart it if the report wants that; rank zero prints the report for all.

        Any thread may call it; the first one ends the process. Without a `store` the others cannot be
        reached: each rank prints, unless failure.json says that another has.
        """
        with suppress(Exception):  # nothing may keep this process alive
            self.before_shut_down()
        # a thread that holds it may wait for a store that does not answer
        self.shutting_down.acquire(timeout=LOST * self.interval)
        restart = False
        with suppress(Exception):  # the store may go at any moment, and with a pipe the screen
            if store is None:
                self.announce(report)
            elif self.world.rank == 0:
                restart = self.lead(report, store)
            else:
                restart = self.follow(report, store)
        if restart:
            reexec(self.run_dir)
        exit_at_once(ExitCode.FAILED)

    def lead(self, report: FailureReport, store: Store) -> bool:
        """On rank zero: print the report and wait until the others have read it, before the store goes with
        this process. Returns whether to restart.
        """
        self.announce(report)
        store.set(REPORTED, "")
        if report.restarts:
            others = [restarting_key(rank) for rank in range(1, self.world.world_size)]
            wait_for(lambda: not others or store.check(others), LOST * self.interval)
        elif self.world.world_size > 1:
            time.sleep(2 * self.interval)
        return report.restarts

    def follow(self, report: FailureReport, store: Store) -> bool:
        """On another rank: see that the own report is printed, and let rank zero restart first. Returns
        whether to restart.
        """
        # before a restart rank zero completes a save in flight
        patience = LOST * self.interval if report.restarts else REPORT_TIMEOUT_S
        if self.published and not wait_for(lambda: store.check([REPORTED]), patience):
            self.announce(report)
            return False
        if not report.restarts:
            return False
        with suppress(*STORE_ERRORS):
            store.set(restarting_key(self.world.rank), "")
        endpoint = rendezvous_endpoint(self.world, os.environ)
        if endpoint and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # rank zero serves the store, and will again: the old one must be gone before this rank looks for
            # the new one
            wait_for(lambda: not is_open(*endpoint), LOST * self.interval)
        return True

    def announce(self, report: FailureReport) -> None:
        """Print a report and write failure.json, unless another rank has; remember the size of a restart."""
        if report.restarts and self.run_dir is not None:
            try:
                auto_micro_batch.remember(report, self.run_dir)
            except OSError as error:  # the restarted run would begin with the size that did not fit
                problem = f"{report.message}; but {self.run_dir} cannot be written to: {error}"
                print(f"rankzero: {problem}", file=sys.stderr, flush=True)
                exit_at_once(ExitCode.FAILED)
            print(render(report, None), file=sys.stderr, flush=True)
        elif self.run_dir is None or write_once(report, self.run_dir):
            print(render(report, self.run_dir), file=sys.stderr, flush=True)


def restarting_key(rank: int) -> str:
    """Where a rank says that it restarts."""
    return f"restarting/{rank}"
