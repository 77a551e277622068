"""The loop that a careful person writes by hand, with each backend's own interface and defaults."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from recipes.base import Recipe
from strategies.deepspeed_compat import load_deepspeed
from tests.benchmarks.loops import CLIP_NORM, Setting
from tests.benchmarks.loops.workloads import Workload


def run(workload: Workload, steps: int, setting: Setting) -> None:
    """Unless it is to be bare, loss and norm are read once in ten steps, as one would for a line on the
    screen.
    """
    loader = workload.loader(steps, setting)
    model, optimizer = wrap_model(
        workload, workload.initial_model(), setting.strategy, workload.batch // setting.ranks
    )
    for step, batch in enumerate(loader, 1):
        loss = workload.mean_loss(model, batch)
        if setting.stage:  # the engine clips and zeroes
            model.backward(loss)
            model.step()
            norm = model.get_global_grad_norm()
        else:
            loss.backward()  # type: ignore[no-untyped-call]  # torch has left it so
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0 and not setting.bare:
            loss.item(), float(norm)


def wrap_model(recipe: Recipe, module: nn.Module, strategy: str, micro_batch: int) -> tuple[Any, Optimizer]:
    """The model to call, and the optimizer. Under ZeRO the model is DeepSpeed's engine, which does all."""
    if strategy == "ddp":
        module = DistributedDataParallel(module)
    elif strategy == "fsdp":
        for block in recipe.blocks(module):
            fully_shard(block)
        fully_shard(module)
    optimizer = recipe.build_optimizer(module)
    if not strategy.startswith("zero"):
        return module, optimizer
    config = {**deepspeed_config(int(strategy[4:])), "train_micro_batch_size_per_gpu": micro_batch}
    device = next(module.parameters()).device
    engine, *_ = load_deepspeed(device).initialize(model=module, optimizer=optimizer, config=config)
    return engine, optimizer


def deepspeed_config(stage: int) -> dict[str, Any]:
    """The least that DeepSpeed wants to be told."""
    return {
        "gradient_clipping": CLIP_NORM,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
