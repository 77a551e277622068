"""One committed checkpoint: verified, and read by ranges. Imports torch only to make tensors."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from launch.checkpoint.directory import NO_STEP, step_of
from launch.checkpoint.manifest import MANIFEST_NAME, DamagedCheckpoint, Manifest, TensorEntry
from launch.checkpoint.tensor_file import ITEM_SIZES, empty_tensor
from launch.runtime.files import RandomAccessFile, digest_of

if TYPE_CHECKING:
    from torch import Tensor

MAX_OPEN_FILES = 128
"""files held open at a time: of a thousand ranks it could not be all"""


class Checkpoint:
    """An open checkpoint. As long as it is open, no run on this machine removes it (`directory.prune`)."""

    def __init__(self, folder: Path) -> None:
        """Open it. Its files are not verified yet, only its manifest.

        Raises ValueError if `folder` is no checkpoint, DamagedCheckpoint if its manifest is not what was
        written.
        """
        self.folder = folder
        self.open_files: dict[int, RandomAccessFile] = {}
        try:
            self.lock = RandomAccessFile(folder / MANIFEST_NAME)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder} is not a checkpoint: it has no {MANIFEST_NAME}") from None
        try:
            self.lock.hold()
            self.manifest = Manifest.read(folder)  # while locked: what is being removed has no name any more
            if step_of(folder) not in (NO_STEP, self.manifest.step):
                raise DamagedCheckpoint(f"{folder / MANIFEST_NAME} is that of step {self.manifest.step}")
        except BaseException:
            self.lock.close()
            raise

    # verification -------------------------------------------------------------------------------------------

    def verify_sizes(self) -> None:
        """Raises DamagedCheckpoint for the first file that is missing or has another size. Reads no file."""
        if error := self.manifest.size_error(self.folder):
            raise DamagedCheckpoint(f"{self.folder / error}")

    def verify(
        self, indices: Iterable[int] | None = None, on_progress: Callable[[int], object] = lambda _: None
    ) -> None:
        """Read the files `indices` (default: all) and compare their digests.

        `on_progress` is called with each number of bytes read. Raises DamagedCheckpoint for the first file
        whose digest does not agree.
        """
        for index in range(len(self.manifest.files)) if indices is None else indices:
            file = self.manifest.files[index]
            path = self.folder / file.name
            try:
                agrees = digest_of(path, on_progress) == file.digest
            except OSError as error:
                raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from None
            if not agrees:
                raise DamagedCheckpoint(f"{path} is damaged: its digest does not agree")

    # reading ------------------------------------------------------------------------------------------------

    @property
    def models(self) -> list[str]:
        """The names of the models in it."""
        return self.manifest.models

    def of(self, model: str) -> ModelState:
        """The state of one model."""
        return ModelState(self, f"{model}/")

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor, 1-D, on the host, from whichever files hold them.

        Raises ValueError if there is no such tensor, DamagedCheckpoint if a file ends too early.
        """
        tensor, content = empty_tensor(self._entry(name).dtype, max(stop - start, 0))
        self._read_into(content, name, start, stop)
        return tensor

    def chunks(self, name: str, max_bytes: int) -> Iterator[memoryview]:
        """The bytes of a tensor, at most `max_bytes` at a time; each chunk is valid until the next.

        Raises as `read` does.
        """
        entry = self._entry(name)
        item_size = ITEM_SIZES[entry.dtype]
        step = max(max_bytes // item_size, 1)
        buffer = memoryview(bytearray(min(step, entry.numel) * item_size))
        for start in range(0, entry.numel, step):
            stop = min(start + step, entry.numel)
            chunk = buffer[: (stop - start) * item_size]
            self._read_into(chunk, name, start, stop)
            yield chunk

    def _read_into(self, content: memoryview, name: str, start: int, stop: int) -> None:
        """Elements [start, stop) of a tensor, as bytes, into `content`."""
        item_size, filled = ITEM_SIZES[self._entry(name).dtype], 0
        for file, offset, numel in self._fragments(name, start, stop):
            with self._naming_damaged_file(file):
                self._open_file(file).into(content[filled : filled + numel * item_size], offset)
            filled += numel * item_size

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.manifest.tensors:
            raise ValueError(f"{self.folder} holds no {name}: it was saved by another recipe or model")
        return self.manifest.tensors[name]

    def _fragments(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where the elements [start, stop) are stored: file, byte offset, number of elements."""
        entry = self._entry(name)
        index = bisect.bisect_right(entry.cuts, start) - 1
        while start < stop:
            end = min(entry.cuts[index + 1], stop)
            offset = entry.offsets[index] + (start - entry.cuts[index]) * ITEM_SIZES[entry.dtype]
            yield entry.files[index], offset, end - start
            start, index = end, index + 1

    # files --------------------------------------------------------------------------------------------------

    @contextmanager
    def _naming_damaged_file(self, index: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            name = self.manifest.files[index].name
            raise DamagedCheckpoint(f"{self.folder / name}: {error}") from None

    def _open_file(self, index: int) -> RandomAccessFile:
        if index not in self.open_files:
            while len(self.open_files) >= MAX_OPEN_FILES:
                self.open_files.pop(next(iter(self.open_files))).close()
            self.open_files[index] = RandomAccessFile(self.folder / self.manifest.files[index].name)
        return self.open_files[index]

    def close(self) -> None:
        """Close all files, and let the run remove the checkpoint if it wants to."""
        for file in [*self.open_files.values(), self.lock]:
            file.close()
        self.open_files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ModelState:
    """The tensors of one model in a checkpoint (a `StateReader` of the strategies)."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.checkpoint, self.prefix = checkpoint, prefix

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the full tensors, by name."""
        return {
            name.removeprefix(self.prefix): tuple(entry.shape)
            for name, entry in self.checkpoint.manifest.tensors.items()
            if name.startswith(self.prefix)
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """`Checkpoint.read` of one of this model's tensors."""
        return self.checkpoint.read(self.prefix + name, start, stop)
