"""NaN or infinity in a loss or gradient: all ranks agree, and name the first thing that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from launch.data.batch import tensors_of
from launch.runtime.collectives import all_gather_rows, first_error
from launch.runtime.seeding import seed_device

if TYPE_CHECKING:
    from launch.state.run import Run
    from recipes.parts.data import Batch
    from strategies.base import Strategy


class NonFinite(RuntimeError):
    """A loss or gradient norm that is NaN or infinite; its message is the same on all ranks."""


def check_loss(run: Run, name: str, loss: Tensor, batches: list[Batch]) -> bool:
    """Whether `loss` (the mean over the global batch, the same on all ranks) is finite.

    If not: False for a recipe that skips such steps, else raises NonFinite with the culprit (collective).
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
    """Raise NonFinite for a gradient norm that is not finite. Collective if it is not.

    Under fp16 such a step was skipped, and the loss scale lowered: that is no failure.
    """
    if run.config.precision != "fp16" and not math.isfinite(norm):
        parameter = first_nonfinite_parameter({name: run.strategies[name]})
        raise NonFinite(
            f"the gradient norm is {float(norm)} at step {run.progress.step + 1}, the loss being finite; "
            f"first parameter spoiled by it: {parameter or 'none on any rank'}"
        )


def find_culprit(run: Run, name: str, batches: list[Batch]) -> str:
    """Repeat the forward passes of the step; name the rank and the first input, parameter or module.

    Collective: under FSDP and ZeRO-3 a forward pass is.
    """
    modules = {model: strategy.module for model, strategy in run.strategies.items()}  # with the user's names
    parameter = first_nonfinite_parameter(run.strategies)
    culprit = ""
    for micro_step, batch in enumerate(batches):
        seed_device(
            run.config.seed, "step", run.progress.step, name, run.batch_plan.micro_batch_index(micro_step)
        )
        nonfinite_modules: list[str] = []
        with (
            torch.no_grad(),
            record_nonfinite_outputs(modules, nonfinite_modules),
            run.strategies[name].inference(),
        ):
            loss = run.recipe.losses()[name](run.models, batch)
        if culprit or bool(loss.isfinite()):
            continue
        if not all_finite(batch):
            first = "its input batch"
        elif parameter is not None:
            first = f"parameter {parameter}"
        else:
            first = nonfinite_modules[0] if nonfinite_modules else "the recipe's loss"
        culprit = f"micro-batch {micro_step} of rank {run.world.rank}, first in {first}"
    return first_error(culprit) or "not seen again when the step was repeated"


def first_nonfinite_parameter(strategies: Mapping[str, Strategy]) -> str | None:
    """MODEL.NAME of the first parameter that holds a value that is not finite, on any rank. Collective."""
    names: list[str] = []
    local_first: int | None = None
    for model, strategy in strategies.items():
        state = strategy.state()  # each element lies in the state of exactly one rank
        for name, _ in strategy.module.named_parameters():
            part = state.get(f"model/{name}")
            if local_first is None and part is not None and not bool(part.values.isfinite().all()):
                local_first = len(names)
            names.append(f"{model}.{name}")
    first = all_gather_rows(torch.tensor([len(names) if local_first is None else local_first])).min()
    return names[int(first)] if first < len(names) else None


@contextmanager
def record_nonfinite_outputs(models: dict[str, nn.Module], names: list[str]) -> Iterator[None]:
    """Append to `names` the modules whose output is not finite, in order: innermost and earliest first."""
    handles = []
    for model_name, model in models.items():
        for name, module in model.named_modules():

            def note(
                module: nn.Module, _: Any, output: Any, name: str = name, model_name: str = model_name
            ) -> None:
                if not all_finite(output):
                    names.append(f"module {model_name}{name and '.'}{name} ({type(module).__name__})")

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
    """Raise NonFinite for a loss that was read after its step, when its batches are gone. Collective then."""
    if not run.sync_every_step and not math.isfinite(loss):
        parameter = first_nonfinite_parameter(run.strategies)
        raise NonFinite(
            f"the loss is {loss} at step {step}; first bad parameter by step {run.progress.step}: "
            f"{parameter or 'none'}. debug=true, or log.every=1, shows the module"
        )
