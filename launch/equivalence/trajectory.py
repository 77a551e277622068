"""A few steps of a run, seen closely: losses, gradient norms, weights. What `parity` compares; it starts this
file itself.

torchrun ... launch/equivalence/trajectory.py FOLDER     runs each case of FOLDER/cases.json and leaves
FOLDER/CASE.safetensors
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.cli.resolve import resolve
from launch.equivalence.whole_model import fingerprints, whole_model
from launch.runtime.rendezvous import process_group
from launch.runtime.world import World, find_world
from launch.state.build import prepare
from launch.state.run import Run
from launch.training.loop import set_learning_rate, train_step

NOISE = 1e-7
"""an element whose gradient stays below this share of the whole gradient norm has none but rounding noise,
one that is exactly zero not even that
"""


def main(folder: Path) -> None:
    """Run the cases, one after the other, in one set of processes: DeepSpeed takes seconds to import."""
    asked: dict[str, Any] = json.loads((folder / "cases.json").read_text())
    world = find_world(os.environ)
    with process_group(world, "single" if world.world_size == 1 else "ddp") as world:
        for name, words in asked["cases"].items():
            trace = follow(words, asked["steps"], world)
            if world.rank == 0:
                from safetensors.torch import save_file

                save_file(trace, folder / f"{name}.safetensors")


def follow(words: list[str], steps: int, world: World) -> dict[str, Tensor]:
    """The trace of the first `steps` of the run that `words` describe; complete on rank zero.

    `loss/MODEL` and `norm/MODEL` are [steps]; `weights/NAME` the final values; `print/NAME` [steps] a
    fingerprint of each parameter after each step; `noise/NAME` (single only) marks the elements without a
    true gradient, where there are any.
    """
    run = prepare(resolve(words, world), world)
    run.stop_at = steps
    shares = watch_gradients(run) if world.world_size == 1 else {}
    losses: dict[str, list[Tensor]] = {}
    norms: dict[str, list[Tensor]] = {}
    prints: dict[str, list[Tensor]] = {}
    for batches in run.train_steps():
        set_learning_rate(run)
        step_losses, step_norms = train_step(run, batches)
        run.progress.step += 1
        for name, loss in run.reduced_losses(step_losses).items():
            losses.setdefault(name, []).append(loss.cpu())
            norms.setdefault(name, []).append(step_norms[name].detach().double().cpu())
        run.statistics.synchronize(world)
        for model, strategy in run.strategies.items():
            for name, value in fingerprints(strategy, world).items():
                prints.setdefault(f"{model}.{name}", []).append(value)
    trace = {f"loss/{name}": torch.stack(values) for name, values in losses.items()}
    trace |= {f"norm/{name}": torch.stack(values) for name, values in norms.items()}
    trace |= {f"print/{name}": torch.stack(values) for name, values in prints.items()}
    trace |= {f"weights/{name}": tensor for name, tensor in weights(run).items()}
    trace |= {
        f"noise/{name}": noise
        for name, share in shares.items()
        if (noise := (share > 0) & (share < NOISE)).any()
    }
    return trace


def weights(run: Run) -> dict[str, Tensor]:
    """Parameters and statistics of all models by MODEL.NAME; on rank zero. Counters of batches are left out."""
    return {
        f"{model}.{name}": tensor
        for model, strategy in run.strategies.items()
        for name, tensor in whole_model(strategy, run.world).items()
        if tensor.is_floating_point()
    }


def watch_gradients(run: Run) -> dict[str, Tensor]:
    """For each element of a single process's parameters, the largest share of the gradient norm that it had
    in any step.
    """
    shares: dict[str, Tensor] = {}

    def look(model: str) -> None:
        gradients = {
            f"{model}.{name}": p.grad.cpu().abs()
            for name, p in run.strategies[model].module.named_parameters()
            if p.grad is not None
        }
        whole = nn.utils.get_total_norm(gradients.values())
        for name, gradient in gradients.items():
            shares[name] = (
                torch.maximum(shares[name], gradient / whole) if name in shares else gradient / whole
            )

    for model in run.recipe.losses():
        run.strategies[model].optimizer.register_step_pre_hook(lambda *_, model=model: look(model))
    return shares


if __name__ == "__main__":
    main(Path(sys.argv[1]))
