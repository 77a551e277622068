"""`strategy=fsdp`: torch's FSDP2 (`fully_shard`). Parameters, gradients and optimizer state are sharded by
dim 0.

Mixed precision is the loop's autocast, as under every strategy: parameters stay fp32, no
MixedPrecisionPolicy.
`fsdp.shard=full` frees the gathered parameters after forward (`reshard_after_forward`), `grad` keeps them
until the last backward of a step, `hybrid` (HSDP) shards within groups of ranks. Gradients are summed, not
averaged, by the reductions themselves.
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
from typing_extensions import override

from strategies import torch_compat
from strategies.base import Blocks, BuildModel, BuildOptimizer, Strategy
from strategies.deferred_init import build_without_weights, initialize, materialize
from strategies.grad_norm import squared_norm
from strategies.options import Options
from strategies.sharded_state import Shard, StateReader, TensorSlice
from strategies.world_info import WorldInfo


class FSDP(Strategy):
    """`fully_shard` on each block and on the root.

    Scalar parameters, which cannot be sharded, are held whole; their gradients are reduced in `step`.
    """

    _cache_casts = False

    def __init__(self, world: WorldInfo, options: Options) -> None:
        super().__init__(world, options)
        check_options(world, options)
        self._hybrid = options.fsdp.shard == "hybrid"
        self._mesh = build_mesh(world, options)
        self._units: list[FSDPModule] = []
        """what was given to `fully_shard`, the root last"""
        self._scalars: list[nn.Parameter] = []

    # setup --------------------------------------------------------------------------------------------------

    @override
    def _build(self, build_model: BuildModel) -> nn.Module:
        """On the meta device if the model can initialize its weights shard by shard (in `_shard`)."""
        return build_without_weights(build_model) or super()._build(build_model)

    @override
    def _shard(self, module: nn.Module, blocks: Blocks) -> nn.Module:
        """Shard block by block, then the rest. Weights on the meta device are initialized just before."""
        offload = CPUOffloadPolicy() if self._options.fsdp.cpu_offload else OffloadPolicy()
        # None: reshard after forward, but not the root, which backward needs first
        reshard_after_forward = False if self._options.fsdp.shard == "grad" else None
        for part in [*separate_blocks(module, blocks(module)), module]:
            if uninitialized := materialize(part):
                initialize(module, self._options.seed, uninitialized)
            scalars = {parameter for parameter in part.parameters() if parameter.ndim == 0}
            unit = fully_shard(
                part,
                mesh=self._mesh,
                reshard_after_forward=reshard_after_forward,
                offload_policy=offload,
                ignored_params=scalars,
            )
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # else a factor of one goes through NCCL's PreMulSum
            self._units.append(unit)
        torch_compat.check_fsdp(self._units[-1], torch.device(self._world.device))
        for parameter in module.parameters():
            if parameter.ndim == 0:
                parameter.data = parameter.data.to(self._world.device)
                self._scalars.append(parameter)
        return module

    @override
    def _attach(self, build_optimizer: BuildOptimizer) -> None:
        super()._attach(build_optimizer)
        if self._scalars:
            split_scalars(self.optimizer)

    # one step -----------------------------------------------------------------------------------------------

    @override
    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """As in the base class. Under `fsdp.sync_every_micro_batch` gradients are reduced in each."""
        self._set_gradient_sync(last or self._options.fsdp.sync_every_micro_batch)
        for unit in self._units if self._options.fsdp.shard == "grad" else ():
            unit.set_reshard_after_backward(last, recurse=False)
        with super().micro_batch(last):
            yield

    @override
    @contextmanager
    def frozen(self) -> Iterator[None]:
        """As in the base class.

        What autograd sees are the gathered parameters, and these take over `requires_grad` when they are
        gathered. So none may stay gathered on entry or exit: the root does, after a forward pass that no
        backward followed. And a gradient that is being accumulated must not be reduced by another model's
        backward.
        """
        self._reshard()
        self._set_gradient_sync(False)
        with super().frozen():
            try:
                yield
            finally:
                self._reshard()
                torch_compat.clear_fsdp_forward_record(self._units[-1])

    @override
    def step(self, apply: bool = True) -> Tensor:
        if apply and self._scalars:
            self._reduce_scalars()
        return super().step(apply)

    @override
    def _gradients(self) -> list[Tensor]:
        """The local shards: a list may not mix DTensors and plain tensors."""
        return [local_part(gradient) for gradient in super()._gradients()]

    @override
    def _squared_grad_norm(self) -> Tensor:
        """As in the base class; one reduction of one number. Scalars are held whole, and counted once."""
        gradients = super()._gradients()
        shards = [local_part(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
        scalars = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        square = squared_norm(shards, self._world.device)
        distributed.all_reduce(square, group=self._mesh.get_group("shard"))
        return square + squared_norm(scalars, self._world.device)

    def _set_gradient_sync(self, enabled: bool) -> None:
        """Whether the next backward pass reduces gradients."""
        for unit in self._units:
            unit.set_requires_gradient_sync(enabled, recurse=False)

    def _reduce_scalars(self) -> None:
        """Sum the gradients of the scalars over the ranks; where one was not used it counts as zero."""
        trained = [parameter for parameter in self._scalars if parameter.requires_grad]
        packed = torch.zeros(2, len(trained), device=self._world.device)
        for index, parameter in enumerate(trained):
            if parameter.grad is not None:
                packed[0, index], packed[1, index] = parameter.grad, 1.0
        distributed.all_reduce(packed)
        for index, parameter in enumerate(trained):
            parameter.grad = packed[0, index].to(parameter) if packed[1, index] else None

    # state --------------------------------------------------------------------------------------------------

    def _reshard(self) -> None:
        """Free what is gathered, so that the module's parameters are the shards. No communication."""
        for unit in self._units:
            unit.reshard()

    @override
    def state(self) -> dict[str, TensorSlice]:
        self._reshard()
        return super().state()

    @override
    def load_state(self, reader: StateReader, weights_only: bool = False) -> None:
        self._reshard()  # else the next forward pass would still use the old values of what is gathered
        super().load_state(reader, weights_only)

    @override
    def _shard_of(self, tensor: Tensor) -> Shard:
        """A DTensor's shard is a contiguous range of the flattened tensor: whole rows. Hybrid copies it."""
        if not isinstance(tensor, DTensor):
            return super()._shard_of(tensor)
        index, shards = self._mesh.get_local_rank("shard"), self._mesh["shard"].size()
        rows, width = tensor.shape[0], tensor.shape[1:].numel()
        start = min(-(-rows // shards) * index, rows) * width
        copy, copies = 0, 1
        if self._hybrid:
            copy, copies = self._mesh.get_local_rank("replicate"), self._mesh["replicate"].size()
        return Shard(local_part(tensor), start, tuple(tensor.shape), copy, copies)


def check_options(world: WorldInfo, options: Options) -> None:
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
        divisors = [n for n in range(1, world.world_size + 1) if world.world_size % n == 0]
        given = "the ranks of one node" if chosen.shard_size is None else "fsdp.shard_size"
        raise ValueError(
            f"fsdp.shard=hybrid in groups of {size} ({given}) does not divide {world.world_size} ranks: "
            f"set fsdp.shard_size to one of {', '.join(map(str, divisors))}"
        )


def hybrid_size(world: WorldInfo, options: Options) -> int:
    """Ranks in a group that holds one copy of the model under `fsdp.shard=hybrid` (HSDP)."""
    return world.local_world_size if options.fsdp.shard_size is None else options.fsdp.shard_size


def build_mesh(world: WorldInfo, options: Options) -> DeviceMesh:
    """All ranks in a row, or under hybrid (copies, ranks that share one)."""
    kind = torch.device(world.device).type
    if options.fsdp.shard != "hybrid":
        return init_device_mesh(kind, (world.world_size,), mesh_dim_names=("shard",))
    size = hybrid_size(world, options)
    return init_device_mesh(kind, (world.world_size // size, size), mesh_dim_names=("replicate", "shard"))


def separate_blocks(module: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks that are sharded by themselves, inner ones first; the root shards what the others hold.

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
    """Move plain parameters to groups of their own: fused updates refuse a mix with DTensors."""
    for group in list(optimizer.param_groups):
        plain = [p for p in group["params"] if not isinstance(p, DTensor)]
        if 0 < len(plain) < len(group["params"]):
            group["params"] = [p for p in group["params"] if isinstance(p, DTensor)]
            optimizer.add_param_group({**group, "params": plain})


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; a plain tensor as it is."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
