"""May a run continue from a checkpoint? Only with the same keys, data, models and optimizers.

Strategy, number of ranks and what else does not change the loss curve may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launch.checkpoint.manifest import Manifest
from launch.checkpoint.reader import Checkpoint
from launch.cli.keys import flatten, to_dict
from launch.runtime.wording import shape_text
from launch.state.run import Run
from strategies import OPTIONS_GROUPS

MAY_CHANGE = {
    # where and how it runs
    "config",
    "run_dir",
    "resume",
    "init",
    "init_partial",
    "debug",
    "workers",
    "launcher",
    "max_time",
    "start_timeout",
    "hang_timeout",
    "chaos",
    # how it is spread over ranks
    "strategy",
    "micro_batch_size",
    "activation_checkpointing",
    "compile",
    *OPTIONS_GROUPS,
    # how far it goes, and what is recorded on the way
    "steps",
    "epochs",
    "checkpoint",
    "eval",
    "log",
}
"""keys, and groups of keys, that do not change what is computed, or only how far"""
MAX_CHANGES = 8
"""changes that the message lists"""


def check_compatible(checkpoint: Checkpoint, run: Run) -> None:
    """Raises ValueError with what has changed since the checkpoint, if the loss curve would not continue.

    Not collective: it compares what all ranks have alike.
    """
    manifest, folder = checkpoint.manifest, checkpoint.folder
    if manifest.config["recipe"] != run.config.recipe:
        raise ValueError(
            f"{folder} belongs to recipe={manifest.config['recipe']}, not {run.config.recipe}; "
            "choose another run_dir"
        )
    changes = [*changed_keys(manifest, run), *changed_data(manifest, run), *changed_models(checkpoint, run)]
    if changes:
        listed = "; ".join(changes[:MAX_CHANGES])
        if len(changes) > MAX_CHANGES:
            listed += f"; and {len(changes) - MAX_CHANGES} more"
        raise ValueError(
            f"{folder} was saved by another run than this, and the curve would not continue: {listed}. "
            f"Put it back, or start a new run (another run_dir) from its weights alone: init={folder}"
        )


def changed_keys(manifest: Manifest, run: Run) -> Iterator[str]:
    """The keys whose values have changed. A key that one of the two versions does not know is passed over."""
    may_change = MAY_CHANGE | set(run.recipe.resume_may_change)
    saved = dict(flatten(manifest.config))
    for name, value in flatten(to_dict(run.config) | to_dict(run.recipe)):
        if name in saved and saved[name] != value and not {name, name.partition(".")[0]} & may_change:
            yield f"{name}={saved[name]}, now {value}"


def changed_data(manifest: Manifest, run: Run) -> Iterator[str]:
    """Whether the training set has another size."""
    if manifest.train_samples != len(run.splits.train):
        yield f"{manifest.train_samples:,} training samples, now {len(run.splits.train):,}"


def changed_models(checkpoint: Checkpoint, run: Run) -> Iterator[str]:
    """What has changed in the models and optimizers that the recipe builds."""
    for model, strategy in run.strategies.items():
        saved = {
            name: shape for name, shape in checkpoint.of(model).shapes.items() if name.startswith("model/")
        }
        built = {name: shape for name, shape in strategy.layout.shapes.items() if 0 not in shape}
        for name in sorted(saved.keys() | built.keys()):
            if saved.get(name) != built.get(name):
                before, now = shape_or_missing(saved.get(name)), shape_or_missing(built.get(name))
                yield f"{model} {name.removeprefix('model/')}: {before}, now {now}"
        yield from changed_groups(
            model, checkpoint.manifest.optimizers.get(model, []), strategy.layout.parameter_groups
        )


def changed_groups(model: str, saved: list[dict[str, Any]], built: list[dict[str, Any]]) -> Iterator[str]:
    """What has changed in the parameter groups of one optimizer."""
    if len(saved) != len(built):
        yield f"{model}: {len(saved)} parameter groups, now {len(built)}"
        return
    for index, (old, new) in enumerate(zip(saved, built, strict=True)):
        where = f"{model} optimizer" + (f" group {index}" if len(built) > 1 else "")
        if old["optimizer"] != new["optimizer"]:
            yield f"{where}: {old['optimizer']}, now {new['optimizer']}"
            continue
        if old["parameters"] != new["parameters"]:
            yield f"{where} has other parameters"
        for key, value in new["settings"].items():
            if key in old["settings"] and old["settings"][key] != value:
                yield f"{where} {key}: {old['settings'][key]}, now {value}"


def shape_or_missing(shape: tuple[int, ...] | None) -> str:
    """A shape, or that there is none."""
    return "missing" if shape is None else shape_text(shape)
