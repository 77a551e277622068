"""Text as options: windows of one file, as a function of their index.

A sample is (x, y), int64 [block] each, y being x one token on. Validation and test are the tail of the text:
windows drawn at random would have neighbours in the training part.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.parts.data import Splits
from recipes.parts.option_types import Fraction, OptionGroup, PositiveInt

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Tokens = NDArray[np.integer[Any]]

STDLIB_BYTES = 2_000_000
"""how much of the standard library is read: an epoch on two CPU ranks should end"""


@dataclass(kw_only=True)
class Text(OptionGroup):
    """`data.*`"""

    path: str | None = None
    """any text file (default: the source code of this Python's standard library, 2 MB of it)"""
    tokens: Literal["bytes", "chars"] = "bytes"
    """bytes: 256 tokens, whatever the file holds; chars: the characters that occur in it, read as UTF-8"""
    block: PositiveInt = 128
    """tokens of a window: what the model sees at once"""
    stride: PositiveInt | None = None
    """tokens from one window to the next (default: block, so that windows don't overlap)"""
    val: Fraction = 0.05
    """fraction of the text, before the test, held out for validation"""
    test: Fraction = 0.05
    """fraction of the text, at its end, held out for the test"""

    def check(self, declared: Text | None = None) -> None:  # noqa: ARG002  # every option has an effect
        """Raise ValueError or FileNotFoundError, in one line for the user, without importing torch."""
        if self.val + self.test >= 1:
            raise ValueError(f"data.val={self.val} and data.test={self.test} must be below 1 together")
        if self.path is not None:
            if not Path(self.path).is_file():
                raise FileNotFoundError(
                    f"data.path={self.path} is no file: give a text file, or leave it out"
                )
            size = Path(self.path).stat().st_size
            if size <= self.block:
                raise ValueError(
                    f"data.path={self.path} holds {size} bytes: data.block={self.block} must be less"
                )

    @cached_property
    def vocabulary(self) -> list[str] | None:
        """The characters by token, or None: tokens are bytes. Needs no torch."""
        return sorted(set(self._decoded)) if self.tokens == "chars" else None

    @property
    def vocabulary_size(self) -> int:
        """Number of different tokens."""
        return 256 if self.vocabulary is None else len(self.vocabulary)

    def build(self) -> Splits:
        """Windows of the head, and of the two tails, of the text."""
        self.check()
        tokens = self._read()
        sizes = {
            name: int(len(tokens) * fraction) for name, fraction in (("val", self.val), ("test", self.test))
        }
        train = len(tokens) - sum(sizes.values())
        for name, size in {"train": train, **sizes}.items():
            if 0 < size <= self.block or (size == 0 and getattr(self, name, 1) > 0):
                raise ValueError(
                    f"data.{name} is {size} tokens of {len(tokens)}: "
                    f"a window needs data.block + 1 = {self.block + 1}; "
                    "give a larger share, a smaller block, or 0 to go without"
                )
        return Splits(
            train=self._windows(tokens[:train]),
            val=self._windows(tokens[train : train + sizes["val"]]) if sizes["val"] else None,
            test=self._windows(tokens[train + sizes["val"] :]) if sizes["test"] else None,
        )

    def _windows(self, tokens: Tokens) -> Windows:
        import torch

        return Windows(torch.from_numpy(tokens), self.block, self.stride or self.block)

    def _read(self) -> Tokens:
        import numpy as np

        if self.tokens == "chars":
            points = np.frombuffer(self._decoded.encode("utf-32-le"), dtype=np.uint32)
            return np.unique(points, return_inverse=True)[1].astype(np.int32)
        if self.path is None:
            return np.frombuffer(bytearray(stdlib_source()), dtype=np.uint8)
        # mapped, not read: the pages of a large file are shared by all ranks and workers of a node
        return np.memmap(self.path, dtype=np.uint8, mode="c")

    @cached_property
    def _decoded(self) -> str:
        raw = stdlib_source() if self.path is None else Path(self.path).read_bytes()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"data.path={self.path} is not UTF-8 at byte {error.start}"
            raise ValueError(f"{where}: data.tokens=chars needs that, or take data.tokens=bytes") from error


class Windows:
    """Window i of `tokens` starts at i * stride; a tail too short for one is left out."""

    def __init__(self, tokens: Tensor, block: int, stride: int) -> None:
        self.tokens, self.block, self.stride = tokens, block, stride

    def __len__(self) -> int:
        return (len(self.tokens) - self.block - 1) // self.stride + 1

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.stride
        window = self.tokens[start : start + self.block + 1].long()
        return window[:-1], window[1:]

    @property
    def nbytes(self) -> int:
        """Of the tokens, with those between the windows."""
        return self.tokens.nbytes

    def to(self, device: str) -> Windows:
        """The same text in the memory of `device`."""
        return Windows(self.tokens.to(device), self.block, self.stride)

    def batch(self, indices: Tensor, seeds: Callable[[], Tensor]) -> list[Tensor]:  # noqa: ARG002  # nothing is drawn
        """x and y, int64 [n, block] each."""
        import torch

        starts = indices.to(self.tokens.device) * self.stride
        windows = self.tokens[starts[:, None] + torch.arange(self.block + 1, device=starts.device)].long()
        return [windows[:, :-1], windows[:, 1:]]


def stdlib_source(limit: int = STDLIB_BYTES) -> bytes:
    """The top-level modules of this Python's standard library, sorted by name, up to `limit` bytes of whole
    characters.
    """
    source = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source += path.read_bytes()
        if len(source) >= limit:
            break
    return source[:limit].decode("utf-8", errors="ignore").encode("utf-8")
