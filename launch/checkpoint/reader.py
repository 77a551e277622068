"""One committed checkpoint: verified, and read by ranges. Imports torch only to make tensors."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from launch.checkpoint.directory import NO_STEP, step_of
from launch.checkpoint.manifest import NAME, DamagedCheckpoint, Manifest, TensorEntry
from launch.checkpoint.tensor_file import SIZES
from launch.runtime.files import RandomAccessFile, digest_of

if TYPE_CHECKING:
    from torch import Tensor

OPEN_FILES = 128
"""files held open at a time: of a thousand ranks it could not be all"""


class Checkpoint:
    """An open checkpoint. As long as it is open, no run on this machine removes it (`checkpoints_dir.prune`)."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if `folder` is no checkpoint, Damaged if its manifest is not what was written."""
        self.folder = folder
        self.open: dict[int, RandomAccessFile] = {}
        try:
            self.held = RandomAccessFile(folder / NAME)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder} is not a checkpoint: it has no {NAME}") from None
        try:
            self.held.hold()
            self.manifest = Manifest.read(
                folder
            )  # once it is held: what is being removed has no name any more
            if step_of(folder) not in (NO_STEP, self.manifest.step):
                raise DamagedCheckpoint(f"{folder / NAME} is that of step {self.manifest.step}")
        except BaseException:
            self.held.close()
            raise

    def verify_sizes(self) -> None:
        """Raises Damaged for the first file that is missing or has another size. Reads no file."""
        if problem := self.manifest.problem(self.folder):
            raise DamagedCheckpoint(f"{self.folder / problem}")

    def verify(
        self, indices: Iterable[int] | None = None, on_progress: Callable[[int], object] = lambda _: None
    ) -> None:
        """Raises Damaged for the first of the files `indices` (default: all) whose digest does not agree.
        Reads them whole.

        `on_progress` hears of each number of bytes read.
        """
        for index in range(len(self.manifest.files)) if indices is None else indices:
            file = self.manifest.files[index]
            try:
                agrees = digest_of(self.folder / file.name, on_progress) == file.digest
            except OSError as error:
                raise DamagedCheckpoint(
                    f"{self.folder / file.name} cannot be read ({error.strerror})"
                ) from None
            if not agrees:
                raise DamagedCheckpoint(f"{self.folder / file.name} is damaged: its digest does not agree")

    @property
    def models(self) -> list[str]:
        """The names of the models in it."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.manifest.tensors))

    def of(self, model: str) -> ModelState:
        """The state of one model."""
        return ModelState(self, f"{model}/")

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor, 1-D, on the host, from whichever files hold them.

        Raises ValueError if there is no such tensor, Damaged if a file ends too early.
        """
        from launch.checkpoint.tensors import empty_tensor

        values, content = empty_tensor(self._entry(name).dtype, max(stop - start, 0))
        self._fill(content, name, start, stop)
        return values

    def chunks(self, name: str, most: int) -> Iterator[memoryview]:
        """The bytes of a tensor, at most `most` at a time; each is valid until the next. Raises as `read`
        does.
        """
        entry = self._entry(name)
        step, size = max(most // SIZES[entry.dtype], 1), SIZES[entry.dtype]
        buffer = memoryview(bytearray(min(step, entry.numel) * size))
        for start in range(0, entry.numel, step):
            stop = min(start + step, entry.numel)
            chunk = buffer[: (stop - start) * size]
            self._fill(chunk, name, start, stop)
            yield chunk

    def _fill(self, content: memoryview, name: str, start: int, stop: int) -> None:
        """Elements [start, stop) of a tensor, as bytes."""
        size, filled = SIZES[self._entry(name).dtype], 0
        for file, offset, numel in self._pieces(name, start, stop):
            with self._blaming(file):
                self._file(file).into(content[filled : filled + numel * size], offset)
            filled += numel * size

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.manifest.tensors:
            raise ValueError(f"{self.folder} holds no {name}: it was saved by another recipe or model")
        return self.manifest.tensors[name]

    def _pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where the elements [start, stop) lie: file, byte offset, number of elements."""
        entry = self._entry(name)
        index = bisect.bisect_right(entry.cuts, start) - 1
        while start < stop:
            high = min(entry.cuts[index + 1], stop)
            yield (
                entry.files[index],
                entry.offsets[index] + (start - entry.cuts[index]) * SIZES[entry.dtype],
                high - start,
            )
            start, index = high, index + 1

    @contextmanager
    def _blaming(self, file: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{self.folder / self.manifest.files[file].name}: {error}") from None

    def _file(self, index: int) -> RandomAccessFile:
        if index not in self.open:
            while len(self.open) >= OPEN_FILES:
                self.open.pop(next(iter(self.open))).close()
            self.open[index] = RandomAccessFile(self.folder / self.manifest.files[index].name)
        return self.open[index]

    def close(self) -> None:
        """Close all files, and let the run remove the checkpoint if it wants to."""
        for file in [*self.open.values(), self.held]:
            file.close()
        self.open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ModelState:
    """The tensors of one model in a checkpoint (a `strategies.sharded_state.StateReader`)."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.checkpoint, self.prefix = checkpoint, prefix

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the tensors, by name."""
        return {
            name.removeprefix(self.prefix): tuple(entry.shape)
            for name, entry in self.checkpoint.manifest.tensors.items()
            if name.startswith(self.prefix)
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """`Checkpoint.read` of one of this model's tensors."""
        return self.checkpoint.read(self.prefix + name, start, stop)
