"""The training loop. It reads like the textbook's, and knows of no backend, launcher or file format."""

from __future__ import annotations

import gc
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from launch.checkpoint.writer import SaveError
from launch.reporting.metrics import failed_save_message
from launch.runtime.collectives import AsyncSum, all_reduce_sum
from launch.runtime.seeding import seed_device
from launch.training.evaluate import evaluate
from launch.watchdog.nonfinite import check_gradients, check_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launch.checkpoint.writer import CheckpointWriter
    from launch.reporting.metrics import Metrics
    from launch.state.run import Run
    from launch.training.stop_and_save import Requests
    from recipes.parts.data import Batch
    from strategies.base import Strategy


def train(run: Run, metrics: Metrics, checkpoints: CheckpointWriter, requests: Requests) -> None:
    """Train from `run.progress.step` to the end, or until the ranks agree to stop: `requests.stop`.

    Collective, as all that it calls.
    """
    if run.progress.unevaluated:
        validate(run, metrics, requests)
    if not (run.stopping_early or requests.stop):
        training_loop(run, metrics, checkpoints, requests)


def training_loop(run: Run, metrics: Metrics, checkpoints: CheckpointWriter, requests: Requests) -> None:
    """Step by step; validate, save and stop between them."""
    with manual_gc():
        for batches in metrics.timer.data(run.train_steps()):
            lr = set_learning_rate(run)
            losses, grad_norms = train_step(run, batches)
            run.progress.step += 1
            metrics.step(losses, grad_norms, lr)
            between_steps(run, metrics, checkpoints)
            if run.eval_due:
                validate(run, metrics, requests)
            requests.exchange()
            if run.checkpoint_due or requests.save or requests.stop:
                save(run, metrics, checkpoints, requests)
            if run.stopping_early or requests.stop:
                break
            run.phase.enter("data")


def train_step(run: Run, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One optimizer step of each trained model, on `batches` on its device: (losses, gradient norms) by name.

    A loss is this rank's part of the mean over the global batch; under `run.sync_every_step` the mean itself.
    A step that was skipped has no norm.
    """
    run.phase.step, run.phase.batches = run.progress.step + 1, batches
    items = global_num_items(run, batches)  # an all-reduce, under way while forward runs
    losses: dict[str, Tensor] = {}
    grad_norms: dict[str, Tensor] = {}
    for name, loss_function in run.recipe.losses().items():
        strategy = run.strategies[name]
        loss_sum = torch.zeros((), dtype=torch.float64, device=run.world.device)
        for micro_step, batch in enumerate(batches):
            seed_device(
                run.config.seed, "step", run.progress.step, name, run.batch_plan.micro_batch_index(micro_step)
            )
            run.statistics.set_momentum(micro_step, len(batches))
            is_last = micro_step == len(batches) - 1
            with others_frozen(run, strategy), strategy.micro_batch(last=is_last):
                run.phase.enter("forward")
                loss = loss_function(run.models, batch)
                run.phase.enter("backward")
                num_items = items.wait()
                with run.backward_context(loss):
                    strategy.backward(loss / num_items)
            loss_sum += loss.detach()
        losses[name] = loss_sum / num_items
        if run.sync_every_step and not check_loss(run, name, all_reduce_sum(losses[name]), batches):
            strategy.step(apply=False)
            continue
        run.phase.enter("step")
        grad_norms[name] = strategy.step()
        if run.sync_every_step:
            check_gradients(run, name, grad_norms[name])
    return losses, grad_norms


def set_learning_rate(run: Run) -> float:
    """Give each parameter group its learning rate for the coming step; returns that of the first group."""
    factor = run.recipe.schedule.factor(run.progress.step, run.total_steps) * run.progress.plateau.scale
    groups = [g for name in run.recipe.losses() for g in run.strategies[name].optimizer.param_groups]
    for group in groups:
        group["lr"] = group["initial_lr"] * factor
    return float(groups[0]["lr"])


def validate(run: Run, metrics: Metrics, requests: Requests) -> None:
    """Evaluate on the validation split; one that a stop interrupts is repeated by the resumed run."""
    assert run.splits.val is not None
    metrics.flush()
    run.progress.unevaluated = True
    if (scores := evaluate(run, run.splits.val, requests)) is None:
        return
    run.progress.unevaluated = False
    metrics.evaluation(scores)
    value = float(scores[run.recipe.monitor])
    run.progress.observe(value, run.recipe.monitor_mode, run.config.eval.min_delta)
    gc.collect()
    metrics.timer.restart()


def save(run: Run, metrics: Metrics, checkpoints: CheckpointWriter, requests: Requests) -> None:
    """Save a checkpoint, in the background but for a copy."""
    metrics.flush()
    run.phase.enter("save")
    metrics.checkpoint(checkpoints.save())  # the outcome of the save before, if it was still in flight
    requests.saved()
    metrics.timer.restart()


def finish(run: Run, metrics: Metrics, checkpoints: CheckpointWriter, requests: Requests) -> None:
    """The end of training: every step is written, the last checkpoint committed. Collective.

    Raises SaveError if it could not be.
    """
    metrics.flush()
    run.phase.enter("save")
    requests.close()
    last = checkpoints.wait()
    if last is not None and last.error:
        raise SaveError(failed_save_message(last))
    metrics.checkpoint(last)


def between_steps(run: Run, metrics: Metrics, checkpoints: CheckpointWriter) -> None:
    """What is done on all ranks at the same steps, so that none waits for another in the midst of one."""
    if metrics.timer.steps == 1:
        checkpoints.reserve()  # the optimizer has its state now
    metrics.checkpoint(checkpoints.poll())
    if run.log_due:
        gc.collect(1)  # the young generations; all of them with each validation


@contextmanager
def manual_gc() -> Iterator[None]:
    """Without Python's garbage collector, which would stop one rank in the midst of a step while the others
    wait for it; `between_steps` collects.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def others_frozen(run: Run, trained: Strategy) -> Iterator[None]:
    """While one model of several is trained, the others are called but take no gradient."""
    with ExitStack() as stack:
        for strategy in run.strategies.values():
            if strategy is not trained:
                stack.enter_context(strategy.frozen())
        yield


def global_num_items(run: Run, batches: list[Batch]) -> NumItems:
    """Start to count what the losses of this step sum over, on all ranks and micro-batches.

    Collective where the recipe counts items in each batch; the all-reduce runs while forward does.
    """
    counts = [count for batch in batches if (count := run.recipe.num_items(batch)) is not None]
    if not counts:  # the same for each sample, and a global batch is always full
        return NumItems(run.batch_plan.batch_size * run.recipe.items_per_sample())
    if len(counts) < len(batches):
        raise ValueError(
            f"{type(run.recipe).__name__}.num_items gave a number for one batch and None for another; "
            "give a number for each, or None for all"
        )
    local = sum(counts)
    if run.world.world_size == 1 and not isinstance(local, Tensor):
        return NumItems(max(local, 1))
    total = torch.zeros((), dtype=torch.float64, device=run.world.device) + local
    return NumItems(AsyncSum(total))


class NumItems:
    """The number of items in a global batch: known, or an all-reduce under way."""

    def __init__(self, value: int | AsyncSum) -> None:
        self.value = value

    def wait(self) -> int | Tensor:
        """The number; waits for the all-reduce."""
        return self.value if isinstance(self.value, int) else self.value.wait().clamp(min=1)
