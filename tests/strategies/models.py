"""Small models with the awkward parts of big ones, and their data. Sizes divide by no number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

Batch = tuple[Tensor, Tensor]


def as_tensor(output: Any) -> Tensor:
    """What a module returns, which torch leaves untyped."""
    assert isinstance(output, Tensor)
    return output


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.gelu(self.inner(x))


class MLP(nn.Module):
    """Its head has fewer rows than four ranks; `scale` has no dimension to shard."""

    def __init__(self, frozen: bool = False, scalar: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 13)
        residuals = [Residual(13) for _ in range(2)]
        self.blocks = nn.ModuleList(residuals)
        self.head = nn.Linear(13, 3)
        self.scale = nn.Parameter(torch.tensor(1.5)) if scalar else None
        if frozen:
            self.stem.requires_grad_(False)
            residuals[1].inner.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.head(x)
        return x if self.scale is None else x * self.scale


class ConvBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        # no bias before a BatchNorm: its gradient is rounding noise, which Adam would blow up
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(functional.relu(self.norm(self.conv(x))), self.dropout, self.training)


class CNN(nn.Module):
    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 7, 3, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(7, dropout) for _ in range(2))
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return as_tensor(self.head(x.mean((2, 3))))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + as_tensor(self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True)))


class GPT(nn.Module):
    """A transformer whose head is its embedding. `tie_blocks` makes two of its blocks share a weight too."""

    def __init__(self, tie_blocks: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 10)
        parts = [(Attention(10), Residual(10)) for _ in range(3)]
        self.blocks = nn.ModuleList(nn.Sequential(*pair) for pair in parts)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 17, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.linspace(-0.5, 0.5, 10), persistent=False)
        if tie_blocks:
            parts[2][1].inner.weight = parts[0][1].inner.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.shift
        for block in self.blocks:
            x = block(x)
        return as_tensor(self.head(self.norm(x)))


class DrawnGPT(GPT):
    """Its weights are a function of the seed and the module's name."""

    def init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
            elif isinstance(module, nn.LayerNorm) and parameter is module.weight:
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": MLP,
    "frozen": lambda: MLP(frozen=True),
    "scalar": lambda: MLP(scalar=True),
    "cnn": CNN,
    "batchnorm": lambda: CNN(dropout=0.0),
    "gpt": GPT,
    "tied-blocks": lambda: GPT(tie_blocks=True),
    "drawn": DrawnGPT,
}


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("blocks").children())


def optimizer(name: str, model: nn.Module) -> Optimizer:
    """Two groups with learning rates of their own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "lr": 0.01, "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "lr": 0.003, "weight_decay": 0.0},
    ]
    return AdamW(groups) if name == "adamw" else SGD(groups, momentum=0.9)


def batch(model: str, step: int, index: int) -> Batch:
    """Micro-batch `index` of the global batch of `step`."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    if model in ("gpt", "tied-blocks", "drawn"):
        tokens = torch.randint(17, (3, 8), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]
    shape = (4, 1, 6, 6) if model in ("cnn", "batchnorm") else (4, 6)
    return torch.randn(shape, generator=generator), torch.randint(3, (4,), generator=generator)


def loss_sum(model: nn.Module, data: Batch) -> Tensor:
    return functional.cross_entropy(model(data[0]).flatten(0, -2).float(), data[1].flatten(), reduction="sum")
