"""See where the time of a training step goes.

    rankzero profile recipe=./mine.py precision=bf16 compile=true
    torchrun --nproc_per_node=2 -m launch profile recipe=gpt strategy=fsdp
    srun rankzero profile recipe=gpt strategy=fsdp

Makes real steps of the run, on its real data, under torch.profiler. Prints what share of a step is computing,
exposed communication (no kernel computes at the same time), copies between host and device, and idle, over
all ranks; the most expensive operations; and the keys that may help. The trace opens in
https://ui.perfetto.dev. Nothing is saved, evaluated or resumed: keys about that have no effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from launch.cli.command import read_command, report_mistakes
from launch.profiling import profile_run
from launch.runtime.exit_codes import ExitCode
from launch.runtime.process_exit import exit_normally
from strategies.options import PositiveInt

EXITS = {ExitCode.DONE: "done", ExitCode.FAILED: "failed", ExitCode.INTERRUPTED: "interrupted by Ctrl-C"}


@dataclass(kw_only=True)
class ProfileOptions:
    """What `rankzero profile` takes besides the keys of a run."""

    profile_steps: PositiveInt = 5
    """steps that are measured, and as many without the profiler before"""
    warmup_steps: PositiveInt = 5
    """steps before those, which do not count: they compile, and allocate"""
    trace: str | None = "auto"
    """where the trace of rank zero goes, a .json.gz; null: nowhere; auto:
    runs/profile/RECIPE/TIME-STRATEGY-RANKS.json.gz
    """


def main(argv: list[str]) -> NoReturn:
    """Profile what `argv` asks for; the process ends with the exit code."""
    arguments = read_command(
        argv, __doc__, ProfileOptions, name="profile", takes_run=True, on_ranks=True, exits=EXITS
    )
    options, world = arguments.options, arguments.world
    with report_mistakes(world.rank):
        settings = arguments.settings()
        profile_run.check_config(settings.config)
        trace = profile_run.trace_path(options.trace, settings.config, world)
    exit_normally(
        profile_run.profile_run(settings, world, options.profile_steps, options.warmup_steps, trace)
    )
