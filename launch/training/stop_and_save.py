"""What one rank requests, all ranks do at the same step: save by rank zero's clock, stop at a signal."""

from __future__ import annotations

from launch.checkpoint.writer import CheckpointWriter
from launch.reporting.metrics import Metrics
from launch.watchdog.consensus import Consensus
from launch.watchdog.stop import StopRequest


class Requests:
    """The requests that the ranks have agreed on, and this rank's own share in them.

    A request is known a call after it was made: the all-reduce runs while the step does.
    """

    def __init__(
        self, metrics: Metrics, checkpoints: CheckpointWriter, stop_request: StopRequest | None = None
    ) -> None:
        self.world, self.metrics, self.checkpoints = metrics.run.world, metrics, checkpoints
        self.stop_request = stop_request or StopRequest()
        self.consensus = Consensus(self.world, ["save", "stop"])
        self.agreed: set[str] = set()

    def exchange(self, every_call: bool = False) -> None:
        """Tell the other ranks what this one requests, and learn what any of them did. Collective, but for
        calls that are left out where steps are short; with `every_call` none is.
        """
        self.stop_request.update_margin(self.metrics.timer.slowest_step_s, self.metrics.slowest_save_s)
        is_rank_zero = self.world.rank == 0
        local = {"stop"} if self.stop_request.requested(by_clock=is_rank_zero) else set()
        if is_rank_zero and self.checkpoints.overdue:
            local.add("save")
        self.agreed |= self.consensus.exchange(local, seldom=not every_call)

    def close(self) -> None:
        """Wait for the exchange in flight. Collective."""
        self.agreed |= self.consensus.close()

    def saved(self) -> None:
        """A save has been made: earlier requests for one, those in flight too, are served. Collective."""
        self.close()
        self.agreed.discard("save")

    @property
    def save(self) -> bool:
        """Whether to save after this step."""
        return "save" in self.agreed

    @property
    def stop(self) -> bool:
        """Whether to stop after this step."""
        return "stop" in self.agreed

    @property
    def stop_reason(self) -> str:
        """Why the run stops before its end, as far as this rank knows; empty if it does not."""
        return (self.stop_request.reason or "a signal to another rank") if self.stop else ""
