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
    """The micro-batches of each step on `device`; on a GPU those of the next step are copied, on a stream of
    their own, while this one is computed.
    """
    if device == "cpu":
        yield from steps
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has left it so
    side.wait_stream(torch.cuda.current_stream())  # for a data set that was moved to the GPU
    ready = copy_next(side, steps, device, channels_last)
    while ready is not None:
        following = copy_next(side, steps, device, channels_last)
        yield wait_for_copy(*ready)
        ready = following


def copy_next(
    side: torch.cuda.Stream, steps: Iterator[list[Batch]], device: str, channels_last: bool
) -> tuple[list[Batch], torch.cuda.Event] | None:
    """Start to copy the micro-batches of the next step on the stream `side`: they, and the event of their
    arrival. A data set on the GPU makes its batches there, on the same stream.
    """
    with torch.cuda.stream(side):
        batches = next(steps, None)
        if batches is None:
            return None
        return [to_device(batch, device, channels_last) for batch in batches], side.record_event()


def wait_for_copy(batches: list[Batch], event: torch.cuda.Event) -> list[Batch]:
    """Let the computation wait for the copies of `batches`, and keep their memory until it has used them."""
    stream = torch.cuda.current_stream()
    stream.wait_event(event)
    for tensor in tensors_of(batches):
        tensor.record_stream(stream)
    return batches
