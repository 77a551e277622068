from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

from recipes.parts.optim import Optim, decay_groups
from tests.recipes.checking import check_options


def test_each_name_builds_torchs_optimizer_with_its_options() -> None:
    model = nn.Linear(3, 2)
    sgd = Optim(name="sgd", lr=0.2, momentum=0.8, nesterov=True, weight_decay=0.01).build(model.parameters())
    assert type(sgd) is torch.optim.SGD
    assert (
        sgd.defaults.items() >= {"lr": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}.items()
    )
    names: dict[Literal["adam", "adamw"], type[torch.optim.Optimizer]]
    names = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    for name, kind in names.items():
        adam = Optim(name=name, **options).build(model.parameters())
        assert type(adam) is kind
        assert adam.defaults.items() >= options.items()


def test_groups_keep_their_own_learning_rates() -> None:
    body, head = nn.Linear(3, 3), nn.Linear(3, 2)
    groups: list[dict[str, Any]] = [{"params": body.parameters(), "lr": 0.01}, {"params": head.parameters()}]
    assert [group["lr"] for group in Optim(lr=0.5).build(groups).param_groups] == [0.01, 0.5]


def test_weights_decay_and_biases_and_norms_do_not() -> None:
    tied = nn.Linear(4, 7, bias=False)
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(7, 4),
            "conv": nn.Conv2d(1, 2, 3),
            "linear": nn.Linear(4, 4),
            "batch": nn.BatchNorm2d(2),
            "layer": nn.LayerNorm(4),
            "frozen": nn.Linear(2, 2),
            "tied": tied,
        }
    )
    tied.weight = model["embedding"].weight  # type: ignore[assignment]
    model["frozen"].requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, others = decay_groups(model)
    assert {names[p] for p in decayed["params"]} == {"embedding.weight", "conv.weight", "linear.weight"}
    assert {names[p] for p in others["params"]} == {
        *("conv.bias", "linear.bias", "batch.weight", "batch.bias", "layer.weight", "layer.bias")
    }
    optimizer = Optim(name="adamw", weight_decay=0.3).build([decayed, others])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_an_empty_group_is_left_out() -> None:
    assert len(decay_groups(nn.Linear(2, 2, bias=False))) == 1


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (Optim(name="adamw", momentum=0.5), "optim.momentum=0.5 has no effect under optim.name=adamw"),
        (Optim(betas=(0.5, 0.9)), r"optim.betas=\(0.5, 0.9\) has no effect under optim.name=sgd"),
        (Optim(lr=-1), r"optim.lr=-1 must be 0 or more \(default: 0.1\)"),
        (Optim(lr=float("nan")), "optim.lr=nan"),
        (Optim(momentum=1.0), r"optim.momentum=1.0 must be from 0 to below 1 \(default: 0.9\)"),
        (Optim(name="adam", betas=(0.9, 1.0)), r"optim.betas=\[0.9,1.0\]: each must be from 0 to below 1"),
        (Optim(momentum=0.0, nesterov=True), "optim.nesterov=true"),
    ],
)
def test_nonsense_is_refused(optim: Optim, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options("optim", optim)


def test_what_the_recipe_declares_is_not_held_against_the_user() -> None:
    Optim(name="sgd", betas=(0.9, 0.95)).check(Optim(name="adamw", betas=(0.9, 0.95)))
