"""The manifest of a checkpoint: what it says, and whether it can be true. Imports no torch.

The file is one JSON object, {"digest": ..., "manifest": {...}}; the digest is that of the inner object as it
stands in the file.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from launch.checkpoint.tensor_file import SIZES
from launch.runtime.files import digest, write_text_atomically

NAME = "manifest.json"
FORMAT = 1
RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")
HEAD, TAIL = '{{"digest": "{}", "manifest": ', "}\n"


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was saved; the message names the file."""


@dataclass(kw_only=True)
class FileEntry:
    """One rank's file."""

    name: str
    size: int
    """bytes"""
    digest: str


@dataclass(kw_only=True)
class TensorEntry:
    """One tensor, whole, and where its parts lie."""

    dtype: str
    """as safetensors names it: F32, BF16, ..."""
    shape: list[int]
    cuts: list[int]
    """positions in the flattened tensor: 0, where it was cut, its number of elements"""
    files: list[int]
    """file `files[i]` (an index into `Manifest.files`) holds the elements [cuts[i], cuts[i+1])"""
    offsets: list[int]
    """from which byte of that file on"""

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)


@dataclass(kw_only=True)
class Manifest:
    """What a checkpoint says of itself."""

    format: int = FORMAT
    step: int
    """optimizer steps done"""
    samples: int
    """samples seen, which is the position in the stream of samples"""
    time: float
    """seconds since the epoch, when it was taken"""
    progress: dict[str, Any]
    """`launch.state.progress.TrainState.state()`"""
    config: dict[str, Any]
    """every key of the run, as resolved"""
    train_samples: int
    optimizers: dict[str, list[dict[str, Any]]]
    """by model: its parameter groups, `Strategy.groups`"""
    tied: dict[str, dict[str, str]]
    """by model: further names of parameters, and the name that each is saved under"""
    versions: dict[str, str]
    writer: dict[str, Any]
    """strategy, world_size and the like: who wrote, which a reader may ignore"""
    files: list[FileEntry] = field(default_factory=list)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    def problem(self, folder: Path) -> str:
        """In words, which file in `folder` is missing or has another size; empty if none. Reads no file."""
        for file in self.files:
            try:
                size = (folder / file.name).stat().st_size
            except OSError as error:
                return f"{file.name} is missing ({error.strerror})"
            if size != file.size:
                return f"{file.name} has {size:,} bytes of {file.size:,}"
        return ""

    def check(self) -> None:
        """Raises ValueError if what it says cannot be true."""
        if self.format != FORMAT:
            raise ValueError(f"format {self.format} is not the {FORMAT} that this version of rankzero reads")
        for file in self.files:  # a name from a file must never lead out of its folder
            if not RANK_FILE.fullmatch(file.name):
                raise ValueError(f"{file.name!r} is no name of a rank's file")
        if len({file.name for file in self.files}) != len(self.files):
            raise ValueError("a file is listed twice")
        for name, entry in self.tensors.items():
            if entry.dtype not in SIZES:
                raise ValueError(f"{name} has the unknown type {entry.dtype}")
            if min(entry.shape, default=0) < 0 or entry.cuts[:1] != [0] or entry.cuts[-1] != entry.numel:
                raise ValueError(f"{name} is not covered from 0 to its last element")
            if len(entry.files) != len(entry.cuts) - 1 or any(
                first >= second for first, second in pairwise(entry.cuts)
            ):
                raise ValueError(f"the parts of {name} are not in order")
            if entry.files and not (min(entry.files) >= 0 and max(entry.files) < len(self.files)):
                raise ValueError(f"{name} lies in a file that is not listed")
            if len(entry.offsets) != len(entry.files) or min(entry.offsets, default=0) < 0:
                raise ValueError(f"it is not said where in its files {name} lies")

    def write(self, folder: Path) -> None:
        """Write it into the folder of its checkpoint."""
        self.check()
        body = json.dumps(asdict(self))
        write_text_atomically(folder / NAME, f"{HEAD.format(digest(body.encode()))}{body}{TAIL}")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a checkpoint. Raises ValueError if there is none, Damaged if it was changed or
        makes no sense.
        """
        from pydantic import ValidationError

        path = folder / NAME
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder} is not a checkpoint: it has no {NAME}") from None
        start = len(HEAD.format("0" * 32))
        body = content[start : -len(TAIL)]
        if content != HEAD.format(digest(body)).encode() + body + TAIL.encode():
            raise DamagedCheckpoint(f"{path} is damaged: its digest does not agree")
        try:
            found: Manifest = adapter().validate_json(body)
            found.check()
        except ValidationError as error:
            first = error.errors()[0]
            raise DamagedCheckpoint(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except ValueError as error:
            raise DamagedCheckpoint(f"{path}: {error}") from None
        return found


@cache
def adapter() -> Any:
    """What checks the types of a manifest."""
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)
