"""Seeding: random numbers as a function of the position in a run, not of what was drawn before.

What is drawn depends on (seed, optimizer step, micro-batch of the global batch) on the device, and on (seed,
epoch, sample) in data loading: never on the number of ranks or workers, and a resumed run draws what the
uninterrupted one drew.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from launch.runtime.torch_private import seed_host_generator
from recipes.parts import permutation


def mix(*parts: int | str) -> int:
    """A 63-bit seed from any numbers and names, the same on every machine; similar inputs give unrelated
    seeds.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_device(*parts: int | str) -> None:
    """Seed torch's default generators, host and device: dropout and all other draws of a forward pass."""
    seed = mix(*parts)
    seed_host_generator(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)


def seed_sample(*parts: int | str) -> None:
    """Seed what an augmentation may draw from: torch's host generator, numpy and random."""
    seed = mix(*parts)
    seed_host_generator(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def sample_seeds(epochs: NDArray[np.int64], indices: NDArray[np.int64], *parts: int | str) -> Tensor:
    """A seed for each sample of a batch, int64 [n]: what `seed_sample` is for one, at the cost of one."""
    hashed = permutation.mix(
        permutation.mix(epochs.astype(np.uint64) + np.uint64(mix(*parts))) + indices.astype(np.uint64)
    )
    return torch.from_numpy(hashed.view(np.int64))
