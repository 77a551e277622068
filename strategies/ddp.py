"""`strategy=ddp`: torch's DistributedDataParallel. Each rank holds all of the model; gradients are averaged
in buckets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from strategies.base import Blocks, Strategy, World, listed
from strategies.options import Options

# renamed in torch 2.14, which warns of the old name at each use
_RENAMED = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


class DDP(Strategy):
    """DistributedDataParallel around the model; around a fixed one nothing, since there is nothing to reduce."""

    def __init__(self, world: World, options: Options) -> None:
        super().__init__(world, options)
        self._grad_average_size = world.world_size
        self.reducing: DistributedDataParallel | None = None
        self.unused: list[str] = []
        chosen = options.ddp
        if chosen.static_graph and chosen.find_unused_parameters:
            raise ValueError(
                "ddp.static_graph=true with ddp.find_unused_parameters=true: a static graph finds unused parameters once, "
                "in the first step; drop one of the two keys"
            )
        if chosen.bucket_mb < 1:
            raise ValueError(
                f"ddp.bucket_mb={chosen.bucket_mb}: a bucket holds at least 1 MB; the default is 25"
            )

    def shard(self, module: nn.Module, blocks: Blocks) -> nn.Module:
        """Wrap the module, if anything in it is trained."""
        module = super().shard(module, blocks)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        device = torch.device(self.world.device)
        model = DistributedDataParallel(
            module,
            device_ids=None if device.type == "cpu" else [device.index or 0],
            # running statistics are averaged before evaluation and saving, not copied from rank zero in each
            # forward
            **KEEP_BUFFERS,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self.options.ddp.bucket_mb,
            static_graph=self.options.ddp.static_graph,
            find_unused_parameters=self.options.ddp.find_unused_parameters,
        )
        if self.options.ddp.compress == "bf16":
            model.register_comm_hook(None, bf16_compress_hook)
        return model

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward AND backward: it is forward that arms the reducer, which then takes the next
        backward for its own.
        """
        if self.options.ddp.static_graph and not last:
            # torch 2.14: an assertion fails in the first step under no_sync; without it the second step is
            # wrong
            raise ValueError(
                "ddp.static_graph=true does not go with gradient accumulation: DDP would reduce wrong gradients; "
                "drop the key, or set micro_batch_size so that each rank takes its share of a batch at once"
            )
        self.reducing = self.model if last and isinstance(self.model, DistributedDataParallel) else None
        with nullcontext() if last else self._around_reducer(), super().micro_batch(last):
            yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """As in the base class; the backward that an armed reducer waits for never comes."""
        with super().frozen(), self._around_reducer():
            yield

    def backward(self, loss: Tensor) -> None:
        """As in the base class. Parameters without gradient are found here, and `step` complains."""
        super().backward(loss)
        if self.reducing is not None:
            self._finish_reduction(self.reducing)

    def step(self) -> Tensor:
        """As in the base class. Raises RuntimeError if a parameter got no gradient in the whole step."""
        if self.unused:
            names, self.unused = self.unused, []
            self.discard()
            raise RuntimeError(
                f"no gradient for {listed(names)}: not used by the loss. "
                "Set ddp.find_unused_parameters=true, or freeze what is never used (requires_grad_(False))"
            )
        return super().step()

    def _finish_reduction(self, model: DistributedDataParallel) -> None:
        """Give the parameters that the last micro-batch did not use a zero gradient.

        The reducer waits for each of its parameters: without one, its bucket is never reduced here, and the
        ranks that did use it wait for this one until the process group times out. The gradient of earlier
        micro-batches is not lost.
        """
        try:
            model.reducer._check_reducer_finalized()
        except (
            RuntimeError
        ) as error:  # how DDP puts it; it has no other way to ask which parameters are missing
            found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            if found is None:
                raise
            indices = [int(index) for index in found[1].split()]
        else:
            return
        trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        missing = [trained[index] for index in indices]
        self.unused = [name for name, parameter in missing if parameter.grad is None]
        torch.autograd.backward([p for _, p in missing], [torch.zeros_like(p) for _, p in missing])

    @contextmanager
    def _around_reducer(self) -> Iterator[None]:
        """Let calls of the model go to the module itself.

        `no_sync` does nearly the same, but under a static graph even it arms the reducer in the first step.
        """
        if self.model is self.module:
            yield
            return
        self.model.forward = self.module.__call__
        try:
            yield
        finally:
            del self.model.forward
