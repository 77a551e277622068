"""Accelerate: the raw loop with `prepare`, `backward` and `clip_grad_norm_`."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState

from tests.benchmarks.loops import CLIP_NORM, Setting
from tests.benchmarks.loops.raw_strategies import deepspeed_config
from tests.benchmarks.loops.workloads import Workload


def run(workload: Workload, steps: int, setting: Setting) -> None:
    """Accelerate deals whole micro-batches to the ranks in turn: the same division of a batch."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # with `cpu` it drops DeepSpeed in silence; without it takes itself for a single process: the
    # ranks get the same data
    accelerator = Accelerator(cpu=not setting.stage, **plugins(workload, setting))
    model = workload.initial_model()
    loader = workload.loader(steps, setting, batch_plan=False)
    model, optimizer, loader = accelerator.prepare(model, workload.build_optimizer(model), loader)
    for step, batch in enumerate(loader, 1):
        loss = workload.mean_loss(model, batch)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and not setting.bare:
            loss.item(), float(norm)


def plugins(workload: Workload, setting: Setting) -> dict[str, Any]:
    """The plugin that stands for the strategy."""
    if setting.strategy == "fsdp":
        blocks = {type(block).__name__ for block in workload.blocks(workload.build_model())}
        policy: dict[str, Any] = (
            {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": list(blocks)}
            if blocks
            else {}
        )
        return {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2, **policy)}
    if setting.stage:
        config = {**deepspeed_config(setting.stage), "train_micro_batch_size_per_gpu": "auto"}
        return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}
    return {}
