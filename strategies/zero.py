"""`strategy=zero1|zero2|zero3`: DeepSpeed ZeRO (Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054).

DeepSpeed owns the partitions, their collectives and the call of the torch optimizer. What it shares with
the other strategies stays ours: the precision, the loss scale, the gradient norm and its clipping, the saved state.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from strategies import precision
from strategies.base import BuildOptimizer, Strategy, World
from strategies.options import Options
from strategies.state import Range, Reader, unique_state

# elementwise optimizers see no difference between a parameter and a flat partition; these look at the parameter's shape
SHAPED = ("Adafactor", "Muon", "LBFGS", "SparseAdam")


class Piece(NamedTuple):
    """Where this rank keeps its part of one parameter."""

    flat: Tensor
    """1-D fp32 partition, the tensor that the optimizer steps: the key of its state"""
    offset: int
    """where the part begins in `flat`"""
    numel: int
    """elements of the part; 0 if none of the parameter lives here"""
    start: int
    """where the part begins in the flattened parameter"""
    shape: tuple[int, ...]
    """shape of the whole parameter"""
    group: int
    """index of its parameter group"""

    def of(self, flat: Tensor) -> Tensor:
        """The part in `flat`, or in a tensor of optimizer state that runs beside it."""
        return flat.detach().narrow(0, self.offset, self.numel)


class Zero(Strategy):
    """Optimizer state (1), gradients too (2), parameters too (3) partitioned over all ranks.

    A parameter that gets no gradient in a step counts as one with a zero gradient, since the optimizer sees flat
    partitions. A model without optimizer (a teacher) is held whole on each rank, under zero3 too.
    """

    engine: Any = None
    optimizer: Any  # DeepSpeed's, around the recipe's; its param_groups are the recipe's own dicts

    def __init__(self, world: World, options: Options) -> None:
        super().__init__(world, options)
        self.stage = int(options.strategy.removeprefix("zero"))
        self.gradient_mean_over = world.world_size
        self.pieces: dict[int, Piece] = {}
        self.verdict = 0.0
        if options.zero.cpu_offload and torch.device(world.device).type == "cpu":
            raise ValueError("zero.cpu_offload=true has no effect without a GPU: everything is in host memory; drop the key")
        if options.zero.bucket_mb < 1:
            raise ValueError(f"zero.bucket_mb={options.zero.bucket_mb}: a bucket holds at least 1 MB")

    # setup ------------------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """DeepSpeed's configuration, from our options and nothing else.

        fp32 throughout: its bf16 and fp16 modes cast the whole module, BatchNorm included. No clipping, no scheduler,
        no accumulation: these are ours.
        """
        bucket = self.options.zero.bucket_mb * 2**20 // 4
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear for good, for everybody
        }
        if self.options.zero.cpu_offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
            if self.stage == 3:
                zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # the default is 1.0
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device at each forward
        }

    def attach(self, build_optimizer: BuildOptimizer) -> None:
        """Build the optimizer and hand it to DeepSpeed together with the module, which it partitions in place."""
        super().attach(build_optimizer)
        optimizer: Optimizer = self.optimizer
        _check_elementwise(optimizer)
        for group in optimizer.param_groups:  # DeepSpeed drops an empty group, and fails on one that is all frozen
            group["params"] = [p for p in group["params"] if p.requires_grad]
        with _environment(torch.device(self.world.device)) as deepspeed:
            self.engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=self.config())
        self.model, self.optimizer = self.engine, self.engine.optimizer
        if self.optimizer.optimizer is not optimizer:  # DeepSpeed rebuilds Adagrad, with one group of default settings
            optimizer.state = self.optimizer.optimizer.state
            self.optimizer.optimizer = optimizer
        # The engine switches the caller's autocast off unless it is configured to own it, and then it also reduces
        # gradients in half precision. This lets it follow the caller.
        kind = torch.device(self.world.device).type
        self.engine.torch_autocast_enabled = partial(torch.is_autocast_enabled, kind)
        self.engine.torch_autocast_dtype = partial(torch.get_autocast_dtype, kind)
        # The norm is taken here; a second one would cost a pass, a reduction and a wait for the device. What DeepSpeed
        # wants to know is whether to discard the step.
        if self.stage == 3:
            self.optimizer._get_norm_groups = lambda: [self.verdict]
            _free_gathered_weights(self.module)
        else:
            self.optimizer.scaled_global_norm = lambda: self.verdict
        self.pieces = {id(parameter): piece for parameter, piece in self.partition()}

    def parameter_count(self) -> int:
        """Parameters of the whole model, over all ranks; tied ones count once."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())

    def partition(self) -> Iterator[tuple[Any, Piece]]:
        """What this rank keeps of each partitioned parameter. Valid for the life of the engine."""
        zero = self.optimizer
        if self.stage < 3:
            for index, group in enumerate(zero.bit16_groups):
                flat = zero.single_partition_of_fp32_groups[index]
                for parameter in group:
                    shape, here = tuple(parameter.shape), parameter._hp_mapping
                    if here is None:
                        yield parameter, Piece(flat, 0, 0, 0, shape, index)
                    else:
                        part, whole = here.hp_fragment_address, here.lp_fragment_address
                        yield parameter, Piece(flat, part.start, part.numel, whole.start, shape, index)
            return
        parameters: Iterator[Any] = self.module.parameters()  # DeepSpeed hangs what it knows of them on them
        for parameter in parameters:
            # the last partitions are padded up to the size of the others
            start = min(self.world.rank * parameter.partition_numel(), parameter.ds_numel)
            numel = min(parameter.partition_numel(), parameter.ds_numel - start)
            flat, offset, index = parameter.ds_tensor, 0, 0
            if parameter.ds_id in zero.grad_position:  # else it is frozen: partitioned, but unknown to the optimizer
                subgroup, offset, _ = zero.grad_position[parameter.ds_id]
                flat = zero.fp32_partitioned_groups_flat[subgroup]
                index = zero.sub_group_to_group_id[subgroup]
            yield parameter, Piece(flat, offset, numel, start, tuple(parameter.ds_shape), index)

    # one step ---------------------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[object]:
        """As in the base class; ZeRO-3 without the cache of cast weights: it would keep a whole model in half precision."""
        if self.stage < 3 or self.options.precision not in precision.AUTOCAST:
            return super().autocast()
        kind = torch.device(self.world.device).type
        return torch.autocast(kind, dtype=precision.AUTOCAST[self.options.precision], cache_enabled=False)

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """ZeRO-1 reduces in the last micro-batch; ZeRO-2 and 3 keep no whole gradient, so they reduce in each."""
        self.engine.set_gradient_accumulation_boundary(last)
        with super().microbatch(last):
            yield

    @contextmanager
    def resting(self) -> Iterator[None]:
        """As in the base class; calls go around the engine.

        Its output hooks would finish a backward pass that is not its own: the gradients of an accumulation in progress
        would be lost.
        """
        if self.engine is None:
            yield
            return
        with super().resting():
            self.engine.forward = self.module.__call__
            try:
                yield
            finally:
                del self.engine.forward

    def backward(self, loss: Tensor) -> None:
        """As in the base class."""
        with torch.autocast(torch.device(self.world.device).type, enabled=False):
            self.engine.backward(loss * (self.loss_scale.value * self.gradient_mean_over))

    def step(self) -> Tensor:
        """As in the base class."""
        scale = self.loss_scale.value
        norm = self.grad_norm() / scale
        if self.loss_scale.accept(norm):
            self.clip(norm, scale)
            self.optimizer.step()
            self.forget_gradients()
        else:
            self.discard()
        return norm

    def discard(self) -> None:
        """Drop the gradients of this step: DeepSpeed knows how, told that they have overflowed."""
        self.verdict = math.inf
        self.optimizer.step()
        self.verdict = 0.0
        self.forget_gradients()

    def gradients(self) -> list[Tensor]:
        """This rank's partitions of the reduced gradients; padding is zero."""
        if self.options.zero.cpu_offload:
            return [flat.grad for flat in self.flats() if flat.grad is not None]
        if self.stage == 3:
            return [self.optimizer.grad_partitions_flat_buffer]
        return [part for group in self.optimizer.averaged_gradients.values() for part in group]

    def flats(self) -> list[Tensor]:
        """This rank's fp32 partitions, the tensors that the optimizer steps."""
        zero = self.optimizer
        found: list[Tensor] = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        return found

    def grad_norm(self) -> Tensor:
        """2-norm of all gradients as they are (still scaled under fp16), over all ranks."""
        square = super().grad_norm().to(self.world.device) ** 2
        distributed.all_reduce(square)
        return square.sqrt()

    def forget_gradients(self) -> None:
        """After a step. A parameter without gradient in the next one would else be updated with that of this one."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.stage == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        if self.options.zero.cpu_offload:
            torch._foreach_zero_(self.gradients())

    # state ------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Range]:
        """As in the base class. A scalar of the optimizer (Adam's step) counts for each parameter in its partition."""
        ranges = super().state()
        for name, parameter in self.module.named_parameters():
            if (piece := self.pieces.get(id(parameter))) is None:
                continue
            for key, value in self.optimizer.state.get(piece.flat, {}).items():
                if not isinstance(value, Tensor):
                    continue
                written = _range(piece, value) if value.shape == piece.flat.shape else self.written(value)
                if written is not None:
                    ranges[f"optimizer/{name}/{key}"] = written
        return ranges

    def load_state(self, saved: Reader) -> None:
        """Read this rank's partitions, then let DeepSpeed spread them to the whole parameters."""
        for name, tensor in unique_state(self.module):
            self.fill(tensor, f"model/{name}", saved)
        parameters = dict(self.module.named_parameters())
        if self.trainable:
            self.optimizer.state.clear()
        for entry, shape in saved.shapes.items():
            kind, _, rest = entry.partition("/")
            name, _, key = rest.rpartition("/")
            if kind == "optimizer" and parameters[name].requires_grad and id(parameters[name]) in self.pieces:
                piece = self.pieces[id(parameters[name])]
                value = self.optimizer_state(piece, key, shape)
                if value.shape != piece.flat.shape:
                    value.copy_(saved.read(entry, 0, value.numel()).view(value.shape))
                elif piece.numel:
                    piece.of(value).copy_(saved.read(entry, piece.start, piece.start + piece.numel))
        self.loss_scale.restore(saved.read("loss_scale", 0, 2))
        if self.engine is not None:
            self.spread()

    def optimizer_state(self, piece: Piece, key: str, shape: tuple[int, ...]) -> Tensor:
        """The optimizer's `key` of the partition that holds `piece`, made if it has not stepped yet."""
        state = self.optimizer.state[piece.flat]
        if key not in state:
            # a parameter without dimensions has the shape of a step counter
            if shape == piece.shape and (shape or key != "step"):
                state[key] = torch.zeros_like(piece.flat, requires_grad=False)
            else:
                group = self.optimizer.param_groups[piece.group]
                on_device = group.get("fused") or group.get("capturable")
                state[key] = torch.zeros(shape, device=piece.flat.device if on_device else "cpu")
        found: Tensor = state[key]
        return found

    def spread(self) -> None:
        """Bring the parameters that are called up to date with the partitions, on all ranks."""
        zero = self.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for subgroup in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(subgroup)
        if zero.persistent_parameters:  # small ones, kept whole between steps
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def local(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The part of `tensor` that lives on this rank, and where it starts in the flattened whole."""
        piece = self.pieces.get(id(tensor))
        return super().local(tensor) if piece is None else (piece.of(piece.flat), piece.start)

    def written(self, tensor: Tensor) -> Range | None:
        """The range of `tensor` that is this rank's to write, if any."""
        piece = self.pieces.get(id(tensor))
        return super().written(tensor) if piece is None else _range(piece, piece.flat)

    def fill(self, tensor: Tensor, name: str, saved: Reader) -> None:
        """Read this rank's part of `tensor` from `saved`, if it has any."""
        if self.local(tensor)[0].numel():
            super().fill(tensor, name, saved)

    def gathered(self, tensor: Tensor) -> AbstractContextManager[object]:
        """Make `tensor` whole on all ranks for a while, if it is a parameter under ZeRO-3."""
        if id(tensor) not in self.pieces or self.stage < 3:
            return nullcontext()
        gathered: AbstractContextManager[object] = _import_deepspeed().zero.GatheredParameters([tensor])
        return gathered

    def export(self) -> dict[str, Tensor]:
        """As in the base class; ZeRO-3 gathers one parameter at a time."""
        whole: dict[str, Tensor] = {}
        for name, tensor in unique_state(self.module):
            with self.gathered(tensor):
                if self.world.rank == 0:
                    whole[name] = self.whole(tensor)
        return whole


def _range(piece: Piece, flat: Tensor) -> Range | None:
    return Range(piece.of(flat), piece.start, piece.shape) if piece.numel else None


def _check_elementwise(optimizer: Optimizer) -> None:
    if type(optimizer).__name__ in SHAPED:
        raise ValueError(
            f"{type(optimizer).__name__} under ZeRO: it looks at the shape of each parameter, and ZeRO flattens them; "
            "use an elementwise optimizer (SGD, Adam, AdamW, ...), or strategy=ddp or fsdp"
        )


def _free_gathered_weights(module: nn.Module) -> None:
    """Let ZeRO-3 free the weights of linear layers between forward and backward.

    Autograd keeps what `linear` multiplied by, a view of the gathered weight, and so all of it. DeepSpeed's function
    keeps the parameter and gathers it again; here it is bound to the layers of this model only.
    """
    linear = import_module("deepspeed.runtime.zero.linear").zero3_linear_wrap
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = partial(_linear, layer, linear)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, linear: Callable[..., Tensor], input: Tensor) -> Tensor:
    return linear(input, layer.weight, layer.bias)


def _import_deepspeed() -> Any:
    """Seconds, so not before it is needed; and quietly, but for errors."""
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # not its level: the import sets that
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    import deepspeed

    return deepspeed


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextmanager
def _environment(device: torch.device) -> Iterator[Any]:
    """What DeepSpeed takes from its surroundings, set to what this run is. Yields the package."""
    deepspeed = _import_deepspeed()
    if device.type == "cpu" and deepspeed.accelerator.get_accelerator().device_name() != "cpu":  # on a GPU machine
        deepspeed.accelerator.set_accelerator(import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator())
    # DeepSpeed would clone the world group, and keep the clone when that world is gone
    deepspeed.utils.groups._WORLD_GROUP = distributed.group.WORLD
    # a C++ kernel for inference on CPUs, which training never calls: it wants a compiler and half a minute to build
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # by which it finds its device
    try:
        yield deepspeed
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
