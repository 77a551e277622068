"""Export: the weights of a checkpoint as plain safetensors files.

They are streamed in chunks, from whichever ranks wrote them: neither the model nor one of its tensors has to
fit into memory. There is no `.pt` export: one line of torch converts a safetensors file (`HOW_TO_CONVERT`).
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

from launch.checkpoint.manifest import Manifest
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.tensor_file import ITEM_SIZES, empty_tensor, file_header, torch_dtype
from launch.runtime.files import check_free_space, sync, write_hashed

SUFFIX = ".safetensors"
HOW_TO_CONVERT = 'torch.save({{k: v.clone() for k, v in safetensors.torch.load_file("{}").items()}}, "{}")'
"""from a safetensors file to one of torch; to be filled in with both names. Without `clone` torch refuses
tensors of several dtypes, since they are views of one mapped file.
"""
PRECISIONS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
SHARD_BYTES = 5 * 10**9
"""a larger file is sharded, as Hugging Face does it"""
CHUNK_BYTES = 32 * 2**20
"""read, converted and written at a time"""

OnProgress = Callable[[int], object]
"""called with each number of bytes written"""


class Weight(NamedTuple):
    """A parameter or buffer as it will be written."""

    source: str
    """its name in the checkpoint"""
    dtype: str
    """as safetensors names it"""
    shape: tuple[int, ...]
    aliases: tuple[str, ...]
    """further names of it in the model, if it is tied"""

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def export_weights(
    checkpoint: Checkpoint,
    path: Path,
    *,
    models: Sequence[str] | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: OnProgress = lambda _: None,
) -> list[Path]:
    """Write the weights that `weights_of` selects to `path`; returns the files. A loader needs the last one.

    More than `shard_bytes` become NAME-00001-of-00003.safetensors and so on, and an index,
    NAME.safetensors.index.json. Either all files appear or none; those of an earlier export to `path` are
    replaced. The digests of the checkpoint are not verified here. Raises ValueError for a model that is not
    in the checkpoint, DamagedCheckpoint if one of its files cannot be read, OSError if `path` cannot be
    written.
    """
    weights = weights_of(checkpoint.manifest, models, dtype)
    check_free_space(path.parent, sum(weight.nbytes for weight in weights.values()))
    shards = split_into_shards(weights, shard_bytes)
    with all_or_none(path) as folder:
        files = [folder / name for name in shard_names(path, len(shards))]
        for file, shard in zip(files, shards, strict=True):
            write_shard(file, shard, checkpoint, on_progress)
            sync(file)
        if len(shards) > 1:
            files.append(folder / index_name(path))
            files[-1].write_text(index_text(files[:-1], shards))
            sync(files[-1])
        return [path.with_name(file.name) for file in files]


def weights_of(
    manifest: Manifest, models: Sequence[str] | None = None, dtype: str | None = None
) -> dict[str, Weight]:
    """The weights of `models` (default: all) under plain names, MODEL.PARAMETER if that is several models.

    `dtype` (fp32, bf16 or fp16) is for floating-point ones; the others stay as they are. Raises ValueError
    for an unknown model.
    """
    models = manifest.models if models is None else models
    if unknown := [name for name in models if name not in manifest.models]:
        raise ValueError(
            f"model={unknown[0]} is not in the checkpoint of step {manifest.step}, "
            f"which holds {', '.join(manifest.models)}"
        )
    weights = {}
    for source, entry in manifest.tensors.items():
        model, _, rest = source.partition("/")
        kind, _, name = rest.partition("/")
        if model not in models or kind != "model":
            continue
        prefix = f"{model}." if len(models) > 1 else ""
        is_floating = entry.dtype.startswith(("F", "BF"))
        tied = manifest.tied.get(model, {})
        weights[prefix + name] = Weight(
            source=source,
            dtype=PRECISIONS[dtype] if dtype and is_floating else entry.dtype,
            shape=tuple(entry.shape),
            aliases=tuple(prefix + alias for alias, saved in tied.items() if saved == name),
        )
    return weights


def files_with(manifest: Manifest, weights: Iterable[Weight]) -> list[int]:
    """The files of the checkpoint that hold any of `weights`: those to be verified."""
    return sorted({file for weight in weights for file in manifest.tensors[weight.source].files})


# content ----------------------------------------------------------------------------------------------------


def write_shard(
    path: Path, weights: Mapping[str, Weight], checkpoint: Checkpoint, on_progress: OnProgress
) -> None:
    """One safetensors file. Each tensor once; further names of tied ones are in the metadata, as
    `safetensors.torch.save_model` leaves them.
    """
    aliases = {alias: name for name, weight in weights.items() for alias in weight.aliases}
    specs = {name: (weight.dtype, weight.shape) for name, weight in weights.items()}
    header, stored, _ = file_header(specs, {"format": "pt", **aliases})

    def content() -> Iterator[bytes | memoryview]:
        yield header
        for name in stored:
            yield from weight_chunks(checkpoint, weights[name], on_progress)

    write_hashed(path, content())


def weight_chunks(checkpoint: Checkpoint, weight: Weight, on_progress: OnProgress) -> Iterator[memoryview]:
    """The bytes of `weight`, converted if need be; each chunk is valid until the next."""
    if weight.dtype == checkpoint.manifest.tensors[weight.source].dtype:
        chunks = checkpoint.chunks(weight.source, CHUNK_BYTES)
    else:
        chunks = converted_chunks(checkpoint, weight)
    for chunk in chunks:
        yield chunk
        on_progress(len(chunk))


def converted_chunks(checkpoint: Checkpoint, weight: Weight) -> Iterator[memoryview]:
    """The bytes of `weight` in another dtype than they were saved in; each chunk is valid until the next."""
    import torch

    entry = checkpoint.manifest.tensors[weight.source]
    saved_size, new_size = ITEM_SIZES[entry.dtype], ITEM_SIZES[weight.dtype]
    step = CHUNK_BYTES // max(saved_size, new_size)
    # one buffer for all chunks: a new one for each would scatter the heap
    buffer, content = empty_tensor(weight.dtype, min(step, entry.numel))
    for chunk in checkpoint.chunks(weight.source, step * saved_size):
        saved = torch.frombuffer(chunk, dtype=torch_dtype(entry.dtype))
        buffer[: len(saved)].copy_(saved)
        yield content[: len(saved) * new_size]


# files ------------------------------------------------------------------------------------------------------


def split_into_shards(weights: Mapping[str, Weight], max_bytes: int) -> list[dict[str, Weight]]:
    """`weights` in order, in shards of at most `max_bytes`; a larger tensor is a shard of its own."""
    shards: list[dict[str, Weight]] = [{}]
    size = 0
    for name, weight in weights.items():
        if size + weight.nbytes > max_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
    return shards


def shard_names(path: Path, count: int) -> list[str]:
    """The names of `count` files instead of `path`."""
    if count == 1:
        return [path.name]
    return [f"{path.stem}-{n:05d}-of-{count:05d}{path.suffix}" for n in range(1, count + 1)]


def index_name(path: Path) -> str:
    """The name of the file that says which tensor is in which shard."""
    return f"{path.name}.index.json"


def index_text(files: Sequence[Path], shards: Sequence[Mapping[str, Weight]]) -> str:
    """Which tensor is in which file, as Hugging Face writes it."""
    weight_map = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    size = sum(weight.nbytes for shard in shards for weight in shard.values())
    return json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2) + "\n"


def existing_export(path: Path) -> list[Path]:
    """The files of an earlier export to `path`: itself, its index, its shards."""
    shard = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}" + re.escape(path.suffix))
    shards = path.parent.glob(f"{glob.escape(path.stem)}-*-of-*")
    return [
        *(file for file in (path, path.with_name(index_name(path))) if file.exists()),
        *sorted(file for file in shards if shard.fullmatch(file.name)),
    ]


@contextmanager
def all_or_none(path: Path) -> Iterator[Path]:
    """A folder for the files of an export to `path`; they are moved to their places if nothing was raised."""
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        new = sorted(folder.iterdir())  # the index comes last: "-" is before "."
        for file in new:
            file.rename(path.with_name(file.name))
        new_names = {file.name for file in new}
        for file in existing_export(path):  # a loader would take an old shard for one of the new
            if file.name not in new_names:
                file.unlink()
        sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
