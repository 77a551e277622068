"""The console: a banner and one progress line; on rank zero only."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from launch.data.in_memory import is_on_gpu
from recipes.parts.data import InMemoryDataset
from strategies.precision import contract

if TYPE_CHECKING:
    from launch.state.run import Run

CLEAR_LINE = "\r\x1b[2K"
REDRAW_S = 0.1
"""between two drawings of the progress line: a terminal is slow, steps can be fast"""


class Console:
    """Lines on `stream`; on a terminal the progress line is rewritten in place, unless `lines` asks to keep
    each.
    """

    def __init__(self, enabled: bool, stream: TextIO = sys.stdout, lines: bool = False) -> None:
        self.enabled, self.stream = enabled, stream
        self.live = enabled and stream.isatty() and not lines
        self.last_drawn = 0.0

    def print(self, text: str = "") -> None:
        """A line that stays."""
        if self.enabled:
            print(f"{CLEAR_LINE}{text}" if self.live else text, file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        """A line on stderr that stays."""
        if self.enabled:
            print(f"{CLEAR_LINE if self.live else ''}rankzero: {text}", file=sys.stderr, flush=True)

    def step(self, line: Mapping[str, Any], last_step: int) -> None:
        """The progress line: loss, learning rate, gradient norm, throughput, estimated time to the end."""
        samples_per_step = line["samples"] / line["step"]
        seconds = (last_step - line["step"]) * samples_per_step / line["samples_per_second"]
        text = (
            f"step {line['step']}/{last_step}  epoch {line['epoch']:.2f}  loss {line['loss']:.4f}  "
            f"lr {line['lr']:.3g}  grad_norm {line['grad_norm']:.3g}  {throughput_of(line)}  "
            f"eta {timedelta(seconds=round(seconds))}"
        )
        if not self.live:
            self.print(text)
        elif time.monotonic() - self.last_drawn > REDRAW_S:
            self.last_drawn = time.monotonic()
            print(f"{CLEAR_LINE}{text}", end="", file=self.stream, flush=True)

    def evaluation(self, step: int, scores: Mapping[str, Any]) -> None:
        """The scores that are single numbers."""
        self.print(f"step {step}  {format_scores(scores)}")

    def banner(self, run: Run, run_dir: Path, versions: Mapping[str, str], origin: str) -> None:
        """The start of a run: what was chosen, and why; `origin` says whether it is new or continues one."""
        self.print(
            f"rankzero {versions['rankzero']}  recipe {run.config.recipe}  seed {run.config.seed}  "
            f"torch {versions['torch']}"
        )
        rows = {**describe_setup(run), "run": f"{run_dir} ({origin})"}
        for name, text in rows.items():
            self.print(f"  {name:<10}{text}")


def describe_setup(run: Run) -> dict[str, str]:
    """The rows of the banner that follow from the run alone."""
    world, config, plan = run.world, run.config, run.batch_plan
    nodes = -(-world.world_size // world.local_world_size)
    splits = {name: split for name, split in vars(run.splits).items() if split is not None}
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    epochs = config.epochs or f"{run.total_steps * plan.batch_size / len(run.splits.train):.1f}"
    models = {
        "" if len(run.strategies) == 1 else f"{name} ": strategy.layout.num_parameters
        for name, strategy in run.strategies.items()
    }
    return {
        "launcher": f"{world.launcher}: {world.world_size} rank(s) on {nodes} node(s) ({world.why})",
        "device": device_name(world.device),
        "strategy": ", ".join([config.strategy, *enabled_options(run)]),
        "precision": f"{config.precision}: {contract(config.precision, config.ddp.compress)}",
        "batch": f"{plan.batch_size} = {plan.micro_batch_size} micro x "
        f"{plan.accumulation_steps} accumulation x {plan.world_size} rank(s)",
        "model": ", ".join(f"{name}{count:,} parameters" for name, count in models.items()),
        "data": f"{sizes} samples, {describe_loading(run)}",
        "length": f"{run.total_steps} steps ({epochs} epochs), learning rate {run.recipe.schedule.name}",
    }


def format_scores(scores: Mapping[str, Any]) -> str:
    """The scores that are single numbers, in one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float))


def throughput_of(line: Mapping[str, Any]) -> str:
    """In what the recipe counts: the last `_per_second` of a line of metrics.jsonl."""
    *_, key = (key for key in line if key.endswith("_per_second"))
    return f"{line[key]:,.0f} {key.removesuffix('_per_second')}/s"


def device_name(device: str) -> str:
    """The device, with the name of the GPU or the number of threads."""
    import torch

    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} thread(s) per rank"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def describe_loading(run: Run) -> str:
    """How the training samples are loaded."""
    workers = run.num_workers(run.splits.train)
    if workers:
        return f"loaded by {workers} worker(s) per rank"
    if not isinstance(run.splits.train, InMemoryDataset):
        return "loaded one by one in the training process"
    return f"in memory{' on the GPU' if is_on_gpu(run.splits.train) else ''}"


def enabled_options(run: Run) -> list[str]:
    """What is switched on beside the strategy."""
    config = run.config
    compiled = "compiled" if config.compile in (True, "default") else f"compiled for {config.compile}"
    options = {
        f"activation checkpointing {config.activation_checkpointing}": config.activation_checkpointing
        != "none",
        compiled: config.compile,
        f"gradients reduced in {config.ddp.compress}": config.ddp.compress != "none",
        f"clip_norm {config.clip_norm}": config.clip_norm,
        f"clip_value {config.clip_value}": config.clip_value,
        "sync_batchnorm": config.sync_batchnorm,
    }
    return [text for text, enabled in options.items() if enabled]
