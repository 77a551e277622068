"""Model FLOPs utilization (MFU): the floating-point operations of a step, and what the device can at most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from recipes.base import Recipe
    from recipes.parts.data import Batch

PEAK_FLOPS = {
    "H100 PCIe": {"bf16": 756e12, "fp16": 756e12, "tf32": 378e12, "fp32": 51.2e12},
    "H100 NVL": {"bf16": 835e12, "fp16": 835e12, "tf32": 417.5e12, "fp32": 60e12},
    "H100": {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "H200": {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "A10": {"bf16": 125e12, "fp16": 125e12, "tf32": 62.5e12, "fp32": 31.2e12},
    "L40S": {"bf16": 362e12, "fp16": 362e12, "tf32": 183e12, "fp32": 91.6e12},
    "L4": {"bf16": 121e12, "fp16": 121e12, "tf32": 60e12, "fp32": 30.3e12},
    "V100": {"fp16": 125e12, "fp32": 15.7e12},
    "T4": {"fp16": 65e12, "fp32": 8.1e12},
}
"""FLOP/s by a part of the device's name, the more special first: NVIDIA's data sheets, without sparsity"""


def count_flops(recipe: Recipe, batch: Batch) -> float | None:
    """Floating-point operations of one micro-batch, forward and backward; None where the model needs real
    numbers to run.

    Counted by torch's FlopCounterMode on models and a `batch` on the meta device: it costs no memory, and
    sees the plain model under every strategy. What activation checkpointing recomputes is not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            models = {name: build() for name, build in recipe.models().items()}
            for name, loss in recipe.losses().items():
                for other, model in models.items():
                    model.requires_grad_(other == name)
                loss(models, batch).backward()  # type: ignore[no-untyped-call]  # torch has left it so
    except Exception:  # whatever a recipe's code does to tensors without data: no figure is worth a run
        return None
    return float(counter.get_total_flops())


def peak_flops(device: str, precision: str) -> float | None:
    """The peak FLOP/s of the device; None if it is not in the table."""
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks.get(precision) for part, peaks in PEAK_FLOPS.items() if part in name), None)
