"""Lightning's Trainer, which owns the loop."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from tests.benchmarks.loops import CLIP_NORM, Setting
from tests.benchmarks.loops.raw_strategies import deepspeed_config
from tests.benchmarks.loops.workloads import Workload

BARE = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Module(LightningModule):  # type: ignore[misc]  # its types are not read: it need not be installed
    """A workload as a LightningModule."""

    def __init__(self, workload: Workload, setting: Setting) -> None:
        super().__init__()
        self.workload, self.setting = workload, setting
        self.model = workload.initial_model()

    def configure_model(self) -> None:
        """Called when the mesh is there."""
        if self.setting.strategy == "fsdp":
            mesh = self.device_mesh["data_parallel"]
            for block in self.workload.blocks(self.model):
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Any, index: int) -> Tensor:  # noqa: ARG002
        """Its first example logs the loss."""
        loss = self.workload.mean_loss(self.model, batch)
        if not self.setting.bare:
            self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Optimizer:
        """Of the workload."""
        return self.workload.build_optimizer(self.model)


def run(workload: Workload, steps: int, setting: Setting) -> None:
    """Order and cut are given: its own sampler would shuffle."""
    trainer = Trainer(
        accelerator="cpu",
        devices=setting.ranks,
        strategy=strategy(setting),
        max_steps=steps,
        gradient_clip_val=CLIP_NORM,
        use_distributed_sampler=False,
        default_root_dir=setting.folder,
        **(BARE if setting.bare else {}),
    )
    trainer.fit(Module(workload, setting), workload.loader(steps, setting))


def strategy(setting: Setting) -> Any:
    """The strategy of Lightning that stands for ours."""
    if setting.strategy == "fsdp":
        return ModelParallelStrategy(data_parallel_size=setting.ranks, tensor_parallel_size=1)
    if setting.stage:
        return DeepSpeedStrategy(config=deepspeed_config(setting.stage))
    return "auto" if setting.ranks == 1 else "ddp"
