"""The micro-batches of each step, copied to the GPU while the step before is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from launch.data.batch import tensors_of, to_device
from launch.data.loader import Loader
from recipes.parts.data import Batch


def group_micro_batches(loader: Loader, accumulation_steps: int) -> Iterator[list[Batch]]:
    """The micro-batches of one optimizer step at a time."""
    batches: list[Batch] = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == accumulation_steps:
            yield batches
            batches = []


def prefetch(steps: Iterator[list[Batch]], device: str, channels_last: bool) -> Iterator[list[Batch]]:
    """The micro-batches of each step on `device`; on a GPU those of the next one are made ready while this
    one is computed.
    """
    if device == "cpu":
        yield from steps
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has left it so
    side.wait_stream(torch.cuda.current_stream())  # for data that were moved to the GPU
    ready = copy_next(side, steps, device, channels_last)
    while ready is not None:
        following = copy_next(side, steps, device, channels_last)
        yield wait_for_copy(*ready)
        ready = following


def copy_next(
    side: torch.cuda.Stream, steps: Iterator[list[Batch]], device: str, channels_last: bool
) -> tuple[list[Batch], torch.cuda.Event] | None:
    """The next micro-batches, and when they will be ready. Data on the GPU make theirs there: on the same
    stream, too.
    """
    with torch.cuda.stream(side):
        batches = next(steps, None)
        return (
            None
            if batches is None
            else ([to_device(b, device, channels_last) for b in batches], side.record_event())
        )


def wait_for_copy(batches: list[Batch], event: torch.cuda.Event) -> list[Batch]:
    """The batches, for whose copies the computation waits; their memory is kept until it is done with them."""
    stream = torch.cuda.current_stream()
    stream.wait_event(event)
    for tensor in tensors_of(batches):
        tensor.record_stream(stream)
    return batches
