"""What is trained: GPT-2 124M, ResNet-50 and ViT-S on numbers drawn at random, each model with its loss in
its `forward`.

So the loss can be compiled too: as it is, a cross entropy writes and reads each logit in fp32 several times
over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle, repeat
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from launch.data.sampler import sample_indices
from recipes.base import local_num_items
from recipes.parts.data import Batch
from recipes.parts.optim import decay_groups
from recipes.parts.transformer import Attention, Decoder
from strategies.precision import AUTOCAST
from tests.benchmarks.gpu_rows.timing import timed_window
from tests.benchmarks.loops import Setting
from tests.benchmarks.loops.workloads import COMPARED_STEPS, Workload, sharding_of

TILE = 8
"""samples of which the first batches are made"""

drawn: dict[str, nn.Module] = {}
"""initial weights on the host: drawing them takes longer than measuring a variant"""


@dataclass(kw_only=True)
class GpuWorkload(Workload):
    """A workload on a GPU, and how the raw loop trains it. rankzero reads precision and compilation from its
    configuration.
    """

    samples: int = 1024
    device: str = "cpu"
    precision: str = "fp32"
    compiled: bool = False
    fused: bool = False
    """the update of all parameters in one kernel"""
    tiled: int = 0
    """so many batches at the start are the same few samples over and over: their mean loss is that of any
    batch size
    """
    seconds: float = 0.0
    """length of the measured window"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.step_seconds: list[float] = []
        """seconds a step, once it has been measured"""
        self.peak = 0
        """the most bytes that it has held"""

    def architecture(self) -> tuple[Any, ...]:
        """All that the initial weights depend on."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum; notes the first means."""
        noted = len(self.first_losses) < COMPARED_STEPS
        if noted:
            self.sharding = sharding_of(model)
        loss: Tensor = model(*batch)
        if noted:
            self.first_losses.append(loss.detach().float() / local_num_items(self, batch))
        return loss

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW, slow enough for losses to stay comparable; torch's own choice of kernels unless `fused`."""
        return torch.optim.AdamW(
            decay_groups(model),
            lr=1e-4,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True if self.fused else None,
        )

    # for the raw loop ---------------------------------------------------------------------------------------

    def initial_model(self) -> nn.Module:
        """On the device, ready to be wrapped by a strategy."""
        key = f"{type(self).__name__}{self.architecture()}"
        if key not in drawn:
            drawn[key] = super().initial_model()
        module = deepcopy(drawn[key])
        for part in list(self.blocks(module)) or [module] if self.compiled else []:
            part.forward = torch.compile(part.forward)
        if self.precision in AUTOCAST:
            # within forward: DeepSpeed's engine switches off an autocast around itself
            autocast = torch.autocast(torch.device(self.device).type, AUTOCAST[self.precision])
            module.forward = autocast(module.forward)
        return module.to(self.device)

    def order(self, steps: int) -> Tensor:
        """As in the base class, over as many epochs as it takes."""
        indices = sample_indices(self.samples, 0, np.arange(steps * self.batch))[1]
        return torch.from_numpy(indices).view(steps, self.batch)

    def loader(self, steps: int, setting: Setting, batch_plan: bool = True) -> Iterator[Batch]:  # type: ignore[override]  # noqa: ARG002
        """Batches in the memory of the device, until a window has been measured."""
        return timed_window(self.on_device(), self.device, self.seconds, self.step_seconds)

    def on_device(self) -> Iterator[Batch]:
        """Without end: first what is tiled, then in the order of rankzero."""
        tensors = [tensor.to(self.device) for tensor in self.build_data().train.tensors]  # type: ignore[attr-defined]
        tile = torch.arange(self.batch, device=self.device) % TILE
        yield from repeat([tensor[tile] for tensor in tensors], self.tiled)
        for indices in cycle(
            self.order(128).to(self.device)
        ):  # indices from the host would be waited for in each step
            yield [tensor[indices] for tensor in tensors]


# language ---------------------------------------------------------------------------------------------------


class NaiveAttention(Attention):
    """As one wrote it before `scaled_dot_product_attention`: all scores of a head in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] to the same."""
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        to_come = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        shares = scores.masked_fill(to_come, -math.inf).softmax(-1)
        mixed: Tensor = self.out((shares @ v).transpose(1, 2).reshape(batch, time, width))
        return mixed


class SummedCrossEntropy(nn.Module):
    """A module, so that it can be compiled by itself."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """[..., classes] and [...] to a scalar."""
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


class LanguageModel(Decoder):
    """Tokens and those that follow, [batch, time] each, to the summed loss."""

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self.loss = SummedCrossEntropy()

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        """The loss."""
        loss: Tensor = self.loss(super().forward(tokens), targets)
        return loss


@dataclass(kw_only=True)
class GPT2(GpuWorkload):
    """GPT-2 124M (Radford et al. 2019), as `recipes.parts.transformer` builds it."""

    item_name: ClassVar[str] = "tokens"

    vocabulary: int = 50257
    multiple: int = 1
    """the embedding has rows up to the next multiple of this; those beyond the vocabulary are no token"""
    block: int = 1024
    width: int = 768
    heads: int = 12
    layers: int = 12
    naive: bool = False
    """attention by hand"""

    def architecture(self) -> tuple[Any, ...]:
        """The rest is how it is trained."""
        return self.vocabulary, self.multiple, self.block, self.width, self.heads, self.layers, self.naive

    def items_per_sample(self) -> int:
        """Tokens predicted."""
        return self.block

    def rows(self) -> tuple[Tensor, Tensor]:
        """Tokens, int64 [samples, block], and those that follow; some come more often than others, so that
        there is a curve.
        """
        shape = (self.samples, self.block + 1)
        text = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) ** 4 * self.vocabulary).long()
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def build_model(self) -> nn.Module:
        """The decoder with its loss."""
        vocabulary = -(-self.vocabulary // self.multiple) * self.multiple
        shape = {"block": self.block, "width": self.width, "heads": self.heads, "layers": self.layers}
        model = LanguageModel(vocabulary=vocabulary, **shape)
        for block in model.blocks if self.naive else ():
            block.attention = NaiveAttention(self.width, self.heads, 0.0, self.layers)
        return model

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The decoder blocks and the loss. The head belongs to neither: it shares its weights with the
        embedding.
        """
        return [*model.get_submodule("blocks").children(), model.get_submodule("loss")]


# pictures ---------------------------------------------------------------------------------------------------
