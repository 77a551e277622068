"""Optimizers as options."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from recipes.parts.option_types import Fraction, NonNegativeFloat, OptionGroup, refuse_unused

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

USED_BY = {"momentum": ("sgd",), "nesterov": ("sgd",), "betas": ("adam", "adamw"), "eps": ("adam", "adamw")}


@dataclass(kw_only=True)
class Optim(OptionGroup):
    """`optim.*`"""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """the update rule; adam adds weight decay to the gradient (L2), adamw decouples it"""
    lr: NonNegativeFloat = 0.1
    """peak learning rate; schedule.* moves it"""
    weight_decay: NonNegativeFloat = 0.0
    """weight decay"""
    momentum: Fraction = 0.9
    """sgd: momentum"""
    nesterov: bool = False
    """sgd: Nesterov momentum"""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """adam, adamw: decay of the running averages of gradient and squared gradient"""
    eps: NonNegativeFloat = 1e-8
    """adam, adamw: added to the denominator"""

    def check(self, declared: Optim | None = None) -> None:
        """Raise ValueError for fields that do not go together; `declared` holds the recipe's defaults."""
        refuse_unused("optim", self, declared or Optim(), USED_BY)
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError(
                "optim.nesterov=true with optim.momentum=0: Nesterov's step follows the momentum, give one"
            )

    def build(self, parameters: Iterable[Tensor] | Iterable[dict[str, Any]]) -> Optimizer:
        """The optimizer over parameters, or over groups that may have their own `lr` and `weight_decay`."""
        import torch

        if self.name == "sgd":
            return torch.optim.SGD(
                parameters,
                lr=self.lr,
                momentum=self.momentum,
                nesterov=self.nesterov,
                weight_decay=self.weight_decay,
            )
        adam = torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam
        return adam(parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: weights decay by the optimizer's own amount, biases and the gains of norms not at all.

    Told apart by module, not by `ndim`: sharded parameters may be flat when the optimizer is built.
    """
    from torch import nn

    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    instance_norms = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    norms = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *batch_norms, *instance_norms)
    decayed: dict[nn.Parameter, None] = {}
    others: dict[nn.Parameter, None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                (others if name.endswith("bias") or isinstance(module, norms) else decayed)[parameter] = None
    groups: list[dict[str, Any]] = [{"params": list(decayed)}, {"params": list(others), "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
