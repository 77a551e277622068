"""What DeepSpeed needs from around it, and what it must not do to the rest of the process."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, distributed, nn


def import_deepspeed() -> Any:
    """Not before it is needed, since it takes seconds; quietly, but for errors."""
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # the level would be set by the import
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    import deepspeed

    return deepspeed


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def load_deepspeed(device: torch.device) -> Any:
    """The package, told what it would look up or guess by itself."""
    deepspeed = import_deepspeed()
    if (
        device.type == "cpu" and deepspeed.accelerator.get_accelerator().device_name() != "cpu"
    ):  # there is a GPU
        deepspeed.accelerator.set_accelerator(
            import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator()
        )
    # it would clone the world group, and keep the clone when that world is gone
    deepspeed.utils.groups._WORLD_GROUP = distributed.group.WORLD
    # a C++ kernel for inference on CPUs, never called in training: it wants a compiler and half a minute to
    # build
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # It finds its device by the one, at each forward too, and checks the group against the other; srun sets
    # neither.
    os.environ.update(LOCAL_RANK=str(device.index or 0), WORLD_SIZE=str(distributed.get_world_size()))
    return deepspeed


@contextmanager
def at_least_1d(module: nn.Module) -> Iterator[None]:
    """DeepSpeed broadcasts the bytes of each parameter, and torch has no such view of a scalar: a dimension
    for a while.
    """
    scalars: list[Any] = [parameter for parameter in module.parameters() if parameter.ndim == 0]
    for parameter in scalars:
        parameter.data = parameter.data.view(1)
    yield
    for parameter in scalars:
        parameter.ds_shape = torch.Size([])
        if parameter.numel():  # else it is partitioned already
            parameter.data = parameter.data.view(())


def free_gathered_weights(module: nn.Module) -> None:
    """Let ZeRO-3 free the weights of linear layers between forward and backward.

    Autograd keeps what `linear` multiplied by, a view of the gathered weight, and so all of it. DeepSpeed's
    function keeps the parameter and gathers it again; here it is bound to the layers of this model only.
    """
    linear = import_module("deepspeed.runtime.zero.linear").zero3_linear_wrap
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = partial(_linear, layer, linear)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, linear: Callable[..., Tensor], input: Tensor) -> Tensor:
    # As rows: of more dimensions it would add the bias in place, to the product that selective activation
    # checkpointing has kept, and again when it is recomputed.
    rows = input.flatten(0, -2) if input.ndim > 2 else input
    return linear(rows, layer.weight, layer.bias).view(*input.shape[:-1], layer.out_features)
