"""Losses, gradient norms and weights of the first steps of a run: what `rankzero parity` compares. It starts
this file itself:

    torchrun ... launch/equivalence/trajectory.py FOLDER

runs each case of FOLDER/cases.json and writes FOLDER/CASE.safetensors.
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

NOISE_SHARE = 1e-7
"""an element whose gradient stays below this share of the whole gradient norm has none but rounding noise;
one whose gradient is exactly zero has not even that
"""


def main(folder: Path) -> None:
    """Run the cases, one after the other, in one set of processes: DeepSpeed takes seconds to import."""
    content: dict[str, Any] = json.loads((folder / "cases.json").read_text())
    world = find_world(os.environ)
    with process_group(world, "single" if world.world_size == 1 else "ddp") as world:
        for name, argv in content["cases"].items():
            trajectory = follow(argv, content["steps"], world)
            if world.rank == 0:
                from safetensors.torch import save_file

                save_file(trajectory, folder / f"{name}.safetensors")


def follow(argv: list[str], steps: int, world: World) -> dict[str, Tensor]:
    """The trajectory of the first `steps` of a run; complete on rank zero. Collective.

    `loss/MODEL` and `norm/MODEL` are [steps]; `weights/NAME` the final values; `fingerprint/NAME` [steps] one
    number for each parameter after each step; `noise/NAME` (single process only) marks the elements without a
    true gradient, where there are any.
    """
    run = prepare(resolve(argv, world), world)
    run.stop_at = steps
    gradient_shares = record_gradient_shares(run) if world.world_size == 1 else {}
    series: dict[str, list[Tensor]] = {}
    for batches in run.train_steps():
        set_learning_rate(run)
        losses, norms = train_step(run, batches)
        run.progress.step += 1
        for name, loss in run.reduced_losses(losses).items():
            series.setdefault(f"loss/{name}", []).append(loss.cpu())
            series.setdefault(f"norm/{name}", []).append(norms[name].detach().double().cpu())
        run.statistics.synchronize(world)
        for model, strategy in run.strategies.items():
            for name, value in fingerprints(strategy, world).items():
                series.setdefault(f"fingerprint/{model}.{name}", []).append(value)
    trajectory = {name: torch.stack(values) for name, values in series.items()}
    trajectory |= {f"weights/{name}": tensor for name, tensor in final_weights(run).items()}
    for name, share in gradient_shares.items():
        noise = (share > 0) & (share < NOISE_SHARE)
        if noise.any():
            trajectory[f"noise/{name}"] = noise
    return trajectory


def final_weights(run: Run) -> dict[str, Tensor]:
    """Parameters and statistics of all models by MODEL.NAME; on rank zero. Counters of batches are left out.
    Collective.
    """
    return {
        f"{model}.{name}": tensor
        for model, strategy in run.strategies.items()
        for name, tensor in whole_model(strategy, run.world).items()
        if tensor.is_floating_point()
    }


def record_gradient_shares(run: Run) -> dict[str, Tensor]:
    """For each element of a single process's parameters, the largest share of the gradient norm that it has
    in any step: filled as steps are made.
    """
    shares: dict[str, Tensor] = {}

    def record(model: str) -> None:
        gradients = {
            f"{model}.{name}": p.grad.cpu().abs()
            for name, p in run.strategies[model].module.named_parameters()
            if p.grad is not None
        }
        norm = nn.utils.get_total_norm(gradients.values())
        for name, gradient in gradients.items():
            share = gradient / norm
            shares[name] = torch.maximum(shares[name], share) if name in shares else share

    for model in run.recipe.losses():
        run.strategies[model].optimizer.register_step_pre_hook(lambda *_, model=model: record(model))
    return shares


if __name__ == "__main__":
    main(Path(sys.argv[1]))
