"""Calls of a wrapped model that go past its wrapper (DDP's, DeepSpeed's) to the module itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bypassable(Protocol):
    """A wrapper whose `forward` calls the module itself while `bypass` is set."""

    bypass: bool


@contextmanager
def bypassed(model: Bypassable) -> Iterator[None]:
    """Let calls of `model` go to the module itself.

    A wrapper expects a backward pass after each call and reduces gradients in it: wrong while gradients are
    accumulated, or while the model is only called on the way of another one's training.
    """
    before, model.bypass = model.bypass, True
    try:
        yield
    finally:
        model.bypass = before
