"""`strategy=zero1|zero2|zero3`: DeepSpeed ZeRO (Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054).

DeepSpeed owns the partitions, their collectives and the call of the torch optimizer. What it shares with the
other strategies is done here: mixed precision (autocast), the loss scale, the gradient norm and its clipping,
gradient accumulation and the saved state. `deepspeed_compat.py` holds what is undocumented about DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from typing_extensions import override

from strategies import deepspeed_compat
from strategies.base import BuildOptimizer, Strategy
from strategies.bypass import bypassed
from strategies.deepspeed_compat import Fragment, load_deepspeed
from strategies.options import Options
from strategies.sharded_state import Shape, Shard, StateReader, is_per_element, scalars_on_device
from strategies.world_info import WorldInfo

# they look at the shape of each parameter; to an elementwise optimizer a flat partition is as good
SHAPED_OPTIMIZERS = ("Adafactor", "Muon", "LBFGS", "SparseAdam")


class EngineModule(nn.Module):
    """What a recipe calls: DeepSpeed's engine, or the module past it while `bypass` is set.

    The engine would take the backward pass of another model for its own, and reduce gradients that it does
    not have.
    """

    bypass = False

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine = engine

    @override
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return (self.engine.module if self.bypass else self.engine)(*inputs, **kwargs)


class Zero(Strategy):
    """Optimizer state (1), gradients too (2), parameters too (3) partitioned over all ranks.

    A parameter that gets no gradient in a step counts as one with a zero gradient, since the optimizer sees
    flat partitions. A model without optimizer (a teacher) is held whole on each rank, under zero3 too.
    """

    optimizer: Any
    """DeepSpeed's, around the recipe's; its param_groups are the recipe's own"""

    def __init__(self, world: WorldInfo, options: Options) -> None:
        super().__init__(world, options)
        self._device = torch.device(world.device)
        self._stage = int(options.strategy.removeprefix("zero"))
        self._offload = options.zero.cpu_offload
        self._grad_average_size = world.world_size
        self._cache_casts = self._stage < 3
        self._engine: Any = None
        """None for a model without optimizer"""
        self._fragments: dict[int, Fragment] = {}
        """of the partitioned parameters, by id"""
        self._reported_norm = 0.0
        """what DeepSpeed takes for the gradient norm"""
        if self._offload and self._device.type == "cpu":
            raise ValueError(
                "zero.cpu_offload=true has no effect without a GPU: all is in host memory; drop the key"
            )
        if self._stage == 3 and options.compile and options.activation_checkpointing == "selective":
            raise ValueError(
                "compile with activation_checkpointing=selective needs blocks that compile as a whole, and "
                "zero3 gathers weights inside them; use activation_checkpointing=full, or strategy=fsdp"
            )
        if options.zero.bucket_mb < 1:
            raise ValueError(f"zero.bucket_mb={options.zero.bucket_mb} is too small: at least 1")

    # setup --------------------------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        """DeepSpeed's configuration, from our options and nothing else.

        fp32 throughout: its bf16 and fp16 modes cast the whole module, BatchNorm included. No scheduler, no
        accumulation, no clipping: these are not DeepSpeed's here.
        """
        bucket = self._options.zero.bucket_mb * 2**20 // 4
        offload = {"device": "cpu", "pin_memory": True} if self._offload else None
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
                "stage": self._stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "memory_efficient_linear": False,  # see deepspeed_compat.free_gathered_weights
                "offload_optimizer": offload,
                "offload_param": offload if self._stage == 3 else None,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "timers": {"throughput": {"enabled": False}},  # waits for the device at each forward
        }

    @override
    def _attach(self, build_optimizer: BuildOptimizer) -> None:
        """Build the optimizer; DeepSpeed takes it and partitions the module in place."""
        super()._attach(build_optimizer)
        optimizer: Optimizer = self.optimizer
        if (kind := type(optimizer).__name__) in SHAPED_OPTIMIZERS:
            raise ValueError(
                f"{kind} looks at the shape of each parameter, and ZeRO flattens them: use SGD, Adam, AdamW "
                "or another elementwise optimizer, or strategy=ddp"
            )
        for group in optimizer.param_groups:  # a group that is all frozen would be an IndexError
            group["params"] = [p for p in group["params"] if p.requires_grad]
        deepspeed = load_deepspeed(self._device)
        with deepspeed_compat.at_least_1d(self.module):
            engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=self._config())
        deepspeed_compat.check_engine(engine, self.module, self._stage)
        deepspeed_compat.keep_optimizer(engine, optimizer)
        deepspeed_compat.follow_autocast(engine, self._device)
        deepspeed_compat.set_reported_norm(engine.optimizer, self._stage, lambda: self._reported_norm)
        if self._stage == 3:
            deepspeed_compat.free_gathered_weights(self.module)
        else:
            deepspeed_compat.free_copies(engine.optimizer)
        self._engine, self.model, self.optimizer = engine, EngineModule(engine), engine.optimizer
        parts = deepspeed_compat.fragments(self.optimizer, self.module, self._stage, self._world.rank)
        self._fragments = {id(parameter): fragment for parameter, fragment in parts}

    # one step -----------------------------------------------------------------------------------------------

    @override
    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """As in the base class; but ZeRO-2 and 3, which keep no whole gradient, reduce in each one."""
        self._engine.set_gradient_accumulation_boundary(last)
        with super().micro_batch(last):
            yield

    @override
    @contextmanager
    def frozen(self) -> Iterator[None]:
        if self._engine is None:
            yield
            return
        assert isinstance(self.model, EngineModule)
        with super().frozen(), bypassed(self.model):
            yield

    @override
    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    @override
    def _update(self) -> None:
        self.optimizer.step()
        self._clear_gradients()

    @override
    def _drop_gradients(self) -> None:
        """DeepSpeed drops them itself, if it takes them for overflowed."""
        self._reported_norm = math.inf
        self.optimizer.step()
        self._reported_norm = 0.0
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        """Else a parameter without gradient in the next step would be updated with that of this one."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._stage == 3:
            deepspeed_compat.clear_gradient_buffer(self.optimizer)
        for gradient in self._gradients() if self._offload else ():
            gradient.zero_()

    @override
    def _gradients(self) -> list[Tensor]:
        """This rank's parts of the reduced gradients."""
        if not self._offload:
            return deepspeed_compat.reduced_gradients(self.optimizer)
        parts = self._fragments.values()
        return [fragment.of(fragment.flat.grad) for fragment in parts if fragment.flat.grad is not None]

    @override
    def _squared_grad_norm(self) -> Tensor:
        """As in the base class; one reduction of one number."""
        square = super()._squared_grad_norm()
        distributed.all_reduce(square)
        return square

    # state --------------------------------------------------------------------------------------------------

    @override
    def load_state(self, reader: StateReader, weights_only: bool = False) -> None:
        """As in the base class; a collective then updates what the model computes with."""
        super().load_state(reader, weights_only)
        if self._engine is not None:
            deepspeed_compat.publish_partitions(self.optimizer, self._stage)

    @override
    def _shard_of(self, tensor: Tensor) -> Shard:
        """A partitioned parameter is a slice of this rank's flat partition; anything else is held whole."""
        fragment = self._fragments.get(id(tensor))
        return fragment.shard(fragment.flat) if fragment else super()._shard_of(tensor)

    @override
    def _optimizer_shards(self, parameter: nn.Parameter) -> dict[str, Shard]:
        """The state belongs to flat partitions; scalars (Adam's step) stand for each parameter in them."""
        if (fragment := self._fragments.get(id(parameter))) is None:
            return {}
        state = self.optimizer.state.get(fragment.flat, {})
        return {
            key: fragment.shard(value)
            if value.shape == fragment.flat.shape
            else self._copy_on_each_rank(value.clone())  # safetensors refuses tensors that share memory
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    @override
    def _new_optimizer_shard(self, parameter: nn.Parameter, key: str, shape: Shape) -> Shard | None:
        """The first parameter of a flat partition brings its scalars, which the others share."""
        fragment = self._fragments[id(parameter)]
        flat, state = fragment.flat, self.optimizer.state[fragment.flat]
        if is_per_element(key, shape, fragment.shape):
            return fragment.shard(state.setdefault(key, torch.zeros_like(flat, requires_grad=False)))
        if key in state:
            return None
        on_device = scalars_on_device(self.optimizer.optimizer.defaults)
        state[key] = torch.zeros(shape, device=flat.device if on_device else "cpu")
        return self._copy_on_each_rank(state[key])
