"""Every undocumented name of DeepSpeed that the ZeRO strategy touches, each with the reason.

`check_engine` looks them up when a model is set up, so that another version of DeepSpeed is an
UnsupportedVersionError that names the installed and the tested version, and never a wrong state.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from strategies.compat import require
from strategies.sharded_state import Shape, Shard
from strategies.torch_compat import rebind_forward

TESTED = "0.19.8"

ENGINE = ("torch_autocast_enabled", "torch_autocast_dtype", "set_gradient_accumulation_boundary")
STAGE_1_AND_2 = (
    "optimizer",
    "_link_all_hp_params",
    "averaged_gradients",
    "bit16_groups",
    "round_robin_bit16_groups",
    "round_robin_bit16_meta",
    "scaled_global_norm",
    "single_partition_of_fp32_groups",
    "update_lp_params",
)
STAGE_3 = (
    "optimizer",
    "_get_norm_groups",
    "_partition_all_parameters",
    "_reassign_or_swap_out_partitioned_parameters",
    "averaged_gradients",
    "fp16_groups",
    "fp32_partitioned_groups_flat",
    "grad_partitions_flat_buffer",
    "grad_position",
    "persistent_parameters",
)
STAGE_3_PARAMETER = ("ds_id", "ds_numel", "ds_shape", "ds_tensor", "partition_numel")


def _require(owner: object, *names: str) -> None:
    require(owner, names, "DeepSpeed", TESTED)


# the package ------------------------------------------------------------------------------------------------


def import_deepspeed() -> Any:
    """The package, imported when it is needed, since it takes seconds; of its messages only errors."""
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # the level would be set by the import
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    import deepspeed

    return deepspeed


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def load_deepspeed(device: torch.device) -> Any:
    """The package, with the device and the process group of this run set instead of guessed."""
    deepspeed = import_deepspeed()
    if device.type == "cpu" and deepspeed.accelerator.get_accelerator().device_name() != "cpu":
        # there is a GPU, and it is not to be used
        deepspeed.accelerator.set_accelerator(
            import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator()
        )
    # it would clone the world group, and keep the clone when that world is gone
    _require(deepspeed.utils.groups, "_WORLD_GROUP")
    deepspeed.utils.groups._WORLD_GROUP = distributed.group.WORLD
    # A C++ kernel for inference on CPUs, never called in training: it wants a compiler and half a minute to
    # build. Computed at its first use, which is what this prevents: so not looked up by `_require`.
    if "__compatible_ops__" not in vars(deepspeed.ops):
        _require(deepspeed.ops, "__getattr__")
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # It finds its device by the one, at each forward too, and checks the group against the other; srun sets
    # neither.
    os.environ.update(LOCAL_RANK=str(device.index or 0), WORLD_SIZE=str(distributed.get_world_size()))
    return deepspeed


# the engine -------------------------------------------------------------------------------------------------


def check_engine(engine: Any, module: nn.Module, stage: int) -> None:
    """Raise UnsupportedVersionError unless the engine and its parameters have all that is used here."""
    _require(engine, *ENGINE)
    _require(engine.optimizer, *(STAGE_3 if stage == 3 else STAGE_1_AND_2))
    if stage == 3:
        for parameter in module.parameters():
            _require(parameter, *STAGE_3_PARAMETER)
        return
    for group in engine.optimizer.bit16_groups:
        for parameter in group:
            _require(parameter, "_hp_mapping")
            if parameter._hp_mapping is not None:
                _require(parameter._hp_mapping, "hp_fragment_address", "lp_fragment_address")


def keep_optimizer(engine: Any, optimizer: Optimizer) -> None:
    """Let the engine step the recipe's own optimizer: it rebuilds Adagrad, in one group with defaults."""
    zero = engine.optimizer
    if zero.optimizer is not optimizer:
        optimizer.state = zero.optimizer.state
        zero.optimizer = optimizer
        zero._link_all_hp_params()


def follow_autocast(engine: Any, device: torch.device) -> None:
    """Let the engine leave autocast as its caller has set it.

    It switches the caller's autocast off on a GPU, unless it is configured to own it; and if it is, it
    reduces gradients in half precision too. It asks these two methods at each forward.
    """
    engine.torch_autocast_enabled = partial(torch.is_autocast_enabled, device.type)
    engine.torch_autocast_dtype = partial(torch.get_autocast_dtype, device.type)


def set_reported_norm(zero: Any, stage: int, reported_norm: Callable[[], float]) -> None:
    """Let DeepSpeed's optimizer take `reported_norm()` for the gradient norm: 0 applies a step, inf skips it.

    Ours is taken in `Strategy.step`. A second one would cost a pass over the gradients, a reduction and a
    wait for the device, only to decide whether to skip the step.
    """
    if stage == 3:
        zero._get_norm_groups = lambda: [reported_norm()]
    else:
        zero.scaled_global_norm = reported_norm


def free_copies(zero: Any) -> None:
    """Free the second copy of the model that ZeRO-1 and 2 keep: only its shapes are used."""
    zero.round_robin_bit16_meta = [
        [torch.empty_like(parameter, device="meta") for parameter in group]
        for group in zero.round_robin_bit16_groups
    ]


# partitions -------------------------------------------------------------------------------------------------


class Fragment(NamedTuple):
    """Where this rank keeps its part of one parameter."""

    flat: Tensor
    """1-D fp32 partition, which the optimizer steps: the key of its state"""
    offset: int
    """where the part begins in `flat`"""
    numel: int
    """elements of the part; 0 if this rank holds none of the parameter"""
    start: int
    """where the part begins in the flattened parameter"""
    shape: Shape
    """shape of the whole parameter"""

    def of(self, flat: Tensor) -> Tensor:
        """The part in `flat`, or in a tensor of the same layout: its gradient, a moment."""
        return flat.detach().narrow(0, self.offset, self.numel)

    def shard(self, flat: Tensor) -> Shard:
        """The same, with its position in the whole parameter."""
        return Shard(self.of(flat), self.start, self.shape)


def fragments(zero: Any, module: nn.Module, stage: int, rank: int) -> Iterator[tuple[nn.Parameter, Fragment]]:
    """What this rank keeps of each partitioned parameter, as long as the engine lives."""
    if stage < 3:
        for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
            for parameter in group:
                fragment = Fragment(flat, 0, 0, 0, tuple(parameter.shape))
                if (mapping := parameter._hp_mapping) is not None:
                    in_flat, in_whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                    fragment = fragment._replace(
                        offset=in_flat.start, numel=in_flat.numel, start=in_whole.start
                    )
                yield parameter, fragment
        return
    parameters: Iterator[Any] = module.parameters()
    for parameter in parameters:
        flat, offset = parameter.ds_tensor, 0  # of a frozen one, which the optimizer does not know
        if parameter.ds_id in zero.grad_position:
            subgroup, offset, _ = zero.grad_position[parameter.ds_id]
            flat = zero.fp32_partitioned_groups_flat[subgroup]
        size = parameter.partition_numel()  # the same on all ranks: the last ones are padded
        start = min(rank * size, parameter.ds_numel)
        numel = min(size, parameter.ds_numel - start)
        yield parameter, Fragment(flat, offset, numel, start, tuple(parameter.ds_shape))


def reduced_gradients(zero: Any) -> list[Tensor]:
    """This rank's parts of the reduced gradients, without offload."""
    return [part for parts in zero.averaged_gradients.values() for part in parts or ()]


def clear_gradient_buffer(zero: Any) -> None:
    """Zero the buffer of ZeRO-3: a parameter without gradient would find its last one there."""
    zero.grad_partitions_flat_buffer.zero_()


def publish_partitions(zero: Any, stage: int) -> None:
    """Bring what the model computes with up to date with the fp32 partitions. Collective."""
    if stage < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for subgroup in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(subgroup)
    if zero.persistent_parameters:  # small ones, whole between steps too
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


# the module -------------------------------------------------------------------------------------------------


@contextmanager
def at_least_1d(module: nn.Module) -> Iterator[None]:
    """Give scalar parameters a dimension for a while.

    DeepSpeed broadcasts the bytes of each parameter, and torch has no such view of a scalar.
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
    function keeps the parameter and gathers it again. DeepSpeed would put it in place of
    `torch.nn.functional.linear` for the whole process (`memory_efficient_linear`); here it is bound to the
    layers of this model only.
    """
    zero_linear = import_module("deepspeed.runtime.zero.linear")
    _require(zero_linear, "zero3_linear_wrap")
    for layer in module.modules():
        if type(layer) is nn.Linear:
            rebind_forward(layer, partial(_linear, layer, zero_linear.zero3_linear_wrap))


def _linear(layer: nn.Linear, linear: Callable[..., Tensor], input: Tensor) -> Tensor:
    # As rows: with more dimensions it would add the bias in place, to the product that selective activation
    # checkpointing has kept, and again when it is recomputed.
    rows = input.flatten(0, -2) if input.ndim > 2 else input
    return linear(rows, layer.weight, layer.bias).view(*input.shape[:-1], layer.out_features)
