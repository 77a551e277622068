"""The strategy interface, and its meaning on a single device: the base class IS `strategy=single`.

One strategy holds one model and its optimizer. A recipe with several models (GAN, teacher and student) has
one strategy for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies import activation_checkpointing, precision, torch_compat, torch_compile
from strategies.deferred_init import initialize
from strategies.fused_optimizer import use_fused_update
from strategies.grad_norm import squared_norm
from strategies.options import Options
from strategies.sharded_state import (
    Layout,
    Shape,
    Shard,
    StateReader,
    TensorSlice,
    describe_parameter_groups,
    empty_optimizer_state,
    load_shard,
    tied_names,
    unique_state,
)
from strategies.world_info import WorldInfo

BuildModel = Callable[[], nn.Module]
BuildOptimizer = Callable[[nn.Module], Optimizer]
Blocks = Callable[[nn.Module], Iterable[nn.Module]]


class Strategy:
    """How one model is trained. The attributes are valid after `setup`.

    The interface is the eight methods without underscore; what else subclasses override has one. "Collective"
    in a docstring: all ranks make the call, in the same order among collectives.
    """

    model: nn.Module
    """what a recipe calls: the module, or a wrapper around it"""
    module: nn.Module
    """the module that the recipe built, with the parameter names that the user knows"""
    optimizer: Optimizer
    """not set for a model that is held fixed (a teacher)"""
    layout: Layout
    """shapes of the whole, ties, parameter groups, number of parameters"""

    _grad_average_size = 1
    """ranks over which the backend averages gradients; `backward` undoes it, since the contract is a sum"""

    _cache_casts = True
    """whether autocast may cache weights in half precision; not where a rank holds parts of them"""

    def __init__(self, world: WorldInfo, options: Options) -> None:
        """Raises ValueError, for the user to read, for options that this strategy cannot honor."""
        self._world = world
        self._options = options
        self._loss_scale = precision.LossScale(options.precision == "fp16")
        self._trainable: list[nn.Parameter] = []
        self._parameter_groups: list[dict[str, Any]] = []

    # setup --------------------------------------------------------------------------------------------------

    def setup(self, build_model: BuildModel, build_optimizer: BuildOptimizer | None, blocks: Blocks) -> None:
        """Build the model, checkpoint activations, compile, shard, then build the optimizer. Collective.

        `build_model` returns the same weights on every rank. `blocks(module)` are the repeated parts of the
        model, the unit of activation checkpointing, compilation and sharding; none means the model as a
        whole. Without `build_optimizer` the model is held fixed. Raises ValueError, for the user to read, if
        model, optimizer and options do not go together or a library's version lacks what is needed.
        """
        torch_compat.check()
        module = self._build(build_model)
        if build_optimizer is None:
            module.requires_grad_(False).eval()
        self._transform_blocks(module, list(blocks(module)))
        self.module = module
        self.model = self._shard(module, blocks)
        self._trainable = [p for p in module.parameters() if p.requires_grad]
        if build_optimizer is not None:
            self._attach(build_optimizer)
        self.layout = Layout(
            shapes={f"model/{name}": self._shard_of(tensor).shape for name, tensor in unique_state(module)},
            tied=tied_names(module),
            parameter_groups=self._parameter_groups,
            num_parameters=sum(math.prod(self._shard_of(p).shape) for p in module.parameters()),
        )

    def _transform_blocks(self, module: nn.Module, blocks: list[nn.Module]) -> None:
        """Apply `activation_checkpointing=` and `compile=` to the blocks, in place."""
        mode = str(self._options.activation_checkpointing)
        checkpointed = activation_checkpointing.select_blocks(blocks, mode)
        # Around what is compiled: the other way round, blocks with a BatchNorm would silently run uncompiled.
        # But a choice of operators has to be compiled in: from around a compiled block none can be seen.
        selective = mode == "selective"
        if self._options.compile:
            inside = activation_checkpointing.checkpointed_forward if selective else None
            torch_compile.compile_blocks(blocks or [module], self._options.compile, inside)
        if not (self._options.compile and selective):
            activation_checkpointing.checkpoint_blocks(checkpointed, selective)

    def _build(self, build_model: BuildModel) -> nn.Module:
        """The model with its initial weights, the same under every strategy."""
        module = build_model()
        initialize(module, self._options.seed)
        return module

    def _shard(self, module: nn.Module, blocks: Blocks) -> nn.Module:  # noqa: ARG002
        """Move the parameters to where they are kept, and return what the recipe calls."""
        return module.to(self._world.device)

    def _attach(self, build_optimizer: BuildOptimizer) -> None:
        """Build the optimizer. Raises ValueError if it leaves a parameter out, which nobody would zero."""
        self.optimizer = build_optimizer(self.module)
        use_fused_update(self.optimizer, self.module)
        self._parameter_groups = describe_parameter_groups(self.optimizer, self.module)
        optimized = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if left_out := [name for name, p in trained.items() if id(p) not in optimized]:
            raise ValueError(
                f"trainable but not in the optimizer: {first_names(left_out)}; "
                "give them to it, or freeze them (requires_grad_(False))"
            )

    # one step -----------------------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward AND backward of one micro-batch of a step (gradient accumulation; DDP's `no_sync`).

        Gradients are reduced over the ranks in the `last` one only, unless an option says otherwise.
        Collective: all ranks take the same number of micro-batches, and `last` in the same one. Raises
        ValueError if
        `last` is false under an option that does not go with gradient accumulation.
        """
        if not last:
            torch_compile.refuse_accumulation(self._options.compile, self._world.device)
        with self.inference():
            yield

    def inference(self) -> AbstractContextManager[object]:
        """Around forward of one evaluation batch: mixed precision (autocast). `micro_batch` enters it itself.

        Collective where parameters are sharded (fsdp, zero3): there each forward pass gathers them.
        """
        torch_compile.begin_step(self._options.compile)
        return precision.autocast(self._options.precision, self._world.device, self._cache_casts)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Around a micro-batch of another model: this one is called and differentiated through, not trained.

        Its parameters do not require gradients meanwhile. Collective as `inference` is.
        """
        for parameter in self._trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._trainable:
                parameter.requires_grad_(True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (a scalar), this micro-batch's share of the global mean. Collective.

        After the last micro-batch each gradient is the sum over all micro-batches and ranks; the caller never
        rescales.
        """
        factor = self._loss_scale.value * self._grad_average_size
        with precision.autocast_off(self._options.precision, self._world.device):
            self._backward(loss if factor == 1 else loss * factor)

    def _backward(self, loss: Tensor) -> None:
        """The backward pass of an already scaled loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, apply: bool = True) -> Tensor:
        """Unscale, clip, update, zero the gradients. Returns the gradient norm before clipping. Collective.

        The norm is that of the whole model, a scalar on the device, the same on all ranks. Under fp16 a step
        whose norm is not finite is skipped, on all ranks alike. `apply=False` drops the gradients of the step
        instead, and returns NaN; that is not collective, but all ranks must decide alike.
        """
        if not apply:
            self._drop_gradients()
            return torch.full((), math.nan)
        scale = self._loss_scale.value
        norm = self._squared_grad_norm().sqrt().float() / scale
        if self._loss_scale.accept(norm):
            self._clip(norm, scale)
            self._update()
        else:
            self._drop_gradients()
        return norm

    def _gradients(self) -> list[Tensor]:
        """The gradients, as far as this rank holds them; plain tensors that may be changed in place."""
        return [p.grad for p in self._trainable if p.grad is not None]

    def _squared_grad_norm(self) -> Tensor:
        """Sum of the squares of all gradients over all ranks, still scaled under fp16; a float64 scalar."""
        return squared_norm(self._gradients(), self._world.device)

    def _clip(self, norm: Tensor, scale: float) -> None:
        """Divide the gradients by `scale` and clip them, in one pass. `norm` is already unscaled."""
        gradients = self._gradients()
        if not gradients:
            return
        if self._options.clip_norm is not None:
            factor = (self._options.clip_norm / (norm + 1e-6)).clamp(max=1.0) / scale
            torch_compat.foreach_multiply(gradients, factor.to(gradients[0]))
        elif scale != 1.0:
            torch_compat.foreach_multiply(gradients, 1.0 / scale)
        if self._options.clip_value is not None:
            torch_compat.foreach_clamp(gradients, self._options.clip_value)

    def _update(self) -> None:
        """Step the optimizer and free the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _drop_gradients(self) -> None:
        """Free the gradients without a step."""
        self.optimizer.zero_grad(set_to_none=True)

    # state --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, TensorSlice]:
        """The slices that this rank writes; those of all ranks together cover each tensor exactly once.

        Names are `model/NAME`, `optimizer/NAME/KEY` and `loss_scale`, the same under every strategy (a
        sharded state dict). The values share memory with the model where they can. Not collective.
        """
        shards = {f"model/{name}": self._shard_of(tensor) for name, tensor in unique_state(self.module)}
        for name, parameter in self.module.named_parameters() if self._trainable else ():
            for key, shard in self._optimizer_shards(parameter).items():
                shards[f"optimizer/{name}/{key}"] = shard
        loss_scale = [self._loss_scale.value, self._loss_scale.good_steps]
        shards["loss_scale"] = self._copy_on_each_rank(torch.tensor(loss_scale, dtype=torch.float64))
        return {name: part for name, shard in shards.items() if (part := shard.owned()) is not None}

    def load_state(self, reader: StateReader, weights_only: bool = False) -> None:
        """Read what this rank holds, whatever strategy and world size wrote it. Collective.

        `weights_only` reads the parameters and buffers that `reader` has and leaves the others, the optimizer
        and the loss scale as they are. Else all of a saved state is read, and what it lacks of the
        optimizer's state (a step that was never made) is dropped. Passes on what `reader` raises.
        """
        saved = reader.shapes
        for name, tensor in unique_state(self.module):
            if f"model/{name}" in saved:
                load_shard(self._shard_of(tensor), f"model/{name}", reader)
        if weights_only:
            return
        self._loss_scale.restore(reader.read("loss_scale", 0, 2))
        if not self._trainable:
            return
        self.optimizer.state.clear()
        parameters = dict(self.module.named_parameters())
        for entry, shape in saved.items():
            kind, _, rest = entry.partition("/")
            name, _, key = rest.rpartition("/")
            if kind != "optimizer" or not parameters[name].requires_grad:
                continue
            if (shard := self._new_optimizer_shard(parameters[name], key, tuple(shape))) is not None:
                load_shard(shard, entry, reader)

    def _shard_of(self, tensor: Tensor) -> Shard:
        """This rank's part of a parameter, a buffer, or a tensor of the optimizer's state."""
        return self._copy_on_each_rank(tensor)

    def _copy_on_each_rank(self, tensor: Tensor) -> Shard:
        """A tensor that every rank holds whole."""
        return Shard(tensor.detach(), 0, tuple(tensor.shape), self._world.rank, self._world.world_size)

    def _optimizer_shards(self, parameter: nn.Parameter) -> dict[str, Shard]:
        """This rank's parts of one parameter's optimizer state, by key; empty before the first step."""
        state = self.optimizer.state.get(parameter, {})
        return {key: self._shard_of(value) for key, value in state.items() if isinstance(value, Tensor)}

    def _new_optimizer_shard(self, parameter: nn.Parameter, key: str, shape: Shape) -> Shard | None:
        """Make room for a saved entry in the optimizer's state; None if it is not to be read."""
        value = empty_optimizer_state(self.optimizer, parameter, key, shape)
        self.optimizer.state[parameter][key] = value
        return self._shard_of(value)


def first_names(names: list[str], limit: int = 10) -> str:
    """The names for a message: the first few and how many more."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
