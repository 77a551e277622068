"""When a loss or a gradient is NaN or infinite: agree over all ranks, and name the first thing that went bad."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from launch.data.batch import tensors_of
from launch.runtime.collectives import first_error
from launch.runtime.seeding import seed_device

if TYPE_CHECKING:
    from launch.state.run import Run
    from recipes.parts.data import Batch
    from strategies.base import Strategy


class NonFinite(RuntimeError):
    """A loss or gradient that is no number; its message is the verdict, the same on all ranks."""


def check_loss(run: Run, name: str, loss: Tensor, batches: list[Batch]) -> bool:
    """Whether `loss` (the mean over the global batch, the same on all ranks) is finite.

    If not: False for a recipe that leaves such steps out, else NonFinite with the culprit.
    """
    if math.isfinite(loss):
        return True
    if run.recipe.skip_nonfinite:
        return False
    raise NonFinite(
        f"the loss is {float(loss)} at step {run.progress.step + 1}: {find_culprit(run, name, batches)}. "
        "A lower learning rate, clip_norm=1.0 or precision=fp32 often helps"
    )


def check_gradients(run: Run, name: str, norm: Tensor) -> None:
    """Raise NonFinite for a gradient norm that is no number; under fp16 such a step was skipped and the scale
    lowered.
    """
    if run.config.precision != "fp16" and not math.isfinite(norm):
        bad = first_nonfinite_parameter(run.strategies[name])
        bad = bad and f"{name}.{bad}"
        raise NonFinite(
            f"the gradient norm is {float(norm)} at step {run.progress.step + 1}, the loss being finite; "
            f"first parameter spoiled by it: {first_error(bad or '') or 'none on any rank'}"
        )


def find_culprit(run: Run, name: str, batches: list[Batch]) -> str:
    """Repeat the forward passes of the step and name the rank and the first input, parameter or module that
    is not finite.

    Every rank calls it: under FSDP and ZeRO-3 a forward pass is a collective.
    """
    found: str | None = None
    for micro_step, batch in enumerate(batches):
        seed_device(
            run.config.seed, "step", run.progress.step, name, run.batch_plan.micro_batch_index(micro_step)
        )
        seen: list[str] = []
        modules = {
            n: held.module for n, held in run.strategies.items()
        }  # unwrapped: the names that the user knows
        with torch.no_grad(), watched(modules, seen), run.strategies[name].inference():
            loss = run.recipe.losses()[name](run.models, batch)
        if found is None and not bool(loss.isfinite()):
            inputs = None if all_finite(batch) else "its input batch"
            parameters = [
                f"{n}.{p}" for n, s in run.strategies.items() if (p := first_nonfinite_parameter(s))
            ]
            blame = inputs or (
                f"parameter {parameters[0]}" if parameters else seen[0] if seen else "the recipe's loss"
            )
            found = f"micro-batch {micro_step} of rank {run.world.rank}, first in {blame}"
    return first_error(found or "") or "not seen again when the step was repeated"


def first_nonfinite_parameter(strategy: Strategy) -> str | None:
    """The first parameter that holds a value that is not finite, as far as this rank writes it. Not collective."""
    state = strategy.state()
    for name, _ in strategy.module.named_parameters():
        part = state.get(f"model/{name}")
        if part is not None and not bool(part.values.isfinite().all()):
            return name
    return None


@contextmanager
def watched(models: dict[str, nn.Module], seen: list[str]) -> Iterator[None]:
    """Note in `seen`, in order, the modules whose output is not finite: innermost and earliest first."""
    handles = []
    for model_name, model in models.items():
        for name, module in model.named_modules():

            def note(
                module: nn.Module, _: Any, output: Any, name: str = name, model_name: str = model_name
            ) -> None:
                if not all_finite(output):
                    seen.append(f"module {model_name}{name and '.'}{name} ({type(module).__name__})")

            handles.append(module.register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def all_finite(value: Any) -> bool:
    """Whether all floating-point tensors in `value` hold finite numbers only."""
    return all(
        not tensor.is_floating_point() or bool(tensor.isfinite().all()) for tensor in tensors_of(value)
    )


def check_late(run: Run, step: int, loss: float) -> None:
    """Raise NonFinite for a loss that was read an interval after its step, when its batches are gone."""
    if not run.sync_every_step and not math.isfinite(loss):
        bad = [f"{n}.{p}" for n, s in run.strategies.items() if (p := first_nonfinite_parameter(s))]
        raise NonFinite(
            f"the loss is {loss} at step {step}; first bad parameter by step {run.progress.step}: "
            f"{first_error(bad[0] if bad else '') or 'none'}. debug=true, or log.every=1, shows the module"
        )
