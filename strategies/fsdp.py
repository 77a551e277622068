"""`strategy=fsdp`: torch's FSDP2 (`fully_shard`). Each rank holds a dim-0 slice of each parameter, gradient
and optimizer tensor.

Parameters stay fp32 and autocast computes, as under every strategy: no MixedPrecisionPolicy. Gradients are
summed, not averaged, by the reductions themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from strategies.base import Blocks, BuildModel, BuildOptimizer, Strategy, World
from strategies.grad_norm import squared_norm
from strategies.options import Options
from strategies.sharded_state import StateReader, TensorSlice, slice_for_rank, unique_state
from strategies.weight_init import build_without_weights, initialize, materialize


class FSDP(Strategy):
    """`fully_shard` on each block and on the root.

    Scalar parameters, which cannot be sharded, are held whole; their gradients are reduced in `step`.
    """

    _cache_casts = False

    def __init__(self, world: World, options: Options) -> None:
        super().__init__(world, options)
        check_options(world, options)
        self.hybrid = options.fsdp.shard == "hybrid"
        self.mesh = build_mesh(world, options)
        self.units: list[FSDPModule] = []
        self.scalars: list[nn.Parameter] = []

    # setup --------------------------------------------------------------------------------------------------

    def build(self, build_model: BuildModel) -> nn.Module:
        """The model without weights if it can draw them part by part, after `shard` has made room for a part."""
        return build_without_weights(build_model) or super().build(build_model)

    def shard(self, module: nn.Module, blocks: Blocks) -> nn.Module:
        """Shard block by block, then the rest. Weights still to be drawn are drawn on the host and cut at
        once.
        """
        offload = CPUOffloadPolicy() if self.options.fsdp.cpu_offload else OffloadPolicy()
        # None: reshard after forward, but not the root, which backward needs first
        reshard = False if self.options.fsdp.shard == "grad" else None
        for part in [*separate_blocks(module, blocks(module)), module]:
            if undrawn := materialize(part):
                initialize(module, self.options.seed, undrawn)
            scalars = {parameter for parameter in part.parameters() if parameter.ndim == 0}
            unit = fully_shard(
                part,
                mesh=self.mesh,
                reshard_after_forward=reshard,
                offload_policy=offload,
                ignored_params=scalars,
            )
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # else a factor of one goes through NCCL's PreMulSum
            self.units.append(unit)
        for parameter in module.parameters():
            if parameter.ndim == 0:
                parameter.data = parameter.data.to(self.world.device)
                self.scalars.append(parameter)
        return module

    def attach(self, build_optimizer: BuildOptimizer) -> None:
        """Build the optimizer over the sharded parameters."""
        super().attach(build_optimizer)
        if self.scalars:
            split_scalars(self.optimizer)

    # one step -----------------------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Gradients stay whole on this rank until the last micro-batch, unless `fsdp.sync_every_micro_batch`."""
        self._reduce(last or self.options.fsdp.sync_every_micro_batch)
        for unit in self.units if self.options.fsdp.shard == "grad" else ():
            unit.set_reshard_after_backward(last, recurse=False)
        with super().micro_batch(last):
            yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """As in the base class.

        What autograd sees are the gathered parameters, and they take up `requires_grad` when they are
        gathered. So none may stay gathered across the border: the root does, after a forward pass that no
        backward followed. And a gradient that is being accumulated must not be reduced by another model's
        backward.
        """
        self.reshard()
        self._reduce(False)
        with super().frozen():
            try:
                yield
            finally:
                self.reshard()
                self._forget_calls()

    def step(self) -> Tensor:
        """As in the base class."""
        if self.scalars:
            self._reduce_scalars()
        return super().step()

    def gradients(self) -> list[Tensor]:
        """The local parts, in place: a list may not mix DTensors and plain tensors."""
        return [local_part(gradient) for gradient in super().gradients()]

    def squared_grad_norm(self) -> Tensor:
        """As in the base class; one reduction of one number. Scalars are held, and counted, whole on each
        rank.
        """
        gradients = super().gradients()
        shards = [local_part(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
        scalars = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        square = squared_norm(shards, self.world.device)
        distributed.all_reduce(square, group=self.mesh.get_group("shard"))
        return square + squared_norm(scalars, self.world.device)

    def _reduce(self, enabled: bool) -> None:
        for unit in self.units:
            unit.set_requires_gradient_sync(enabled, recurse=False)

    def _forget_calls(self) -> None:
        """Only a backward pass through FSDP2 clears its list of calls: for a model without one it would grow
        for ever.

        Its own `reset_iter_state` is too much: it discards gradients that are being accumulated.
        """
        calls: list[object] = getattr(
            self.units[-1]._get_fsdp_state()._comm_ctx, "post_forward_order", []
        )  # none before the first
        calls.clear()

    def _reduce_scalars(self) -> None:
        """Sum the gradients of the scalars over the ranks. A scalar that a rank did not use counts zero
        there.
        """
        trained = [parameter for parameter in self.scalars if parameter.requires_grad]
        packed = torch.zeros(2, len(trained), device=self.world.device)
        for index, parameter in enumerate(trained):
            if parameter.grad is not None:
                packed[0, index], packed[1, index] = parameter.grad, 1.0
        distributed.all_reduce(packed)
        for index, parameter in enumerate(trained):
            parameter.grad = packed[0, index].to(parameter) if packed[1, index] else None

    # state --------------------------------------------------------------------------------------------------

    def reshard(self) -> None:
        """Free what is gathered, so that the module's parameters are the shards. No communication."""
        for unit in self.units:
            unit.reshard()

    def state(self) -> dict[str, TensorSlice]:
        """As in the base class."""
        self.reshard()
        return super().state()

    def load_weights(self, saved: StateReader) -> None:
        """As in the base class."""
        self.reshard()  # else the next forward pass would still use the old values of what is gathered
        super().load_weights(saved)

    def local(self, tensor: Tensor) -> tuple[Tensor, int]:
        """A shard is a contiguous range of the flattened tensor: whole rows."""
        if not isinstance(tensor, DTensor):
            return super().local(tensor)
        shards, index = self.mesh["shard"].size(), self.mesh.get_local_rank("shard")
        rows, width = tensor.shape[0], tensor.shape[1:].numel()
        return local_part(tensor), min(-(-rows // shards) * index, rows) * width

    def written(self, tensor: Tensor) -> TensorSlice | None:
        """Copies of a shard (under hybrid) share the writing."""
        if not isinstance(tensor, DTensor):
            return super().written(tensor)
        part, offset = self.local(tensor)
        copies, copy = (
            (self.mesh["replicate"].size(), self.mesh.get_local_rank("replicate")) if self.hybrid else (1, 0)
        )
        start, stop = slice_for_rank(part.numel(), copy, copies)
        return (
            TensorSlice(part.reshape(-1)[start:stop], offset + start, tuple(tensor.shape))
            if stop > start
            else None
        )

    def export(self) -> dict[str, Tensor]:
        """As in the base class; gathers one tensor at a time."""
        self.reshard()
        exported: dict[str, Tensor] = {}
        for name, tensor in unique_state(self.module):
            full = self.gathered(tensor)
            if self.world.rank == 0:
                exported[name] = self.whole(full)
        return exported

    def gathered(self, tensor: Tensor) -> Tensor:
        """The full tensor, on every rank."""
        if not isinstance(tensor, DTensor):
            return tensor
        shard, _ = self.local(tensor)
        # an offloaded shard has to be where the network is
        moved = DTensor.from_local(
            shard.to(self.world.device),
            tensor.device_mesh,
            tensor.placements,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        return moved.full_tensor()


def check_options(world: World, options: Options) -> None:
    """Raise ValueError for options that contradict each other or have no effect."""
    chosen = options.fsdp
    if chosen.cpu_offload and torch.device(world.device).type == "cpu":
        raise ValueError(
            "fsdp.cpu_offload=true has no effect without a GPU: everything is in host memory; drop the key"
        )
    if chosen.shard != "hybrid":
        if chosen.shard_size is not None:
            raise ValueError(
                f"fsdp.shard_size={chosen.shard_size} has no effect with fsdp.shard={chosen.shard}: "
                "set fsdp.shard=hybrid, or drop fsdp.shard_size"
            )
        return
    size = hybrid_size(world, options)
    if size < 1 or world.world_size % size:
        possible = [n for n in range(1, world.world_size + 1) if world.world_size % n == 0]
        given = "the ranks of one node" if chosen.shard_size is None else "fsdp.shard_size"
        raise ValueError(
            f"fsdp.shard=hybrid in groups of {size} ({given}) does not divide {world.world_size} ranks: "
            f"set fsdp.shard_size to one of {', '.join(map(str, possible))}"
        )


def hybrid_size(world: World, options: Options) -> int:
    """Ranks that share one copy of the model under `fsdp.shard=hybrid`."""
    return world.local_world_size if options.fsdp.shard_size is None else options.fsdp.shard_size


def build_mesh(world: World, options: Options) -> DeviceMesh:
    """All ranks in a row, or under hybrid (copies, ranks that share one)."""
    kind = torch.device(world.device).type
    if options.fsdp.shard != "hybrid":
        return init_device_mesh(kind, (world.world_size,), mesh_dim_names=("shard",))
    size = hybrid_size(world, options)
    return init_device_mesh(kind, (world.world_size // size, size), mesh_dim_names=("replicate", "shard"))


def separate_blocks(module: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks that are sharded by themselves, inner ones first; the parameters of the others belong to the
    root.

    A parameter can be in one group only. So a block that shares one with anything outside it (a tie, a
    submodule used by two blocks) is left to the root, which is gathered as long as any of its users run.
    """
    chosen = set(blocks) - {module}
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    prefixes: dict[nn.Module, tuple[str, ...]] = defaultdict(tuple)
    for name, part in module.named_modules(remove_duplicate=False):
        prefixes[part] += (f"{name}.",)
    return [
        part
        for part in reversed(list(module.modules()))
        if part in chosen
        and all(name.startswith(prefixes[part]) for p in part.parameters() for name in names[p])
    ]


def split_scalars(optimizer: Optimizer) -> None:
    """Give plain parameters groups of their own: the fused and foreach updates refuse a list mixed with
    DTensors.
    """
    for group in list(optimizer.param_groups):
        plain = [p for p in group["params"] if not isinstance(p, DTensor)]
        if 0 < len(plain) < len(group["params"]):
            group["params"] = [p for p in group["params"] if isinstance(p, DTensor)]
            optimizer.add_param_group({**group, "params": plain})


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; a plain tensor as it is."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
