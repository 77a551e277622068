"""Images may come with their channels last, as a GPU convolves them faster: that is the activations' business
alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from strategies import strategy_class
from strategies.options import Options
from tests.ranks import CpuWorld, run_ranks
from tests.strategies.training import STRATEGIES, each


def build() -> nn.Module:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        for _ in range(2)
    ]
    return nn.Sequential(*blocks, nn.Conv2d(3, 5, 1))


def trained(world: CpuWorld, name: str, last: bool) -> tuple[list[float], dict[str, Tensor], bool]:
    """Losses, what is saved, and whether the activations had their channels last."""
    options = Options(**STRATEGIES[name], clip_norm=0.1)
    strategy = strategy_class(options.strategy)(world, options)
    strategy.setup(
        build, lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9), lambda m: list(m.children())[:2]
    )
    losses, followed = [], True
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + world.rank)
        images = torch.randn(4, 3, 6, 6, generator=generator)
        images = images.to(memory_format=torch.channels_last) if last else images
        with strategy.micro_batch(last=True):
            output = strategy.model(images)
            followed &= output.is_contiguous(memory_format=torch.channels_last)
            strategy.backward(output.square().mean())
        losses += [output.square().mean().item(), strategy.step().item()]
    state = {name: piece.values.clone() for name, piece in strategy.state().items()}
    return losses, state, followed


@pytest.mark.parametrize("strategy", each([name for name in STRATEGIES if name != "fsdp-hybrid"]))
def test_channels_last_inputs_change_neither_numbers_nor_what_is_saved(strategy: str) -> None:
    ranks = 1 if strategy == "single" else 2
    for (losses, state, followed), (expected, saved, _) in zip(
        run_ranks(ranks, trained, strategy, True), run_ranks(ranks, trained, strategy, False), strict=True
    ):
        assert followed  # through contiguous weights
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(state, saved, rtol=1e-4, atol=1e-5)
