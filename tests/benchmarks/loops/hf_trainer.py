"""The Trainer of Hugging Face's transformers, which owns the loop."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

from tests.benchmarks.loops import CLIP_NORM, Setting
from tests.benchmarks.loops.raw_strategies import deepspeed_config
from tests.benchmarks.loops.workloads import Workload

BARE: dict[str, Any] = {
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,
}


class Training(Trainer):  # type: ignore[misc]  # its types are not read: it need not be installed
    """A workload as a Trainer: loss, optimizer and order are its documented points of extension."""

    workload: Workload
    indices: list[int]

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        """Of the workload."""
        return self.workload.mean_loss(model, (inputs["inputs"], inputs["targets"]))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Of the workload."""
        self.optimizer = self.workload.build_optimizer(self.model if model is None else model)
        return self.optimizer

    def _get_train_sampler(self, *_: Any) -> Any:
        return self.indices


def run(workload: Workload, steps: int, setting: Setting) -> None:
    """Accelerate deals whole micro-batches to the ranks in turn: the same division of a batch."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    arguments = TrainingArguments(
        output_dir=str(setting.folder),
        use_cpu=not setting.stage,  # as Accelerate's `cpu`
        ddp_backend="gloo" if setting.ranks > 1 else None,
        max_steps=steps,
        per_device_train_batch_size=workload.batch // setting.ranks,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP_NORM,
        remove_unused_columns=False,
        # by default after 500 steps, and at the end: after the last stamp, and tied weights make it fail
        save_strategy="no",
        **strategy(workload, setting),
        **(BARE if setting.bare else {}),
    )
    training = Training(
        workload.initial_model(),
        arguments,
        train_dataset=workload.build_data().train,
        data_collator=list_named,
    )
    training.workload = workload
    training.indices = workload.order(steps).flatten().tolist()
    training.train()


def list_named(samples: list[Any]) -> dict[str, Tensor]:
    """A batch by name: the Trainer takes no other."""
    inputs, targets = default_collate(samples)
    return {"inputs": inputs, "targets": targets}


def strategy(workload: Workload, setting: Setting) -> dict[str, Any]:
    """The arguments that stand for the strategy."""
    if setting.strategy == "fsdp":
        blocks = [type(block).__name__ for block in workload.blocks(workload.build_model())]
        return {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": blocks[:1]},
        }
    if setting.stage:
        return {"deepspeed": {**deepspeed_config(setting.stage), "train_micro_batch_size_per_gpu": "auto"}}
    return {}
