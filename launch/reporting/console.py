"""What a person sees: a banner, one progress line, a summary. Rank zero speaks."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.filesize import decimal

from launch.data.in_memory import lies_on_gpu
from recipes.parts.data import InMemoryDataset
from strategies.precision import contract

if TYPE_CHECKING:
    from launch.checkpoint.writer import SaveResult
    from launch.state.run import Run


class Console:
    """Lines on `stream`; on a terminal the progress line is rewritten in place, unless `lines` asks to keep
    each.
    """

    def __init__(self, speaks: bool, stream: TextIO = sys.stdout, lines: bool = False) -> None:
        self.speaks, self.stream = speaks, stream
        self.live = speaks and stream.isatty() and not lines
        self.drawn = 0.0

    def say(self, text: str = "") -> None:
        """A line that stays."""
        if self.speaks:
            print(f"\r\x1b[2K{text}" if self.live else text, file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        """A line on stderr that stays."""
        if self.speaks:
            print(
                f"{chr(13) + chr(27) + '[2K' if self.live else ''}rankzero: {text}",
                file=sys.stderr,
                flush=True,
            )

    def step(self, line: Mapping[str, Any], total_steps: int) -> None:
        """The progress line: loss, learning rate, speed, time left."""
        left = timedelta(
            seconds=round(
                (total_steps - line["step"]) * line["samples"] / line["step"] / line["samples_per_second"]
            )
        )
        text = (
            f"step {line['step']}/{total_steps}  epoch {line['epoch']:.2f}  loss {line['loss']:.4f}  lr {line['lr']:.3g}  "
            f"grad_norm {line['grad_norm']:.3g}  {speed_of(line)}  left {left}"
        )
        if not self.live:
            self.say(text)
        elif time.monotonic() - self.drawn > 0.1:  # a terminal is slow, steps can be fast
            self.drawn = time.monotonic()
            print(f"\r\x1b[2K{text}", end="", file=self.stream, flush=True)

    def evaluation(self, step: int, scores: Mapping[str, Any]) -> None:
        """The scores that are single numbers."""
        numbers = "  ".join(
            f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float)
        )
        self.say(f"step {step}  {numbers}")

    def banner(self, run: Run, run_dir: Path, versions: Mapping[str, str], resumed: str) -> None:
        """The start of a run; each line answers a question that one has when it goes wrong."""
        world, config, batch_plan = run.world, run.config, run.batch_plan
        nodes = -(-world.world_size // world.local_world_size)
        sizes = ", ".join(
            f"{len(split):,} {name}" for name, split in vars(run.splits).items() if split is not None
        )
        length = (
            f"{config.epochs} epochs"
            if config.epochs
            else f"{run.total_steps * batch_plan.batch_size / len(run.splits.train):.1f} epochs"
        )
        rows = {
            "launcher": f"{world.launcher}: {world.world_size} rank(s) on {nodes} node(s) ({world.why})",
            "device": device_name(world.device),
            "strategy": config.strategy + "".join(f", {word}" for word in extras(run)),
            "precision": f"{config.precision}: {contract(config.precision, config.ddp.compress)}",
            "batch": f"{batch_plan.batch_size} = {batch_plan.micro_batch_size} micro x {batch_plan.accumulation_steps} accumulation "
            f"x {batch_plan.world_size} rank(s)",
            "model": ", ".join(
                f"{'' if len(run.strategies) == 1 else name + ' '}{strategy.layout.num_parameters:,} parameters"
                for name, strategy in run.strategies.items()
            ),
            "data": f"{sizes} samples, {way_of(run)}",
            "length": f"{run.total_steps} steps ({length}), learning rate {run.recipe.schedule.name}",
            "run": f"{run_dir} ({resumed})",
        }
        self.say(
            f"rankzero {versions['rankzero']}  recipe {config.recipe}  seed {config.seed}  torch {versions['torch']}"
        )
        for name, text in rows.items():
            self.say(f"  {name:<10}{text}")

    def summary(
        self,
        run: Run,
        first_step: int,
        seconds: float,
        scores: Mapping[str, Any],
        saves: Sequence[SaveResult],
        run_dir: Path,
        speeds: Sequence[str],
    ) -> None:
        """How it ended, and where it lies."""
        steps = run.progress.step - first_step
        early = " (stopped early)" if run.stopping_early else ""
        speed = steps * run.batch_plan.batch_size / max(seconds, 1e-9)
        self.say(
            f"done: step {run.progress.step}{early}, {run.epoch:.1f} epochs, {timedelta(seconds=round(seconds))}, "
            f"{speed:,.0f} samples/s"
        )
        numbers = {name: value for name, value in scores.items() if isinstance(value, float)}
        if numbers:
            self.say("  " + "  ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
        for line in speeds:
            self.say(f"  {line}")
        if saves:
            blocking_s, write = (
                sorted(times)[len(saves) // 2]
                for times in ([s.blocking_s for s in saves], [s.write_s for s in saves])
            )
            self.say(
                f"  {len(saves)} checkpoint(s) of {decimal(saves[-1].size)} a rank: {blocking_s:.3f} s of waiting, "
                f"{write:.2f} s of writing behind the training"
            )
        if run.progress.best is not None:
            self.say(
                f"  best eval/{run.recipe.monitor} {run.progress.best:.4f} at step {run.progress.best_step}"
            )
        self.say(f"  weights {run_dir / 'model.safetensors'}")


def speed_of(line: Mapping[str, Any]) -> str:
    """In what the recipe counts."""
    *_, unit = (name.removesuffix("_per_second") for name in line if name.endswith("_per_second"))
    return f"{line[f'{unit}_per_second']:,.0f} {unit}/s"


def device_name(device: str) -> str:
    """The device in words."""
    import torch

    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} thread(s) a rank"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def way_of(run: Run) -> str:
    """How the training data come to the step."""
    many = run.workers(run.splits.train)
    if many:
        return f"read by {many} process(es) a rank"
    if not isinstance(run.splits.train, InMemoryDataset):
        return "read one by one in the step"
    return f"read in place{', on the GPU' if lies_on_gpu(run.splits.train) else ''}"


def extras(run: Run) -> list[str]:
    """What was switched on beside the strategy."""
    config = run.config
    chosen = {
        f"activation checkpointing {config.activation_checkpointing}": config.activation_checkpointing
        != "none",
        "compiled"
        if config.compile in (True, "default")
        else f"compiled for {config.compile}": config.compile,
        f"gradients reduced in {config.ddp.compress}": config.ddp.compress != "none",
        f"clip_norm {config.clip_norm}": config.clip_norm,
        f"clip_value {config.clip_value}": config.clip_value,
        "sync_batchnorm": config.sync_batchnorm,
    }
    return [words for words, on in chosen.items() if on]
