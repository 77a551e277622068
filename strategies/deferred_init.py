"""Weight initialization on the meta device: no rank has to hold the whole model to initialize its shard.

Initial weights are a function of (seed, name of the module) for a model with a method
`init_weights(self, module)`, which initializes the parameters that `module` itself (not its children) holds,
from torch's default generator. It is called for each module that holds any. Other models initialize their
weights when they are built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook


def initialize(model: nn.Module, seed: int, modules: Collection[nn.Module] | None = None) -> None:
    """Initialize the weights of `model`, or of some of its `modules`; does nothing without `init_weights`."""
    if not has_init_weights(model):
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            if (modules is None or module in modules) and any(True for _ in module.parameters(recurse=False)):
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                # on the host: all kinds of devices start from the same weights
                torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                model.init_weights(module)  # type: ignore[operator]


def has_init_weights(model: nn.Module) -> bool:
    """Whether the weights of `model` are a function of the seed and the names of its modules."""
    return callable(getattr(model, "init_weights", None))


def build_without_weights(build_model: Callable[[], nn.Module]) -> nn.Module | None:
    """The model with its parameters on the meta device, or None for one that cannot be built so.

    Only a model with `init_weights` can, since the weights drawn here are lost. Its buffers are real: nothing
    could restore position ids and rotary tables.
    """
    try:
        with torch.random.fork_rng(devices=[]), _parameters_on_meta():
            model = build_model()
    except Exception:  # it may read a parameter's value; a real mistake shows when it is built on the host
        return None
    return model if has_init_weights(model) and not any(b.is_meta for b in model.buffers()) else None


def materialize(module: nn.Module) -> set[nn.Module]:
    """Move parameters from the meta device to the host. Returns the modules that have to initialize them."""
    allocated: dict[int, nn.Parameter] = {}  # ties stay ties
    uninitialized: set[nn.Module] = set()
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                if id(parameter) not in allocated:
                    empty = torch.empty_like(parameter, device="cpu")
                    allocated[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                part.register_parameter(name, allocated[id(parameter)])
                uninitialized.add(part)
    return uninitialized


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as it is registered, before its module initializes it.

    `torch.device("meta")` would take the buffers along, and every tensor that a constructor computes with.
    """
    moved: dict[int, tuple[Tensor, nn.Parameter]] = {}  # keeps the original: its id must not be reused

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:  # noqa: ARG001
        if parameter.is_meta:
            return parameter
        empty = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
        return moved.setdefault(id(parameter), (parameter, empty))[1]

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # may return one
    try:
        yield
    finally:
        handle.remove()
