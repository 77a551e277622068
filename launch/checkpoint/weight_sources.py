"""Where `init=` takes weights from: each kind of file becomes a table of tensors that are read by ranges.

a checkpoint of ours, or a run                        from_checkpoint
*.safetensors                                         from_safetensors
*.safetensors.index.json, as Hugging Face shards      from_index
a torch file that needs no pickle (.pt, .pth, ...)    from_torch
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.checkpoint.directory import list_checkpoints
from launch.checkpoint.manifest import MANIFEST_NAME
from launch.checkpoint.name_matching import Shape
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.tensor_file import TensorFile
from launch.runtime.wording import join_names
from launch.runtime.world import World

INDEX_SUFFIX = ".safetensors.index.json"
STATE_DICT_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "params",
    "ema",
    "model_ema",
    "ema_state_dict",
    "params_ema",
)
"""where training scripts put the weights in what they save, in the order in which we look: the trained ones
before an average
"""


class SourceTensor(NamedTuple):
    """A tensor that can be read by ranges."""

    shape: Shape
    read: Callable[[int, int], Tensor]
    """elements [start, stop) of it flattened, 1-D, on the host"""


def locate(path: Path) -> Path:
    """The checkpoint or file that is meant by a folder; any other path as it is."""
    if (path / MANIFEST_NAME).is_file() or not path.is_dir():
        return path
    if checkpoints := list_checkpoints(path):
        return checkpoints[-1]
    exported = path / "model.safetensors"
    candidates = list(path.glob(f"*{INDEX_SUFFIX}"))
    if not candidates:
        candidates = [exported] if exported.is_file() else list(path.glob("*.safetensors"))
    return candidates[0] if len(candidates) == 1 else path


def open_source(
    path: Path, models: list[str], world: World, stack: ExitStack
) -> tuple[dict[str, SourceTensor], str]:
    """The tensors in `path` by name, open as long as `stack` is; and the key in the file where they were.

    Each rank opens it; not collective. Raises ValueError or OSError.
    """
    if (path / MANIFEST_NAME).is_file():
        return from_checkpoint(stack.enter_context(Checkpoint(path)), world), ""
    if path.is_dir():
        raise ValueError(
            f"a folder without checkpoint; it should hold one *{INDEX_SUFFIX} or one *.safetensors, "
            "or name the file"
        )
    if not path.exists():
        raise ValueError("there is no such file")
    if path.name.endswith(INDEX_SUFFIX):
        return from_index(path, stack), ""
    if path.suffix == ".safetensors":
        return from_safetensors(path, stack), ""
    return from_torch(path, models)


def from_checkpoint(checkpoint: Checkpoint, world: World) -> dict[str, SourceTensor]:
    """One of our checkpoints, verified; each rank hashes its part of the files.

    Raises DamagedCheckpoint on the rank that finds damage.
    """
    checkpoint.verify_sizes()
    checkpoint.verify(range(world.rank, len(checkpoint.manifest.files), world.world_size))
    tensors = {}
    for model in checkpoint.models:
        prefix = f"{model}." if len(checkpoint.models) > 1 else ""
        reader = checkpoint.of(model)
        for name, shape in reader.shapes.items():
            if name.startswith("model/"):
                tensors[prefix + name.removeprefix("model/")] = SourceTensor(
                    shape, partial(reader.read, name)
                )
        # for a model that no longer ties them
        for alias, name in checkpoint.manifest.tied.get(model, {}).items():
            tensors[prefix + alias] = tensors[prefix + name]
    return tensors


def from_safetensors(path: Path, stack: ExitStack) -> dict[str, SourceTensor]:
    """A safetensors file."""
    file = stack.enter_context(TensorFile(path))
    return {
        name: SourceTensor(stored.shape, partial(file.read, name)) for name, stored in file.tensors.items()
    }


def from_index(path: Path, stack: ExitStack) -> dict[str, SourceTensor]:
    """Several safetensors files, and the index that says which tensor is in which."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        file_of = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path.name} is no index of safetensors files: it has no weight_map") from None
    if outside := [file for file in file_of.values() if Path(file).name != file]:
        raise ValueError(f"{path.name} leads out of its folder, to {outside[0]}")
    shards = {file: from_safetensors(path.with_name(file), stack) for file in set(file_of.values())}
    if missing := [name for name, file in file_of.items() if name not in shards[file]]:
        raise ValueError(
            f"{file_of[missing[0]]} does not hold what {path.name} says: {join_names(missing, 3)}"
        )
    return {name: shards[file][name] for name, file in file_of.items()}


# torch files ------------------------------------------------------------------------------------------------


def from_torch(path: Path, models: list[str]) -> tuple[dict[str, SourceTensor], str]:
    """A file of torch.save, and the key in it under which the weights were.

    Mapped into memory: what is not asked for is not read (of files from before torch 1.6, all is).
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # a file that is not torch's can raise anything
        unsafe = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if unsafe is None:
            raise ValueError(
                f"neither a safetensors nor a complete torch file ({type(error).__name__})"
            ) from None
        raise ValueError(
            f"it holds {unsafe[1] or unsafe[2]}, not weights alone, and to load that could run any code; "
            "where you trust the file, write another with torch.save(model.state_dict(), PATH)"
        ) from None
    state_dict, key = find_state_dict(content, models)
    return {
        name: SourceTensor(tuple(tensor.shape), partial(flat_range, tensor.detach()))
        for name, tensor in state_dict.items()
    }, key


def flat_range(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a flattened tensor."""
    return tensor.reshape(-1)[start:stop]


def find_state_dict(content: Any, models: list[str]) -> tuple[dict[str, Tensor], str]:
    """The weights in what a training script saved, and as text the key where they were: `[state_dict]`.

    Raises ValueError if there are none, or several between which nothing decides.
    """
    items = content.items() if isinstance(content, Mapping) else ()
    nested = {key: tensors for key, value in items if (tensors := tensors_of(value))}
    if not nested:  # beside a nested one, tensors at the top are the best score, a random state
        if tensors := tensors_of(content):
            return tensors, ""
        raise ValueError("no state_dict in it, nor one level down")
    by_model = [model for model in models if model in nested]
    if len(models) > 1 and by_model:
        merged = {f"{model}.{name}": tensor for model in by_model for name, tensor in nested[model].items()}
        return merged, f"[{', '.join(by_model)}]"
    key = next((key for key in STATE_DICT_KEYS if key in nested), None)
    if key is None and len(nested) > 1:
        raise ValueError(
            f"several state_dicts in it ({join_names([str(key) for key in nested])}); "
            "save the one that is meant by itself"
        )
    key = next(iter(nested)) if key is None else key
    return nested[key], f"[{key}]"


def tensors_of(content: Any) -> dict[str, Tensor]:
    """The tensors of a mapping, by name; empty if it is no mapping."""
    items = content.items() if isinstance(content, Mapping) else ()
    return {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
