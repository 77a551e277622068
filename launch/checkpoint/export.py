"""The weights of a checkpoint as plain files: safetensors, or what `torch.load` reads.

They are streamed in chunks, from whichever ranks wrote them: neither the model nor one of its tensors has to
fit into memory.
"""

from __future__ import annotations

import glob
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile, ZipInfo

from launch.checkpoint.manifest import Manifest
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.tensor_file import SIZES, layout
from launch.runtime.files import check_free_space, sync, write_hashed

FORMATS = (".safetensors", ".pt", ".pth")
PRECISIONS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
SHARD = 5 * 10**9
"""bytes; a larger file is cut, as Hugging Face does it"""
CHUNK = 32 * 2**20
"""bytes that are read, converted and written at a time"""
ALIGNMENT = 64
"""bytes; where torch lets the values of a tensor begin"""
OFFSETS = (".format_version", ".storage_alignment")
"""records by which torch computes where values begin, instead of looking; it knows its own writer only"""

OnProgress = Callable[[int], object]
"""hears of each number of bytes written"""


class Weight(NamedTuple):
    """A parameter or buffer as it will be written."""

    source: str
    """its name in the checkpoint"""
    dtype: str
    """as safetensors names it"""
    shape: tuple[int, ...]
    aliases: tuple[str, ...]
    """further names of it in the model: it is tied"""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * SIZES[self.dtype]


Stream = Callable[[Weight], Iterator[memoryview]]
"""the bytes of a weight, in chunks"""


def export_weights(
    checkpoint: Checkpoint,
    path: Path,
    *,
    models: Sequence[str] | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD,
    on_progress: OnProgress = lambda _: None,
) -> list[Path]:
    """Write what `weights_of` says to `path`, in the format of its suffix; returns the files, to be read by
    the last of them.

    More than `shard_bytes` become NAME-00001-of-00003.safetensors and so on, and an index,
    NAME.safetensors.index.json. Either all files appear or none; those of an earlier export to `path` are
    replaced. The digests of the checkpoint are not looked at. Raises ValueError for a model that is not
    there, Damaged if a file of the checkpoint cannot be read, OSError if `path` cannot be written.
    """
    weights = weights_of(checkpoint.manifest, models, dtype)
    check_free_space(path.parent, sum(weight.size for weight in weights.values()))
    write = write_safetensors if path.suffix == ".safetensors" else write_torch
    shards = in_shards(weights, shard_bytes)
    with all_or_none(path) as folder:
        files = [folder / name for name in shard_names(path, len(shards))]
        for file, shard in zip(files, shards, strict=True):
            write(file, shard, lambda weight: stream(checkpoint, weight, on_progress))
            sync(file)
        if len(shards) > 1:
            files.append(folder / index_name(path))
            files[-1].write_text(index(files, shards))
            sync(files[-1])
        return [path.with_name(file.name) for file in files]


def weights_of(
    manifest: Manifest, models: Sequence[str] | None = None, dtype: str | None = None
) -> dict[str, Weight]:
    """The weights of `models` (default: all) under plain names, MODEL.PARAMETER if that is several models.

    `dtype` (fp32, bf16 or fp16) is for floating-point ones; the others stay as they are. Raises ValueError
    for an unknown model.
    """
    there = list(dict.fromkeys(name.partition("/")[0] for name in manifest.tensors))
    chosen = there if models is None else list(models)
    if unknown := [name for name in chosen if name not in there]:
        raise ValueError(
            f"model={unknown[0]} is not in the checkpoint of step {manifest.step}, which holds {', '.join(there)}"
        )
    found = {}
    for source, entry in manifest.tensors.items():
        model, _, rest = source.partition("/")
        kind, _, name = rest.partition("/")
        if model not in chosen or kind != "model":
            continue
        prefix = f"{model}." if len(chosen) > 1 else ""
        floating = entry.dtype.startswith(("F", "BF"))
        aliases = [prefix + alias for alias, saved in manifest.tied.get(model, {}).items() if saved == name]
        found[prefix + name] = Weight(
            source,
            PRECISIONS[dtype] if dtype and floating else entry.dtype,
            tuple(entry.shape),
            tuple(aliases),
        )
    return found


def files_with(manifest: Manifest, weights: Iterable[Weight]) -> list[int]:
    """The files of the checkpoint that hold any of `weights`: whose digests must agree."""
    return sorted({file for weight in weights for file in manifest.tensors[weight.source].files})


def stream(checkpoint: Checkpoint, weight: Weight, on_progress: OnProgress) -> Iterator[memoryview]:
    """The bytes of `weight`, converted, in chunks."""
    same = weight.dtype == checkpoint.manifest.tensors[weight.source].dtype
    for chunk in checkpoint.chunks(weight.source, CHUNK) if same else converted(checkpoint, weight):
        yield chunk
        on_progress(len(chunk))


def converted(checkpoint: Checkpoint, weight: Weight) -> Iterator[memoryview]:
    """The bytes of `weight` in another type than they were saved in; each chunk is valid until the next."""
    import torch

    from launch.checkpoint.tensors import DTYPES, empty_tensor

    entry = checkpoint.manifest.tensors[weight.source]
    step = CHUNK // max(SIZES[weight.dtype], SIZES[entry.dtype])
    values, content = empty_tensor(
        weight.dtype, min(step, entry.numel)
    )  # a new one for each chunk would scatter the heap
    for chunk in checkpoint.chunks(weight.source, step * SIZES[entry.dtype]):
        saved = torch.frombuffer(chunk, dtype=DTYPES[entry.dtype])
        values[: len(saved)].copy_(saved)
        yield content[: len(saved) * SIZES[weight.dtype]]


# files ------------------------------------------------------------------------------------------------------


def in_shards(weights: Mapping[str, Weight], most: int) -> list[dict[str, Weight]]:
    """`weights` in order, cut so that none has more than `most` bytes, if it is not a single tensor."""
    shards: list[dict[str, Weight]] = [{}]
    size = 0
    for name, weight in weights.items():
        if size + weight.size > most and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.size
    return shards


def shard_names(path: Path, count: int) -> list[str]:
    """The names of `count` files instead of `path`."""
    return (
        [path.name]
        if count == 1
        else [f"{path.stem}-{n:05d}-of-{count:05d}{path.suffix}" for n in range(1, count + 1)]
    )


def index_name(path: Path) -> str:
    """Where it stands which tensor is in which shard."""
    return f"{path.name}.index.json"


def index(files: Sequence[Path], shards: Sequence[Mapping[str, Weight]]) -> str:
    """Which tensor is in which file, as Hugging Face writes it; in a torch file a tied one is under all its
    names.
    """
    places: dict[str, str] = {}
    for file, shard in zip(files, shards, strict=False):
        for name, weight in shard.items():
            aliases = () if file.suffix == ".safetensors" else weight.aliases
            places |= dict.fromkeys((name, *aliases), file.name)
    size = sum(weight.size for shard in shards for weight in shard.values())
    return json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2) + "\n"


def exported(path: Path) -> list[Path]:
    """What an export to `path` has left: itself, its index, its shards."""
    shard = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}" + re.escape(path.suffix))
    shards = path.parent.glob(f"{glob.escape(path.stem)}-*-of-*")
    known = (path, path.with_name(index_name(path)))
    return [
        *(file for file in known if file.exists()),
        *sorted(file for file in shards if shard.fullmatch(file.name)),
    ]


@contextmanager
def all_or_none(path: Path) -> Iterator[Path]:
    """A folder for the files of an export to `path`. They take their places in the order of names, if nothing
    was raised.
    """
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        made = sorted(folder.iterdir())  # the index comes last: "-" is before "."
        for file in made:
            file.rename(path.with_name(file.name))
        for file in exported(path):  # of an export before: a loader would take the two for one
            if file.name not in {new.name for new in made}:
                file.unlink()
        sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# formats ----------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, weights: Mapping[str, Weight], bytes_of: Stream) -> None:
    """Each tensor once; further names of tied ones are in the metadata, as `safetensors.torch.save_model`
    leaves them.
    """
    aliases = {alias: name for name, weight in weights.items() for alias in weight.aliases}
    kinds = {name: (weight.dtype, weight.shape) for name, weight in weights.items()}
    header, placed, _ = layout(kinds, {"format": "pt", **aliases})

    def parts() -> Iterator[bytes | memoryview]:
        yield header
        for name in placed:
            yield from bytes_of(weights[name])

    write_hashed(path, parts())


def write_torch(path: Path, weights: Mapping[str, Weight], bytes_of: Stream) -> None:
    """An archive as `torch.save` makes it of a plain dict, in which tied tensors share their memory.

    torch writes one with holes for values (a sparse file). It is copied record by record, with values for
    holes: filled in place it would keep the checksums of the holes, at which `unzip` and readers in other
    languages stop.
    """
    import torch

    from launch.checkpoint.tensors import DTYPES

    empty = {
        name: torch.empty(weight.shape, dtype=DTYPES[weight.dtype]) for name, weight in weights.items()
    }  # never touched
    outline = path.with_suffix(".outline")
    with torch.serialization.skip_data():
        torch.save(
            {further: empty[name] for name, weight in weights.items() for further in (name, *weight.aliases)},
            outline,
        )
    in_order = list(weights.values())  # torch numbers the tensors as it meets them
    with ZipFile(outline) as holes, path.open("wb") as file, ZipFile(file, "w") as archive:
        for hole in holes.infolist():
            name = hole.filename.partition("/")[2]
            if name in OFFSETS:
                continue
            with archive.open(aligned(hole.filename, file.tell()), "w", force_zip64=True) as record:
                kind, _, number = name.partition("/")
                if kind != "data":
                    record.write(holes.read(hole))
                    continue
                weight = in_order[int(number)]
                assert hole.file_size == weight.size, f"torch has another order than {weight.source}"
                for chunk in bytes_of(weight):
                    record.write(chunk)
    outline.unlink()


def aligned(name: str, start: int) -> ZipInfo:
    """A record, to be written from byte `start` on, whose content is aligned: it can be mapped into memory."""
    record = ZipInfo(name)
    before = (
        30 + len(name.encode()) + 20 + 4
    )  # the fixed part, the name, the sizes in 64 bits, the head of the filling
    filling = -(start + before) % ALIGNMENT
    record.extra = b"FB" + filling.to_bytes(2, "little") + bytes(filling)  # torch's own tag for it
    return record
