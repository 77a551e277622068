"""`strategy=ddp`: torch's DistributedDataParallel. Each rank holds the whole model and all-reduces gradients.

While gradients are accumulated (gradient accumulation, DDP's `no_sync`) nothing is reduced: only the last
micro-batch of a step goes through DDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from strategies import torch_compat
from strategies.base import Blocks, Strategy, first_names
from strategies.bypass import bypassed
from strategies.options import Options
from strategies.world_info import WorldInfo


class BypassableDDP(DistributedDataParallel):
    """DDP that passes calls on to the module while `bypass` is set.

    `no_sync` does nearly the same, but with a static graph even it makes the reducer wait in the first step.
    """

    bypass = False

    @override
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self.bypass:
            return self.module(*inputs, **kwargs)
        return super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]


class DDP(Strategy):
    """DistributedDataParallel around the model; one that is held fixed is not wrapped: nothing to reduce."""

    def __init__(self, world: WorldInfo, options: Options) -> None:
        super().__init__(world, options)
        self._grad_average_size = world.world_size
        self._ddp: BypassableDDP | None = None
        self._reduces = False
        """whether DDP reduces gradients in the backward pass of this micro-batch"""
        self._unused: list[str] = []
        """parameters that got no gradient in this step; `step` complains"""
        chosen = options.ddp
        if chosen.static_graph and chosen.find_unused_parameters:
            raise ValueError(
                "ddp.static_graph=true with ddp.find_unused_parameters=true: a static graph finds unused "
                "parameters once, in the first step; drop one of the two keys"
            )
        if chosen.bucket_mb < 1:
            raise ValueError(
                f"ddp.bucket_mb={chosen.bucket_mb}: a bucket holds at least 1 MB; the default is 25"
            )

    @override
    def _shard(self, module: nn.Module, blocks: Blocks) -> nn.Module:
        module = super()._shard(module, blocks)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        device = torch.device(self._world.device)
        self._ddp = BypassableDDP(
            module,
            device_ids=None if device.type == "cpu" else [device.index or 0],
            # running statistics are averaged before evaluation and saving, not copied from rank zero in each
            # forward pass
            **torch_compat.no_buffer_sync(),
            gradient_as_bucket_view=True,
            bucket_cap_mb=self._options.ddp.bucket_mb,
            static_graph=self._options.ddp.static_graph,
            find_unused_parameters=self._options.ddp.find_unused_parameters,
        )
        torch_compat.check_ddp(self._ddp)
        if self._options.ddp.compress == "bf16":
            self._ddp.register_comm_hook(None, bf16_compress_hook)
        return self._ddp

    @override
    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """As in the base class. It is forward that makes the reducer wait for the next backward pass."""
        if self._options.ddp.static_graph and not last:
            # torch 2.14: under no_sync an assertion fails in the first step, else the second is wrong
            raise ValueError(
                "ddp.static_graph=true does not go with gradient accumulation: DDP reduces wrong gradients. "
                "Drop the key, or set micro_batch_size so that each rank takes its part of a batch at once"
            )
        self._reduces = last
        with nullcontext() if last else self._bypassed(), super().micro_batch(last):
            yield

    @override
    @contextmanager
    def frozen(self) -> Iterator[None]:
        with super().frozen(), self._bypassed():
            yield

    @override
    def _backward(self, loss: Tensor) -> None:
        super()._backward(loss)
        if self._ddp is not None and self._reduces:
            self._complete_reduction(self._ddp, loss)

    @override
    def step(self, apply: bool = True) -> Tensor:
        """As in the base class. Raises RuntimeError if a parameter got no gradient in the whole step."""
        unused, self._unused = self._unused, []
        if unused and apply:
            self._drop_gradients()
            raise RuntimeError(
                f"no gradient for {first_names(unused)}: not used by the loss. "
                "Set ddp.find_unused_parameters=true, or freeze what is never used (requires_grad_(False))"
            )
        return super().step(apply)

    def _complete_reduction(self, ddp: BypassableDDP, loss: Tensor) -> None:
        """Give the parameters that the last micro-batch did not use a zero gradient.

        The reducer waits for each of its parameters: without one, its bucket is never reduced here, and the
        ranks that did use it wait for this one until the process group times out. The gradient of earlier
        micro-batches is not lost.
        """
        if (error := torch_compat.incomplete_reduction(ddp)) is None:
            return
        reached = nodes_behind(loss)
        missing = {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and get_gradient_edge(parameter).node not in reached
        }
        if not missing:
            raise error
        self._unused = [name for name, parameter in missing.items() if parameter.grad is None]
        parameters = list(missing.values())
        torch.autograd.backward(parameters, [torch.zeros_like(parameter) for parameter in parameters])

    def _bypassed(self) -> AbstractContextManager[object]:
        """Let calls of the model go past DDP, if it is wrapped."""
        return nullcontext() if self._ddp is None else bypassed(self._ddp)


def nodes_behind(loss: Tensor) -> set[Node]:
    """The autograd nodes that a backward pass from `loss` runs."""
    nodes: set[Node] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [previous for previous, _ in node.next_functions]
    return nodes
