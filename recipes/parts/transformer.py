"""A decoder-only transformer (Vaswani et al. 2017) with the habits of GPT-2: pre-norm, tied head, scaled
residuals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STD = 0.02
"""of GPT-2's initial weights (Radford et al. 2019)"""


class Attention(nn.Module):
    """Causal self-attention with all heads in one projection."""

    def __init__(self, width: int, heads: int, dropout: float, layers: int) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(
            width, 3 * width, bias=False
        )  # a bias of the keys would shift all scores alike: no gradient
        self.out = residual_projection(width, width, layers)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] to the same."""
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        mixed: Tensor = self.out(x.transpose(1, 2).reshape(batch, time, width))
        return mixed


class Block(nn.Module):
    """Attention and a feed-forward network, each on a normalized input, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float, layers: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, layers)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = residual_projection(4 * width, width, layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] to the same."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        hidden = F.gelu(self.up(self.norm2(x)), approximate="tanh")
        hidden = self.dropout(self.down(hidden))
        return torch.add(x, hidden)


class Decoder(nn.Module):
    """Tokens [batch, time] to logits [batch, time, vocabulary]; may be built on the meta device."""

    def __init__(
        self,
        *,
        vocabulary: int,
        block: int,
        width: int = 128,
        heads: int = 4,
        layers: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(block, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, layers) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each of `tokens`."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def init_weights(self, module: nn.Module) -> None:
        """Draw the parameters that `module`, one of this model's, holds itself; to be called for each of
        them.

        One module at a time, so that a caller may seed each by its name and hold only a part of the model in
        memory.
        """
        if module is self.head:
            return  # tied: drawn with the embedding
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=STD * getattr(module, "residual_scale", 1.0))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


def residual_projection(inputs: int, outputs: int, layers: int) -> nn.Linear:
    """A Linear that adds to the residual stream, one of 2 * layers that do: its weights start that much
    smaller.
    """
    linear = nn.Linear(inputs, outputs)
    linear.residual_scale = 1 / math.sqrt(2 * layers)  # type: ignore[assignment]
    return linear
