"""Lightning Fabric: the raw loop with `setup`, `backward` and `clip_gradients`."""

from __future__ import annotations

from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.benchmarks.loops import CLIP_NORM, Setting
from tests.benchmarks.loops.raw_strategies import deepspeed_config
from tests.benchmarks.loops.workloads import Workload


def run(workload: Workload, steps: int, setting: Setting) -> None:
    """Order and cut are given: its own sampler would shuffle."""
    fabric = Fabric(accelerator="cpu", devices=setting.ranks, strategy=strategy(workload, setting))
    fabric.launch()
    model = fabric.setup_module(workload.initial_model())
    optimizer = fabric.setup_optimizers(workload.build_optimizer(model))
    loader = fabric.setup_dataloaders(workload.loader(steps, setting), use_distributed_sampler=False)
    for step, batch in enumerate(loader, 1):
        loss = workload.mean_loss(model, batch)
        fabric.backward(loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and not setting.bare:
            loss.item(), float(norm)


def strategy(workload: Workload, setting: Setting) -> Any:
    """The strategy of Fabric that stands for ours."""

    def shard(model: nn.Module, mesh: Any) -> Any:
        for block in workload.blocks(model):
            fully_shard(block, mesh=mesh["data_parallel"])
        return fully_shard(model, mesh=mesh["data_parallel"])

    if setting.strategy == "fsdp":
        return ModelParallelStrategy(shard, data_parallel_size=setting.ranks, tensor_parallel_size=1)
    if setting.stage:
        return DeepSpeedStrategy(config=deepspeed_config(setting.stage))
    return "auto" if setting.ranks == 1 else "ddp"
