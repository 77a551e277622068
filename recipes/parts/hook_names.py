"""Methods of other frameworks, and old names of this one, in a recipe: nothing would ever call them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipes.base import Recipe

LOSS = "loss(self, model, batch), the loss summed over the batch's items"
EVAL_STEP = "eval_step(self, model, batch), which returns loss, predictions and targets for metrics()"
DATA = "build_data(self), which returns Splits(train=, val=, test=)"

FOREIGN = {
    "training_step": ("Lightning", LOSS),
    "validation_step": ("Lightning", EVAL_STEP),
    "test_step": ("Lightning", EVAL_STEP),
    "configure_optimizers": ("Lightning", "build_optimizer(self, model)"),
    "configure_model": ("Lightning", "build_model(self)"),
    "train_dataloader": ("Lightning", DATA),
    "val_dataloader": ("Lightning", DATA),
    "test_dataloader": ("Lightning", DATA),
    "compute_loss": ("the Hugging Face Trainer", LOSS),
    "create_optimizer": ("the Hugging Face Trainer", "build_optimizer(self, model)"),
    "get_train_dataloader": ("the Hugging Face Trainer", DATA),
    "forward": ("nn.Module", "build_model(self), which returns the module, and loss(self, model, batch)"),
}
"""name -> whose it is, and what it is called here"""
OLD = {
    "evaluate": (("model", "batch"), EVAL_STEP),
    "score": (("models", "batch"), "eval_step_models(self, models, batch)"),
    "count": (("batch",), "num_items(self, batch)"),
    "count_per_sample": ((), "items_per_sample(self)"),
}
"""former name -> its arguments after self, and what it is called now"""
PLURAL = {
    "loss": "losses",
    "eval_step": "eval_step_models",
    "build_model": "models",
    "build_optimizer": "optimizers",
}
"""what a recipe of several models overrides instead"""


def refuse_foreign_hooks(owner: type[Recipe]) -> None:
    """Raise ValueError for a method of `owner` that has another framework's name, or an old one, for a
    method of the contract.

    Only where it cannot be a helper of the user's own: the contract's method is not overridden beside it,
    no method of the recipe mentions it, and an old name still has its old arguments.
    """
    methods = dict(own_methods(owner))
    mentioned = {name for method in methods.values() for name in names_in(method.__code__)}
    for name, method in methods.items():
        if name in mentioned:
            continue
        if name in FOREIGN:
            framework, ours = FOREIGN[name]
            what = f"a method of {framework} that nothing calls here"
        elif name in OLD and tuple(inspect.signature(method).parameters)[1:] == OLD[name][0]:
            what, ours = "the old name of a method", OLD[name][1]
        else:
            continue
        hook = ours.partition("(")[0]
        if hook not in methods and PLURAL.get(hook) not in methods:
            raise ValueError(f"{owner.__name__}.{name} is {what}; override {ours}")


def own_methods(owner: type[Recipe]) -> Iterator[tuple[str, FunctionType]]:
    """The methods that users wrote: those of `owner` and its bases outside of this package."""
    for base in reversed(owner.__mro__):
        if base.__module__.partition(".")[0] not in ("recipes", "builtins"):
            yield from ((name, item) for name, item in vars(base).items() if isinstance(item, FunctionType))


def names_in(code: CodeType) -> Iterator[str]:
    """The attributes and globals that a function mentions, in the functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
