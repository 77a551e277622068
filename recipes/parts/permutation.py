"""A pseudo-random permutation of range(size) as a function: no list, any position in O(1).

A generalized Feistel network with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
CT-RSA 2002, section 5, after Luby and Rackoff 1988). A position is a pair (left, right) in Z_a x Z_b with a *
b barely above `size`; each round adds a keyed hash of one half to the other, which is a bijection whatever
the hash. A result beyond `size` is sent through again until it falls inside; that happens to less than one
position in sqrt(size).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
ROUNDS = 6
"""Luby and Rackoff need 4 for a large domain; two more for the small ones, where a round mixes little"""


class Permutation:
    """`permutation[i]` of one position, `permutation(positions)` of an array; keyed by any integers."""

    def __init__(self, size: int, *key: int) -> None:
        """`size` from 1 to 2**62; the same size and key give the same permutation on every machine."""
        if not 1 <= size <= 2**62:
            raise ValueError(f"size={size}: a permutation needs 1 to 2**62 elements")
        self.size = size
        self.left = math.isqrt(size - 1) + 1
        self.right = -(-size // self.left)
        state = 0
        for word in key:
            state = mix((state + GOLDEN + word) & MASK)
        self.keys = [mix((state + i * GOLDEN) & MASK) for i in range(1, ROUNDS + 1)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        """Plain integers here: one position through numpy costs ten times as much."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} of a permutation of {self.size}")
        position = self._encrypt(int(position))
        while position >= self.size:
            position = self._encrypt(position)
        return position

    def __call__(self, positions: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Where each of `positions` (any shape, values in range(size)) goes."""
        import numpy as np

        walking = np.asarray(positions)
        if walking.size and not (walking.min() >= 0 and walking.max() < self.size):
            raise IndexError(f"positions {walking.min()} to {walking.max()} of a permutation of {self.size}")
        result = self._encrypt(walking.astype(np.uint64))
        while (outside := result >= self.size).any():
            result[outside] = self._encrypt(result[outside])
        order: NDArray[np.int64] = result.astype(np.int64)
        return order

    def _encrypt(self, value: Any) -> Any:
        """One pass through the network, of a Python int or of an array of uint64."""
        left, right = value // self.right, value % self.right
        for i, key in enumerate(self.keys):
            if i % 2 == 0:
                left = (left + mix((right + key) & MASK) % self.left) % self.left
            else:
                right = (right + mix((left + key) & MASK) % self.right) % self.right
        return left * self.right + right


def mix(value: Any) -> Any:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014; Vigna's constants): 64 bits to 64 bits, one to
    one.
    """
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
