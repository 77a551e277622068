"""The overfit check of `debug=true`: can one batch be learned by heart? If not, something between data,
model,
loss and optimizer does not fit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launch.runtime.seeding import seed_device
from launch.training.loop import others_frozen
from recipes.base import local_num_items

if TYPE_CHECKING:
    from launch.state.run import Run
    from recipes.parts.data import Batch
    from strategies.base import Strategy

MAX_STEPS, MAX_SECONDS = 100, 20.0
"""the check ends after whichever comes first"""
DONE, LEARNED, FALLING = 0.99, 0.9, 0.3
"""the fraction of the first loss that must be gone to end the check at once, for `it can be overfitted`, and
for `it falls`
"""
ENOUGH_STEPS = 20
"""without a fall in so many steps, it can not be overfitted"""


def overfit(run: Run, batch: Batch) -> Iterator[str]:
    """Train on one micro-batch and say what came of it: a model, loss and optimizer that belong together
    learn it by heart.
    """
    losses = run.recipe.losses()
    if len(losses) > 1:
        names = " and ".join(losses)
        yield f"one batch: the overfit check does not apply: {names} each have a loss of their own"
        return
    (name, loss_function), *_ = losses.items()
    strategy, count = run.strategies[name], max(float(local_num_items(run.recipe, batch)), 1.0)
    for group in strategy.optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    values: list[float] = []
    norm, untouched = 0.0, list[str]()
    deadline = time.monotonic() + MAX_SECONDS
    while len(values) <= MAX_STEPS and (time.monotonic() < deadline or len(values) < 3):
        # the same seed each time: with a fixed dropout mask a network can learn a batch by heart, too
        seed_device(run.config.seed, "debug")
        with others_frozen(run, strategy), strategy.micro_batch(last=True):
            loss = loss_function(run.models, batch)
            values.append(float(loss.detach()) / count)
            if fraction_gone(values) >= DONE or not loss.requires_grad or not loss.isfinite():
                break
            strategy.backward(loss / count)
        untouched = untouched or without_gradient(strategy)
        norm = max(norm, float(strategy.step()))
    yield from outcome(values, norm, strategy)
    if untouched:
        more = f" and {len(untouched) - 5} more" if len(untouched) > 5 else ""
        yield f"  no gradient reaches {', '.join(untouched[:5])}{more}: is it used?"


def fraction_gone(values: list[float]) -> float:
    """The fraction of the first loss that is gone; 1 is all of it."""
    return (values[0] - values[-1]) / max(abs(values[0]), 1e-12)


def without_gradient(strategy: Strategy) -> list[str]:
    """Trainable parameters that the backward pass did not reach; none where the backend keeps gradients
    elsewhere (ZeRO).
    """
    trainable = {name: p for name, p in strategy.module.named_parameters() if p.requires_grad}
    missing = [name for name, p in trainable.items() if p.grad is None]
    return missing if len(missing) < len(trainable) else []


def outcome(values: list[float], norm: float, strategy: Strategy) -> Iterator[str]:
    """The lines of the outcome: good, undecided, or bad with what to look at."""
    steps = len(values) - 1
    head = f"one batch: loss {values[0]:.4g} -> {values[-1]:.4g} in {steps} steps"
    rates = ", ".join(
        f"{rate:.3g}" for rate in dict.fromkeys(g["initial_lr"] for g in strategy.optimizer.param_groups)
    )
    if fraction_gone(values) >= LEARNED:
        yield f"{head}: it can be overfitted"
    elif fraction_gone(values) >= FALLING:
        yield f"{head}: it falls, but the batch is not learned by heart yet"
        yield (
            "  more steps may do it; or the loss has a floor (label smoothing, noise); or the learning rate "
            "does not "
            "fit"
        )
    elif steps < ENOUGH_STEPS and norm > 0 and math.isfinite(values[-1]):
        yield f"{head}: it is too early to say, {MAX_SECONDS:.0f} seconds were not enough"
    elif norm == 0:
        yield f"{head}: it can NOT be overfitted, no gradient reaches the parameters"
        yield (
            "  look at the loss: is it computed from the output of the model, without detach(), item(), "
            "argmax or "
            "no_grad?"
        )
    elif not fraction_gone(values) > -1:  # also if it is not a number
        yield f"{head}: it can NOT be overfitted, the loss grows"
        yield (
            f"  look at the learning rate ({rates}), at the sign of the loss, and at the scale of inputs and "
            "initial "
            "weights"
        )
    else:
        yield f"{head}: it can NOT be overfitted"
        yield (
            f"  look at the learning rate ({rates}), at whether targets belong to their inputs and inputs "
            "differ at "
            "all,"
        )
        yield f"  and at what is trained (greatest gradient norm {norm:.3g})"
