"""A thread of each rank that tells the others that it lives, and that notices when they do not.

The training itself cannot: when one rank dies or hangs, the others wait for it in a collective, for as long
as that takes. So each rank leaves a heartbeat (alive, where in its run) with the store every second or so, on
a connection of its own. Rank zero looks at them. The first verdict wins: who posts it has failed first, all
others end when they read it, rank zero tells it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # its stubs forget it

from launch.runtime.rendezvous import RendezvousError, meet
from launch.runtime.restarts import reexec
from launch.runtime.store import is_open, rendezvous_endpoint, spans, wait_for
from launch.watchdog import auto_micro_batch, failure_report
from launch.watchdog.failure_report import FailureReport
from launch.watchdog.heartbeats import Heartbeats

if TYPE_CHECKING:
    from launch.runtime.phase import Phase
    from launch.runtime.world import World

RANKS_A_SECOND = 256
"""heartbeats a second that the store gets at most: a larger run has a slower pulse"""
LOST = 30
"""heartbeats that a rank may miss: a garbage collection, a swapped-out host"""
GONE = 4
"""heartbeats that a rank may miss when the others have already lost their connection to it"""
OPENING = 120.0
"""seconds for its own connection to the store: a busy start is no failure"""
GATHERING = 3.0
"""seconds for all ranks to say where they hang"""
TELLING = 3.0
"""seconds for rank zero to tell what another rank has posted"""
ENDED = "0 0 0 end"
"""the last heartbeat of a rank that has come to a good end"""
WARM_UP = 3
"""the first step may take so many times as long: it compiles; an evaluation too, whose metrics are imported
and computed
"""


class Watchdog:
    """The watch of one rank, from the roll-call to the end of the run."""

    def __init__(self, world: World, phase: Phase, hang_timeout: float) -> None:
        self.world, self.phase, self.hang_timeout = world, phase, hang_timeout
        self.run_dir: Path | None = None
        self.before_end: Callable[[], object] = lambda: None
        """called before this process ends for the failure of another rank: a save in flight may still become
        whole
        """
        self.interval = max(1.0, world.world_size / RANKS_A_SECOND)
        self.main = threading.main_thread().ident
        self.over = threading.Event()
        self.ending = threading.Lock()
        """held by the one thread that ends this process"""
        self.connected, self.answered, self.closed = False, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()
        self.store_guard = threading.Thread(target=self.guard, name="guard", daemon=True)
        self.store_guard.start()

    def close(self) -> None:
        """The run has come to a good end: nobody is to miss this rank."""
        self.over.set()
        self.closed.set()
        self.thread.join()
        self.store_guard.join()
        with suppress(dist.DistError, RuntimeError):
            self.world.store.set(f"beat/{self.world.rank}", ENDED)

    def guard(self) -> None:
        """In a thread of its own: end, if the store has not answered for LOST beats.

        Whoever asks it waits for ever: a cable that was cut ends no connection. Beats are counted, not
        seconds: a host that slept has missed none.
        """
        silent = 0
        while not self.closed.wait(self.interval):
            silent = 0 if self.answered.is_set() or not self.connected else silent + 1
            self.answered.clear()
            if silent > LOST:
                self.forsaken()

    # in the thread ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until the end: beat, read, look around."""
        others = Heartbeats(self.world.world_size)
        try:
            store = self.world.store if self.world.world_size == 1 else meet(self.world, OPENING, again=True)
            self.connected = True
            count, woke = 0, time.monotonic()
            while not self.over.wait(self.interval):
                count += 1
                store.set(
                    f"beat/{self.world.rank}",
                    f"{count} {self.phase.ticks} {self.phase.step} {self.phase.name}",
                )
                if store.check(["verdict"]):
                    self.obey(store)
                if store.check(["where"]):
                    store.set(f"stack/{self.world.rank}", self.stack())
                if self.world.rank == 0:
                    others.look(store)
                    if time.monotonic() - woke > 5 * self.interval:
                        others.reset_after_suspend()
                    self.judge(store, others)
                woke = time.monotonic()
                self.answered.set()
        except (dist.DistError, RuntimeError, RendezvousError):
            # the store is gone, and with it the host of rank zero, or the launcher
            if not self.over.wait(
                GONE * self.interval
            ):  # they have not ended well, else this process would too
                self.forsaken()

    def judge(self, store: Store, others: Heartbeats) -> None:
        """On rank zero: has a rank stopped living, or have all of them stopped moving?"""
        if lost := others.silent_for(LOST * self.interval):
            self.publish(store, self.about_lost(lost, store, others))
        warming_up = self.phase.step <= 1 or self.phase.name == "evaluate"
        patience = self.hang_timeout * (WARM_UP if warming_up else 1)
        if others.still_for() > patience:
            verdict = self.about_hang(store, patience)
            others.look(store)
            if others.still_for() > patience:
                self.publish(store, verdict)
            store.delete_key("where")  # it has moved after all

    # ends ---------------------------------------------------------------------------------------------------

    def failed(self, verdict: FailureReport, lost_a_peer: bool) -> NoReturn:
        """In the main thread: end with `verdict`; if it is only that another rank is gone, with the reason
        for that.
        """
        self.over.set()
        try:
            if lost_a_peer:
                verdict = self.cause() or verdict
            self.publish(self.world.store, verdict)
        except (dist.DistError, RuntimeError):
            self.forsaken(None if lost_a_peer else verdict)

    def cause(self) -> FailureReport | None:
        """Why connections broke: the verdict of another rank (then this process ends), or ranks that do not
        live any more.
        """
        store, others = self.world.store, Heartbeats(self.world.world_size)
        others.look(store)
        if wait_for(lambda: store.check(["verdict"]), (GONE + 1) * self.interval):
            self.obey(store)
        others.look(store)
        lost = [rank for rank in others.silent_for(GONE * self.interval) if rank != self.world.rank]
        return self.about_lost(lost, store, others) if lost else None

    def publish(self, store: Store, verdict: FailureReport) -> NoReturn:
        """Post a verdict, see that it is told, and end. If another rank was first, its verdict stands."""
        text = json.dumps(verdict)
        if store.compare_set("verdict", "", text).decode() != text:
            self.obey(store)
        last = verdict["kind"] != auto_micro_batch.KIND
        if last:
            failure_report.for_torchrun(verdict)
        if self.world.rank == 0:
            self.obey(store)
        # before the next life rank zero waits for a save in flight
        if wait_for(lambda: store.check(["told"]), TELLING if last else LOST * self.interval):
            self.leave(verdict, store)
        self.tell(verdict)

    def obey(self, store: Store) -> NoReturn:
        """End or begin again, as a verdict wants it; rank zero tells it."""
        self.before_end()
        verdict = json.loads(store.get("verdict"))
        if self.world.rank > 0:
            self.leave(verdict, store)
        self.ending.acquire()
        tell(verdict, self.run_dir)
        store.set("told", "")
        # the others read it, before the store goes with this process
        if verdict["kind"] == auto_micro_batch.KIND:
            heard = [f"heard/{rank}" for rank in range(1, self.world.world_size)]
            wait_for(lambda: not heard or store.check(heard), LOST * self.interval)
            reexec(self.run_dir)
        if self.world.world_size > 1:
            time.sleep(2 * self.interval)
        end()

    def leave(self, verdict: FailureReport, store: Store) -> NoReturn:
        """Of a rank other than zero: end or begin again."""
        self.ending.acquire()
        if verdict["kind"] != auto_micro_batch.KIND:
            end()
        with suppress(dist.DistError, RuntimeError):
            store.set(f"heard/{self.world.rank}", "")
        point = rendezvous_endpoint(self.world, os.environ)
        if point and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # rank zero serves the store, and will again: the old one must be gone before this rank looks for
            # the new one
            wait_for(lambda: not is_open(*point), LOST * self.interval)
        reexec(self.run_dir)

    def forsaken(self, verdict: FailureReport | None = None) -> NoReturn:
        """End without a store, and so without the others: what they tell is not known here."""
        message = f"rank {self.world.rank} lost the connection to the host of rank zero: it is down, or its launcher has ended"
        self.tell(
            verdict or {"kind": "lost", **failure_report.origin(self.world, self.phase), "message": message}
        )

    def tell(self, verdict: FailureReport) -> NoReturn:
        """Tell a verdict that rank zero could not tell, unless another rank has."""
        self.ending.acquire()
        if self.run_dir is None or failure_report.write_once(verdict, self.run_dir):
            print(failure_report.render(verdict, self.run_dir), file=sys.stderr, flush=True)
        end()

    # verdicts -----------------------------------------------------------------------------------------------

    def about_lost(self, ranks: list[int], store: Store, others: Heartbeats) -> FailureReport:
        """The verdict on ranks that have ended without a word."""
        told = []
        for rank in ranks[:8]:
            report = json.loads(store.get(f"here/{rank}")) if store.check([f"here/{rank}"]) else {"host": "?"}
            seen = others.seen[rank]
            told.append(f"rank {rank} on {report['host']}, last seen in step {seen.step}, {seen.phase}")
        message = (
            f"{'; '.join(told)}{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''}: ended without a word; "
            f"rank {self.world.rank} is in step {self.phase.step}, {self.phase.name}. "
            "Killed (out of memory? `dmesg` of that host tells), or the host or its network is down"
        )
        return {
            "kind": "lost",
            **failure_report.origin(self.world, self.phase),
            "lost": ranks,
            "message": message,
        }

    def about_hang(self, store: Store, patience: float) -> FailureReport:
        """The verdict on a run in which nothing moves: who is in which call, and who is not there."""
        store.set("where", "")
        store.set(f"stack/{self.world.rank}", self.stack())
        keys = [f"stack/{rank}" for rank in range(self.world.world_size)]
        wait_for(lambda: store.check(keys), GATHERING * self.interval)
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        stacks: dict[str, str] = {}
        for rank, key in enumerate(keys):
            if store.check([key]):
                found = json.loads(store.get(key))
                where = f"step {found['step']}, {found['phase']}", found["line"]
                groups[where].append(rank)
                stacks.setdefault(found["line"], found["stack"])
            else:
                host = json.loads(store.get(f"here/{rank}"))["host"] if store.check([f"here/{rank}"]) else "?"
                groups[f"not heard from on {host}: stuck outside Python, or gone", ""].append(rank)
        # the few are the cause, as a rule: the many wait for them
        order = sorted(groups.items(), key=lambda item: len(item[1]))
        lines = [
            f"rank {spans(ranks)}: {where}{f', {line}' if line else ''}" for (where, line), ranks in order
        ]
        message = f"no rank has made progress for {patience:g} s (hang_timeout={self.hang_timeout:g}); " + (
            "they are not in the same place" if len(groups) > 1 else "all are in the same place"
        )
        flight = flight_recorder(self.world)
        return {
            "kind": "hang",
            **failure_report.origin(self.world, self.phase),
            "message": message,
            "ranks": lines,
            "groups": {where: ranks for (where, _), ranks in order},
            "stacks": stacks,
            **({"flight_recorder": flight} if flight else {}),
        }

    def stack(self) -> str:
        """Where the main thread is: step, phase, the innermost line of the user's or our own code, and the
        whole stack.
        """
        frame = sys._current_frames().get(self.main or 0)
        return json.dumps(
            {
                "step": self.phase.step,
                "phase": self.phase.name,
                "line": innermost(frame),
                "stack": "".join(traceback.format_stack(frame)),
            }
        )


def innermost(frame: FrameType | None) -> str:
    """`file:line in function`, of the innermost frame that is not a library's."""
    library = tuple(
        prefix
        for prefix in failure_report.LIBRARIES
        if not prefix.startswith(str(failure_report.HERE.parent))
    )
    while frame is not None and frame.f_code.co_filename.startswith(library):
        frame = frame.f_back
    if frame is None:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def flight_recorder(world: World) -> Any:
    """NCCL's record of collectives that have not ended, on a GPU."""
    if not world.device.startswith("cuda"):
        return None
    try:
        from torch._C import _distributed_c10d

        dump: Any = _distributed_c10d._dump_nccl_trace_json  # type: ignore[attr-defined]  # only where torch has NCCL
        return json.loads(dump(includeCollectives=True, onlyActive=True))
    except (ImportError, AttributeError, RuntimeError, ValueError):
        return None


def tell(verdict: FailureReport, run_dir: Path | None) -> None:
    """Put a verdict on the screen and into failure.json."""
    if verdict["kind"] == auto_micro_batch.KIND and run_dir is not None:
        try:
            auto_micro_batch.remember(verdict, run_dir)
        except OSError as error:  # the next life would begin with the size that did not fit
            print(
                f"rankzero: {verdict['message']}; but {run_dir} cannot be written to: {error}",
                file=sys.stderr,
                flush=True,
            )
            end()
        run_dir = None  # no failure of which more could be read there
    elif run_dir is not None:
        failure_report.write_once(verdict, run_dir)
    print(failure_report.render(verdict, run_dir), file=sys.stderr, flush=True)


def end(lock: threading.Lock | None = None) -> NoReturn:
    """End this process with exit code 1, without waiting for any other rank; the first thread that holds
    `lock` may.
    """
    if lock is not None:
        lock.acquire()
    sys.stdout.flush()
    os._exit(1)  # a clean exit would wait for collectives that can never end
