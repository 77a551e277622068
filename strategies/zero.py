"""`strategy=zero1|zero2|zero3`: DeepSpeed ZeRO (Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054).

DeepSpeed owns the partitions, their collectives and the call of the torch optimizer. What it shares with the
other strategies stays ours: the precision, the loss scale, the gradient norm and its clipping, the saved
state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from strategies import precision
from strategies.base import BuildOptimizer, Strategy, World
from strategies.deepspeed_compat import at_least_1d, free_gathered_weights, import_deepspeed, load_deepspeed
from strategies.options import Options
from strategies.sharded_state import StateReader, TensorSlice, unique_state

# they look at the shape of each parameter; to an elementwise optimizer a flat partition is as good
SHAPED_OPTIMIZERS = ("Adafactor", "Muon", "LBFGS", "SparseAdam")


class Fragment(NamedTuple):
    """Where this rank keeps its part of one parameter."""

    flat: Tensor
    """1-D fp32 partition, which the optimizer steps: the key of its state"""
    offset: int
    """where the part begins in `flat`"""
    numel: int
    """elements of the part; 0 if none of the parameter lives here"""
    start: int
    """where the part begins in the flattened parameter"""
    shape: tuple[int, ...]
    """shape of the whole parameter"""

    def of(self, flat: Tensor) -> Tensor:
        """The part in `flat`, or in a tensor that runs beside it: its gradient, a moment."""
        return flat.detach().narrow(0, self.offset, self.numel)

    def range(self, flat: Tensor) -> TensorSlice | None:
        """The part as it is saved, if there is any."""
        return TensorSlice(self.of(flat), self.start, self.shape) if self.numel else None


class Zero(Strategy):
    """Optimizer state (1), gradients too (2), parameters too (3) partitioned over all ranks.

    A parameter that gets no gradient in a step counts as one with a zero gradient, since the optimizer sees
    flat partitions. A model without optimizer (a teacher) is held whole on each rank, under zero3 too.
    """

    engine: Any = None
    optimizer: Any  # DeepSpeed's, around the recipe's; its param_groups are the recipe's own

    def __init__(self, world: World, options: Options) -> None:
        super().__init__(world, options)
        self.device = torch.device(world.device)
        self.stage = int(options.strategy.removeprefix("zero"))
        self._grad_average_size = world.world_size
        self._cache_casts = self.stage < 3
        self.pieces: dict[int, Fragment] = {}
        self.verdict = 0.0
        if options.zero.cpu_offload and self.device.type == "cpu":
            raise ValueError(
                "zero.cpu_offload=true has no effect without a GPU: all is in host memory; drop the key"
            )
        if self.stage == 3 and options.compile and options.activation_checkpointing == "selective":
            raise ValueError(
                "compile with activation_checkpointing=selective needs blocks that compile as a whole, and zero3 gathers weights "
                "inside them; use activation_checkpointing=full, or strategy=fsdp"
            )
        if options.zero.bucket_mb < 1:
            raise ValueError(f"zero.bucket_mb={options.zero.bucket_mb} is too small: at least 1")

    # setup --------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """DeepSpeed's configuration, from our options and nothing else.

        fp32 throughout: its bf16 and fp16 modes cast the whole module, BatchNorm included. No scheduler, no
        accumulation, no clipping: these are ours.
        """
        bucket = self.options.zero.bucket_mb * 2**20 // 4
        offload = {"device": "cpu", "pin_memory": True} if self.options.zero.cpu_offload else None
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # Left out it means 1.0, and nothing says so: a convolutional net with BatchNorm, whose first
            # gradients have a norm of 80, then trains on another curve than under any other strategy.
            "gradient_clipping": 0.0,
            "zero_optimization": {
                # Gradients are reduced beside backward under ZeRO-3 (overlap_comm, its default) but not under
                # 1 and 2: there reductions have read buckets too soon
                # (https://github.com/deepspeedai/DeepSpeed/issues/8061, 5545). Where that is mended, the host
                # waits for the device after each backward, and backward for the bucket before (8364).
                "stage": self.stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "memory_efficient_linear": False,  # replaces torch.nn.functional.linear, for all models and for good
                "offload_optimizer": offload,
                "offload_param": offload if self.stage == 3 else None,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "timers": {"throughput": {"enabled": False}},  # waits for the device at each forward
        }

    def attach(self, build_optimizer: BuildOptimizer) -> None:
        """Build the optimizer and give it to DeepSpeed together with the module, which is partitioned in
        place.
        """
        super().attach(build_optimizer)
        optimizer: Optimizer = self.optimizer
        if (kind := type(optimizer).__name__) in SHAPED_OPTIMIZERS:
            raise ValueError(
                f"{kind} looks at the shape of each parameter, and ZeRO flattens them: use SGD, Adam, AdamW or another "
                "elementwise optimizer, or strategy=ddp"
            )
        for group in optimizer.param_groups:  # a group that is all frozen would be an IndexError
            group["params"] = [p for p in group["params"] if p.requires_grad]
        deepspeed = load_deepspeed(self.device)
        with at_least_1d(self.module):
            self.engine, *_ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=self.config()
            )
        self.model, self.optimizer = self.engine, self.engine.optimizer
        if (
            self.optimizer.optimizer is not optimizer
        ):  # it rebuilds Adagrad, as one group with the default settings
            optimizer.state = self.optimizer.optimizer.state
            self.optimizer.optimizer = optimizer
            self.optimizer._link_all_hp_params()
        # The engine switches the caller's autocast off on a GPU, unless it is configured to own it; and if it
        # is, it reduces gradients in half precision too. Asked at each forward, it now follows the caller.
        self.engine.torch_autocast_enabled = partial(torch.is_autocast_enabled, self.device.type)
        self.engine.torch_autocast_dtype = partial(torch.get_autocast_dtype, self.device.type)
        # The norm is taken in `step`. A second one would cost a pass, a reduction and a wait for the device;
        # what DeepSpeed concludes from it is whether to discard the step.
        if self.stage == 3:
            self.optimizer._get_norm_groups = lambda: [self.verdict]
            free_gathered_weights(self.module)
        else:
            self.optimizer.scaled_global_norm = lambda: self.verdict
            self.optimizer.round_robin_bit16_meta = [  # from these it makes the views that are the parameters
                [torch.empty_like(p, device="meta") for p in group]
                for group in self.optimizer.round_robin_bit16_groups
            ]
        self.pieces = {id(parameter): piece for parameter, piece in self.partition()}

    def partition(self) -> Iterator[tuple[nn.Parameter, Fragment]]:
        """What this rank keeps of each partitioned parameter, as long as the engine lives."""
        zero = self.optimizer
        if self.stage < 3:
            for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
                for parameter in group:
                    piece = Fragment(flat, 0, 0, 0, tuple(parameter.shape))
                    if (here := parameter._hp_mapping) is not None:
                        in_flat, whole = here.hp_fragment_address, here.lp_fragment_address
                        piece = piece._replace(offset=in_flat.start, numel=in_flat.numel, start=whole.start)
                    yield parameter, piece
            return
        parameters: Iterator[Any] = self.module.parameters()  # DeepSpeed hangs what it knows of them on them
        for parameter in parameters:
            flat, offset = parameter.ds_tensor, 0  # of a frozen one, which the optimizer does not know
            if parameter.ds_id in zero.grad_position:
                subgroup, offset, _ = zero.grad_position[parameter.ds_id]
                flat = zero.fp32_partitioned_groups_flat[subgroup]
            size = parameter.partition_numel()  # the same on all ranks: the last ones are padded
            start = min(self.world.rank * size, parameter.ds_numel)
            yield (
                parameter,
                Fragment(
                    flat, offset, min(size, parameter.ds_numel - start), start, tuple(parameter.ds_shape)
                ),
            )

    def parameter_count(self) -> int:
        """Parameters of the whole model, over all ranks; tied ones count once."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())

    # one step -----------------------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """ZeRO-1 reduces in the last micro-batch; ZeRO-2 and 3, which keep no whole gradient, in each."""
        self.engine.set_gradient_accumulation_boundary(last)
        with super().micro_batch(last):
            yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """As in the base class. Calls go around the engine.

        It would take the other model's backward pass for its own, and reduce gradients that it does not have.
        """
        if self.engine is None:
            yield
            return
        with super().frozen():
            self.engine.forward = self.module.__call__
            try:
                yield
            finally:
                del self.engine.forward

    def backward(self, loss: Tensor) -> None:
        """As in the base class."""
        with precision.autocast_off(self.options.precision, self.world.device):
            self.engine.backward(loss * (self.loss_scale.value * self._grad_average_size))

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
        """Drop the gradients of this step. DeepSpeed does, told that they have overflowed."""
        self.verdict = math.inf
        self.optimizer.step()
        self.verdict = 0.0
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """After a step: else a parameter without gradient in the next one would be updated with that of this
        one.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.stage == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        for gradient in self.gradients() if self.options.zero.cpu_offload else ():
            gradient.zero_()

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the reduced gradients."""
        if self.options.zero.cpu_offload:
            return [
                piece.of(piece.flat.grad) for piece in self.pieces.values() if piece.flat.grad is not None
            ]
        return [part for parts in self.optimizer.averaged_gradients.values() for part in parts or ()]

    def squared_grad_norm(self) -> Tensor:
        """As in the base class; one reduction of one number."""
        square = super().squared_grad_norm()
        distributed.all_reduce(square)
        return square

    # state --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, TensorSlice]:
        """As in the base class. A scalar of the optimizer (Adam's step) stands for each parameter of its
        partition.
        """
        ranges = super().state()
        for name, parameter in self.module.named_parameters():
            if piece := self.pieces.get(id(parameter)):
                for key, value in self.optimizer.state.get(piece.flat, {}).items():
                    if isinstance(value, Tensor):
                        flat = value.shape == piece.flat.shape
                        # a copy for each: safetensors refuses tensors that share memory
                        if written := piece.range(value) if flat else self.written(value.clone()):
                            ranges[f"optimizer/{name}/{key}"] = written
        return ranges

    def whole_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """As in the base class."""
        piece = self.pieces.get(id(tensor))
        return piece.shape if piece else super().whole_shape(tensor)

    def load_weights(self, saved: StateReader) -> None:
        """Read this rank's partitions; DeepSpeed's own collective then brings the whole parameters up to
        date.
        """
        super().load_weights(saved)
        if self.engine is not None:
            self.gather()

    def load_state(self, saved: StateReader) -> None:
        """As in the base class; the optimizer's state belongs to flat partitions."""
        self.load_weights(saved)
        self.loss_scale.restore(saved.read("loss_scale", 0, 2))
        if self.engine is None:
            return
        self.optimizer.state.clear()  # what was not saved must not survive
        parameters = dict(self.module.named_parameters())
        for entry, shape in saved.shapes.items():
            kind, _, rest = entry.partition("/")
            name, _, key = rest.rpartition("/")
            if kind == "optimizer" and parameters[name].requires_grad:
                self.fill_optimizer(self.pieces[id(parameters[name])], key, shape, entry, saved)

    def fill_optimizer(
        self, piece: Fragment, key: str, shape: tuple[int, ...], entry: str, saved: StateReader
    ) -> None:
        """Read one saved entry of one parameter's optimizer state."""
        state = self.optimizer.state[piece.flat]
        if shape == piece.shape and (shape or key != "step"):  # a scalar parameter has the shape of a counter
            value = state.setdefault(key, torch.zeros_like(piece.flat, requires_grad=False))
            if piece.numel:
                piece.of(value).copy_(saved.read(entry, piece.start, piece.start + piece.numel))
        elif key not in state:
            settings = self.optimizer.optimizer.defaults
            device = piece.flat.device if settings.get("fused") or settings.get("capturable") else "cpu"
            state[key] = saved.read(entry, 0, math.prod(shape)).view(shape).to(device, copy=True)

    def gather(self) -> None:
        """Bring what the model computes with up to date with the partitions, on all ranks."""
        zero = self.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for subgroup in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(subgroup)
        if zero.persistent_parameters:  # small ones, whole between steps too
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def local(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The part of `tensor` that lives on this rank, and where it starts in the flattened whole."""
        piece = self.pieces.get(id(tensor))
        return (piece.of(piece.flat), piece.start) if piece else super().local(tensor)

    def written(self, tensor: Tensor) -> TensorSlice | None:
        """The range of `tensor` that is this rank's to write, if any."""
        piece = self.pieces.get(id(tensor))
        return piece.range(piece.flat) if piece else super().written(tensor)

    def fill(self, tensor: Tensor, name: str, saved: StateReader) -> None:
        """Read this rank's part of `tensor` from `saved`, if it has any."""
        if self.local(tensor)[0].numel():
            super().fill(tensor, name, saved)

    def export(self) -> dict[str, Tensor]:
        """As in the base class; ZeRO-3 makes one parameter whole at a time."""
        exported: dict[str, Tensor] = {}
        for name, tensor in unique_state(self.module):
            with self.gathered(tensor):
                if self.world.rank == 0:
                    exported[name] = self.whole(tensor)
        return exported

    def gathered(self, tensor: Tensor) -> AbstractContextManager[object]:
        """`tensor` whole on all ranks for a while, if it is a parameter under ZeRO-3."""
        whole: AbstractContextManager[object] = nullcontext()
        if self.stage == 3 and id(tensor) in self.pieces:
            whole = import_deepspeed().zero.GatheredParameters([tensor])
        return whole
