"""The fused update: taken where the recipe leaves the choice open, and the same numbers as torch's own
choice.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from strategies.fused_optimizer import use_fused_update


def model() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 1))


def steps(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        module(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in module.parameters()]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.01}),
        (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    ],
)
def test_it_gives_the_numbers_of_the_update_one_by_one(kind: Any, settings: dict[str, Any]) -> None:
    ours, theirs = model(), model()
    optimizer = kind(ours.parameters(), **settings)
    assert use_fused_update(optimizer, ours)
    assert all(group["fused"] for group in optimizer.param_groups)
    for one, other in zip(
        steps(ours, optimizer), steps(theirs, kind(theirs.parameters(), **settings)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "chosen", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"differentiable": True}]
)
def test_a_recipe_that_chooses_has_the_last_word(chosen: dict[str, bool]) -> None:
    module = model()
    settings: Any = chosen
    optimizer = torch.optim.AdamW(module.parameters(), **settings)
    assert not use_fused_update(optimizer, module)
    assert not optimizer.param_groups[0]["fused"]


def test_what_no_fused_update_can_do_is_left_to_torch() -> None:
    sparse = nn.Embedding(5, 3, sparse=True)
    assert not use_fused_update(torch.optim.SGD(sparse.parameters(), lr=0.1), sparse)

    class Mine(torch.optim.AdamW):
        """May override whatever the fused update would pass over."""

    module = model()
    assert not use_fused_update(Mine(module.parameters()), module)
    assert not use_fused_update(torch.optim.RMSprop(module.parameters()), module)
