"""Initial weights as a function of (seed, name of the module): no rank has to hold the whole model to draw
its part.

A model takes part by a method `init_weights(self, module)`, which draws the parameters that `module` itself
(not its children) holds, from torch's default generator. It is called for each module that holds any. Other
models draw their weights when they are built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def initialize(model: nn.Module, seed: int, modules: Collection[nn.Module] | None = None) -> None:
    """Draw the weights of `model`, or those of some of its `modules`; nothing for a model without
    `init_weights`.
    """
    if not offers_init_weights(model):
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            if (modules is None or module in modules) and any(True for _ in module.parameters(recurse=False)):
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                # on the host: all kinds of devices start from the same weights
                torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                model.init_weights(module)  # type: ignore[operator]


def offers_init_weights(model: nn.Module) -> bool:
    """Whether the weights of `model` are a function of the seed and the names of its modules."""
    return callable(getattr(model, "init_weights", None))


def build_without_weights(build_model: Callable[[], nn.Module]) -> nn.Module | None:
    """The model with its parameters on the meta device, or None for one that cannot be built so.

    Only a model that offers `init_weights` can, since the weights drawn here are lost. Its buffers are real:
    nothing could restore position ids and rotation tables.
    """
    try:
        with torch.random.fork_rng(devices=[]), _parameters_on_meta():
            model = build_model()
    except (
        Exception
    ):  # say, it reads a value of a parameter: if anything is wrong with it, the build on the host will say
        return None
    return model if offers_init_weights(model) and not any(b.is_meta for b in model.buffers()) else None


def materialize(module: nn.Module) -> set[nn.Module]:
    """Give the parameters of `module` on the meta device memory on the host; returns the modules that have to
    draw them.
    """
    made: dict[int, nn.Parameter] = {}  # ties stay ties
    undrawn: set[nn.Module] = set()
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device="cpu")
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                part.register_parameter(name, made[id(parameter)])
                undrawn.add(part)
    return undrawn


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as it is registered, before its module initialises it.

    `torch.device("meta")` would take the buffers along, and every tensor that a constructor computes with.
    """
    register = nn.Module.register_parameter
    moved: dict[
        int, tuple[Tensor, nn.Parameter]
    ] = {}  # holds the original, else its id could be given to another

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            empty = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
            param = moved.setdefault(id(param), (param, empty))[1]
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
