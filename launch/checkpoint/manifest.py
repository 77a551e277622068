"""The manifest of a checkpoint: what it says, and whether that can be true. Imports no torch.

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

from launch.checkpoint.tensor_file import ITEM_SIZES
from launch.runtime.files import digest, write_text_atomically

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")
OPENING, CLOSING = '{{"digest": "{}", "manifest": ', "}\n"
"""what stands in the file before the inner object, and after it"""


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
    """One tensor, and where its fragments are stored."""

    dtype: str
    """as safetensors names it: F32, BF16, ..."""
    shape: list[int]
    """of the full tensor"""
    cuts: list[int]
    """positions in the flattened tensor: 0, where it was cut, its number of elements"""
    files: list[int]
    """file `files[i]` (an index into `Manifest.files`) holds the elements [cuts[i], cuts[i+1])"""
    offsets: list[int]
    """from which byte of that file on"""

    @property
    def numel(self) -> int:
        """Number of elements of the full tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the full tensor."""
        return self.numel * ITEM_SIZES[self.dtype]


@dataclass(kw_only=True)
class Manifest:
    """What a checkpoint says of itself. The names of the fields are those in the file."""

    format: int = FORMAT_VERSION
    step: int
    """optimizer steps done"""
    samples: int
    """samples seen, which is the position in the stream of samples"""
    time: float
    """seconds since the epoch, when the state was copied"""
    progress: dict[str, Any]
    """`launch.state.progress.TrainState.state()`"""
    config: dict[str, Any]
    """every key of the run, as resolved"""
    train_samples: int
    """size of the training set"""
    optimizers: dict[str, list[dict[str, Any]]]
    """by model: its parameter groups, as the strategy describes them"""
    tied: dict[str, dict[str, str]]
    """by model: further names of tied parameters, and the name that each is saved under"""
    versions: dict[str, str]
    writer: dict[str, Any]
    """strategy, world_size and the like: who wrote it, which a reader may ignore"""
    files: list[FileEntry] = field(default_factory=list)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def models(self) -> list[str]:
        """The names of the models whose state it lists."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.tensors))

    def size_error(self, folder: Path) -> str:
        """Which file in `folder` is missing or has another size; empty if none. Opens no file."""
        for file in self.files:
            try:
                size = (folder / file.name).stat().st_size
            except OSError as error:
                return f"{file.name} is missing ({error.strerror})"
            if size != file.size:
                return f"{file.name} has {size:,} bytes of {file.size:,}"
        return ""

    def validate(self) -> None:
        """Raises ValueError if what it says cannot be true."""
        if self.format != FORMAT_VERSION:
            raise ValueError(
                f"format {self.format} is not the {FORMAT_VERSION} that this version of rankzero reads"
            )
        for file in self.files:  # a name from a file must never lead out of its folder
            if not RANK_FILE.fullmatch(file.name):
                raise ValueError(f"{file.name!r} is no name of a rank's file")
        if len({file.name for file in self.files}) != len(self.files):
            raise ValueError("a file is listed twice")
        for name, entry in self.tensors.items():
            self._validate_tensor(name, entry)

    def _validate_tensor(self, name: str, entry: TensorEntry) -> None:
        if entry.dtype not in ITEM_SIZES:
            raise ValueError(f"{name} has the unknown dtype {entry.dtype}")
        if min(entry.shape, default=0) < 0 or entry.cuts[:1] != [0] or entry.cuts[-1] != entry.numel:
            raise ValueError(f"{name} is not covered from 0 to its last element")
        is_ascending = all(first < second for first, second in pairwise(entry.cuts))
        if len(entry.files) != len(entry.cuts) - 1 or not is_ascending:
            raise ValueError(f"the fragments of {name} are not in order")
        if entry.files and not (min(entry.files) >= 0 and max(entry.files) < len(self.files)):
            raise ValueError(f"{name} is stored in a file that is not listed")
        if len(entry.offsets) != len(entry.files) or min(entry.offsets, default=0) < 0:
            raise ValueError(f"it is not said where in its files {name} is stored")

    def write(self, folder: Path) -> None:
        """Write it into the folder of its checkpoint."""
        self.validate()
        body = json.dumps(asdict(self))
        content = f"{OPENING.format(digest(body.encode()))}{body}{CLOSING}"
        write_text_atomically(folder / MANIFEST_NAME, content)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a checkpoint.

        Raises ValueError if there is none, DamagedCheckpoint if it was changed or cannot be true.
        """
        from pydantic import ValidationError

        path = folder / MANIFEST_NAME
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder} is not a checkpoint: it has no {MANIFEST_NAME}") from None
        start = len(OPENING.format("0" * 32))
        body = content[start : -len(CLOSING)]
        if content != OPENING.format(digest(body)).encode() + body + CLOSING.encode():
            raise DamagedCheckpoint(f"{path} is damaged: its digest does not agree")
        try:
            manifest: Manifest = type_adapter().validate_json(body)
            manifest.validate()
        except ValidationError as error:
            first = error.errors()[0]
            raise DamagedCheckpoint(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except ValueError as error:
            raise DamagedCheckpoint(f"{path}: {error}") from None
        return manifest


@cache
def type_adapter() -> Any:
    """The pydantic adapter that checks the types of a manifest."""
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)
