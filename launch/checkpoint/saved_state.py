"""What of a run goes into a checkpoint: the slices of tensors that this rank writes, and the manifest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from launch.checkpoint.manifest import Manifest
from launch.cli.keys import to_dict
from strategies.sharded_state import TensorSlice

if TYPE_CHECKING:
    from launch.state.run import Run


def slices_of(run: Run) -> dict[str, TensorSlice]:
    """The slices that this rank writes, by their names in the checkpoint. Not collective."""
    return {
        f"{model}/{name}": part
        for model, strategy in run.strategies.items()
        for name, part in strategy.state().items()
    }


def manifest_of(run: Run, versions: Mapping[str, str]) -> Manifest:
    """The manifest without its files and tensors, which are known only once they are written."""
    return Manifest(
        step=run.progress.step,
        samples=run.progress.step * run.batch_plan.batch_size,
        time=round(time.time(), 3),
        progress=run.progress.state(),
        config=to_dict(run.config) | to_dict(run.recipe),
        train_samples=len(run.splits.train),
        optimizers={name: strategy.layout.parameter_groups for name, strategy in run.strategies.items()},
        tied={name: strategy.layout.tied for name, strategy in run.strategies.items()},
        versions=dict(versions),
        writer={
            "strategy": run.config.strategy,
            "world_size": run.world.world_size,
            "local_world_size": run.world.local_world_size,
            "device": run.world.device.partition(":")[0],
            "launcher": run.world.launcher,
        },
    )
