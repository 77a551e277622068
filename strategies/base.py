"""The strategy interface, and its meaning on a single device: the base class IS `strategy=single`, no special
mode.

One strategy holds one model and its optimizer. A recipe with several models (GAN, teacher and student) has
one each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies import activation_checkpointing, precision, torch_compile
from strategies.fused_optimizer import fuse
from strategies.grad_norm import squared_norm
from strategies.options import Options
from strategies.sharded_state import (
    StateReader,
    TensorSlice,
    described_groups,
    empty_optimizer_state,
    slice_for_rank,
    unique_state,
)
from strategies.weight_init import initialize


class World(Protocol):
    """The ranks of a run, as far as a strategy has to know them (`launch.runtime.world.World` is one)."""

    @property
    def rank(self) -> int:
        """0 to `world_size` - 1."""

    @property
    def world_size(self) -> int:
        """Ranks of the run."""

    @property
    def local_world_size(self) -> int:
        """Ranks on this node."""

    @property
    def device(self) -> str:
        """Of this rank: `cpu` or `cuda:N`."""


CHUNK = 2**22
"""elements that are read from a checkpoint at a time: memory of that size is used again, larger pieces are
faulted in anew
"""

BuildModel = Callable[[], nn.Module]
BuildOptimizer = Callable[[nn.Module], Optimizer]
Blocks = Callable[[nn.Module], Iterable[nn.Module]]


class Strategy:
    """How one model is trained. Valid after `setup`: `model` (call it), `module` (it, unwrapped),
    `optimizer`.

    A model that was set up without optimizer (a fixed teacher) has no `optimizer`, nothing `trainable` and no
    `groups`, which are the optimizer's parameter groups as plain data.
    """

    model: nn.Module
    module: nn.Module
    optimizer: Optimizer

    _grad_average_size = 1
    """ranks over which the backend averages gradients; `backward` undoes it, since the contract is a sum"""

    _cache_casts = True
    """whether autocast may keep weights in half precision from one use to the next; not where a rank holds
    parts of them
    """

    def __init__(self, world: World, options: Options) -> None:
        """Raises ValueError, in words for the user, for options that this strategy cannot honour."""
        self.world = world
        self.options = options
        self.loss_scale = precision.LossScale(options.precision == "fp16")
        self.trainable: list[nn.Parameter] = []
        self.groups: list[dict[str, Any]] = []

    # setup --------------------------------------------------------------------------------------------------

    def setup(self, build_model: BuildModel, build_optimizer: BuildOptimizer | None, blocks: Blocks) -> None:
        """Build, compile, checkpoint activations, shard, then build the optimizer: the order of all
        strategies.

        `build_model` returns the same weights on every rank. `blocks(module)` are the repeated parts of the
        model, the unit of activation checkpointing, compilation and sharding; an empty one means the model as
        a whole. Without
        `build_optimizer` the model is held fixed.
        """
        module = self.build(build_model)
        if build_optimizer is None:
            module.requires_grad_(False).eval()
        parts = list(blocks(module))
        recomputed = activation_checkpointing.select_blocks(parts, str(self.options.activation_checkpointing))
        # Around what is compiled: the other way round, blocks with a BatchNorm would silently run as they
        # are. But a choice of operations has to be compiled in: from around it none can be seen.
        selective = self.options.activation_checkpointing == "selective"
        inside = activation_checkpointing.checkpointed_forward if selective else None
        if self.options.compile:
            torch_compile.compile_parts(parts or [module], self.options.compile, inside)
        if not (self.options.compile and selective):
            activation_checkpointing.checkpoint_blocks(recomputed, selective)
        self.module = module
        self.model = self.shard(module, blocks)
        self.trainable = [p for p in module.parameters() if p.requires_grad]
        if build_optimizer is not None:
            self.attach(build_optimizer)

    def build(self, build_model: BuildModel) -> nn.Module:
        """The model with its initial weights, the same under every strategy."""
        module = build_model()
        initialize(module, self.options.seed)
        return module

    def shard(self, module: nn.Module, blocks: Blocks) -> nn.Module:  # noqa: ARG002
        """Move the parameters to where they live and return what the recipe calls."""
        return module.to(self.world.device)

    def attach(self, build_optimizer: BuildOptimizer) -> None:
        """Build the optimizer over the parameters as sharded."""
        self.optimizer = build_optimizer(self.module)
        fuse(self.optimizer, self.module)
        self.groups = described_groups(self.optimizer, self.module)
        optimized = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        if forgotten := [
            n for n, p in self.module.named_parameters() if p.requires_grad and id(p) not in optimized
        ]:
            # nobody would zero their gradients, and clipping would count them
            raise ValueError(
                f"trainable but not in the optimizer: {listed(forgotten)}; "
                "give them to it, or freeze them (requires_grad_(False))"
            )

    def parameter_count(self) -> int:
        """Parameters of the whole model, over all ranks; tied ones count once."""
        return sum(p.numel() for p in self.module.parameters())

    # one step -----------------------------------------------------------------------------------------------

    def inference(self) -> AbstractContextManager[object]:
        """The compute precision, around each batch of an evaluation; `micro_batch` enters it by itself."""
        torch_compile.begin(self.options.compile)
        return precision.autocast(self.options.precision, self.world.device, self._cache_casts)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward AND backward of one micro-batch; gradients are reduced over ranks in the `last` of a
        step only.
        """
        if not last:
            torch_compile.refuse_accumulation(self.options.compile, self.world.device)
        with self.inference():
            yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Around the micro-batch of another model of the recipe: called, differentiated through, but not
        trained.
        """
        for parameter in self.trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.trainable:
                parameter.requires_grad_(True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, this micro-batch's share of the global mean.

        After the last micro-batch each gradient is the sum over all micro-batches and ranks; the caller never
        rescales.
        """
        factor = self.loss_scale.value * self._grad_average_size
        with precision.autocast_off(self.options.precision, self.world.device):
            (loss if factor == 1 else loss * factor).backward()  # type: ignore[no-untyped-call]

    def step(self) -> Tensor:
        """Unscale, clip, update, zero the gradients. Returns the true global gradient norm before clipping
        (scalar).

        Under fp16 a step whose norm is not finite is skipped, on all ranks alike.
        """
        scale = self.loss_scale.value
        norm = self.grad_norm() / scale
        if self.loss_scale.accept(norm):
            self.clip(norm, scale)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def discard(self) -> None:
        """Drop the gradients of this step instead of making it."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> list[Tensor]:
        """The gradients, as far as they live on this rank."""
        return [p.grad for p in self.trainable if p.grad is not None]

    def grad_norm(self) -> Tensor:
        """2-norm of all gradients as they are (still scaled under fp16), over all ranks."""
        return self.squared_grad_norm().sqrt().float()

    def squared_grad_norm(self) -> Tensor:
        """The sum of squares behind `grad_norm`, in float64."""
        return squared_norm(self.gradients(), self.world.device)

    def clip(self, norm: Tensor, scale: float) -> None:
        """Divide the gradients by `scale` and clip them, in one pass over them. `norm` is already unscaled."""
        gradients = self.gradients()
        if not gradients:
            return
        if self.options.clip_norm is not None:
            factor = (self.options.clip_norm / (norm + 1e-6)).clamp(max=1.0) / scale
            torch._foreach_mul_(gradients, factor.to(gradients[0]))
        elif scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        if self.options.clip_value is not None:
            torch._foreach_clamp_min_(gradients, -self.options.clip_value)
            torch._foreach_clamp_max_(gradients, self.options.clip_value)

    # state --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, TensorSlice]:
        """The ranges that this rank writes; those of all ranks together cover each tensor exactly once.

        Names are `model/NAME`, `optimizer/NAME/KEY` and `loss_scale`, the same under every strategy.
        """
        tensors = {f"model/{name}": tensor for name, tensor in unique_state(self.module)}
        for name, parameter in self.module.named_parameters() if self.trainable else ():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value
        tensors["loss_scale"] = torch.tensor(
            [self.loss_scale.value, self.loss_scale.good_steps], dtype=torch.float64
        )
        return {
            name: written for name, tensor in tensors.items() if (written := self.written(tensor)) is not None
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of parameters and buffers, whole, by the names that `state` gives them."""
        return {f"model/{name}": self.whole_shape(tensor) for name, tensor in unique_state(self.module)}

    def whole_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of the whole of which `tensor` is this rank's part."""
        return tuple(tensor.shape)

    def load_weights(self, saved: StateReader) -> None:
        """Read this rank's part of the parameters and buffers that `saved` has; the others stay as they are."""
        shapes = saved.shapes
        for name, tensor in unique_state(self.module):
            if f"model/{name}" in shapes:
                self.fill(tensor, f"model/{name}", saved)

    def load_state(self, saved: StateReader) -> None:
        """Read the ranges that this rank keeps, whatever the strategy and world size of the writer."""
        self.load_weights(saved)
        names = dict(self.module.named_parameters())
        if self.trainable:
            self.optimizer.state.clear()  # what was not saved (a step that was never made) must not survive
        for entry, shape in saved.shapes.items():
            kind, _, rest = entry.partition("/")
            name, _, key = rest.rpartition("/")
            if kind == "optimizer" and names[name].requires_grad:
                value = empty_optimizer_state(self.optimizer, names[name], key, shape)
                self.fill(value, entry, saved)
                self.optimizer.state[names[name]][key] = value
        self.loss_scale.restore(saved.read("loss_scale", 0, 2))

    def local(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The part of `tensor` that lives on this rank, and where it starts in the flattened whole."""
        return tensor.detach(), 0

    def written(self, tensor: Tensor) -> TensorSlice | None:
        """The range of `tensor` that is this rank's to write, if any."""
        start, stop = slice_for_rank(tensor.numel(), self.world.rank, self.world.world_size)
        return (
            TensorSlice(tensor.detach().reshape(-1)[start:stop], start, tuple(tensor.shape))
            if stop > start
            else None
        )

    def fill(self, tensor: Tensor, name: str, saved: StateReader) -> None:
        """Read this rank's part of `tensor` from `saved`."""
        part, start = self.local(tensor)
        if not part.is_contiguous():
            part.copy_(saved.read(name, start, start + part.numel()).view(part.shape))
            return
        flat = part.view(-1)
        for first in range(0, len(flat), CHUNK):
            last = min(first + CHUNK, len(flat))
            flat[first:last].copy_(saved.read(name, start + first, start + last))

    def export(self) -> dict[str, Tensor]:
        """All of the model, whole, on the host, with plain names; on rank zero (elsewhere empty). All ranks
        call it.
        """
        return (
            {name: self.whole(tensor) for name, tensor in unique_state(self.module)}
            if self.world.rank == 0
            else {}
        )

    def whole(self, tensor: Tensor) -> Tensor:
        """The full tensor on the host."""
        return tensor.detach().cpu().clone().contiguous()


def listed(names: list[str], limit: int = 10) -> str:
    """The names for a message: the first few and how many more."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
