"""`init=`: weights from elsewhere into a fresh run, each rank reading only what it keeps.

They may come from a safetensors file, a sharded one (`*.safetensors.index.json`, as Hugging Face writes
them), a torch file that needs no pickle, a checkpoint of ours or a run. Whatever it is, it becomes a table of
parts that are read by ranges.
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
from launch.checkpoint.manifest import NAME
from launch.checkpoint.name_matching import Shape, match_names
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.tensor_file import TensorFile
from launch.runtime.collectives import broadcast_object, first_error
from launch.runtime.text import join_names, shape_text
from launch.runtime.world import World
from launch.state.run import Run
from strategies.sharded_state import tied_names

INDEX = ".safetensors.index.json"
NESTED = (
    *("state_dict", "model_state_dict", "model", "module", "params"),
    *("ema", "model_ema", "ema_state_dict", "params_ema"),
)
"""where training scripts put the weights in what they save, in the order in which we look: the trained ones
before an average
"""


class Part(NamedTuple):
    """A tensor that can be read by ranges."""

    shape: Shape
    read: Callable[[int, int], Tensor]
    """elements [start, stop) of it flattened, 1-D, on the host"""


class Target(NamedTuple):
    """A tensor of the run."""

    model: str
    name: str
    """as `Strategy.shapes` has it"""
    shape: Shape


class Weights:
    """What was found for one model (a `strategies.sharded_state.StateReader`)."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self.parts = parts
        self.shapes = {name: part.shape for name, part in parts.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one of the tensors."""
        return self.parts[name].read(start, stop)


def load_initial_weights(run: Run, path: str) -> str:
    """Load the weights in `path` into the models of `run`; says in words what was loaded. All ranks call it.

    Raises ValueError, on all ranks, if it cannot be read, or does not fit the models and `init_partial` is
    not set.
    """
    # newest is what rank zero says: another run may be saving there
    where = Path(broadcast_object(str(located(Path(path))) if run.world.rank == 0 else ""))
    source, found, problem = str(where), "", ""
    plan: dict[Target, Part] = {}
    with ExitStack() as stack:
        try:
            parts, inside = opened(where, run, stack)
            source += inside
            plan, found = fitted(parts, targets_of(run), run.config.init_partial)
        except (ValueError, OSError) as error:
            problem = f"init={source}: {error}"
        if first := first_error(problem):
            raise ValueError(problem or first)
        for model, strategy in run.strategies.items():
            strategy.load_weights(
                Weights({target.name: part for target, part in plan.items() if target.model == model})
            )
    return f"weights from {source} ({found})"


def targets_of(run: Run) -> dict[str, Target]:
    """The tensors of the run as `model.safetensors` names them; tied ones under each of their names, the
    first one first.
    """
    targets: dict[str, Target] = {}
    for model, strategy in run.strategies.items():
        prefix = f"{model}." if len(run.strategies) > 1 else ""
        own = {
            name.removeprefix("model/"): Target(model, name, shape)
            for name, shape in strategy.shapes().items()
        }
        own |= {name: own[first] for name, first in tied_names(strategy.module).items()}
        targets |= {prefix + name: target for name, target in own.items()}
    return targets


# where they come from ---------------------------------------------------------------------------------------


def located(path: Path) -> Path:
    """The checkpoint or file that is meant by a folder; any other path as it is."""
    if (path / NAME).is_file() or not path.is_dir():
        return path
    if checkpoints := list_checkpoints(path):
        return checkpoints[-1]
    whole = path / "model.safetensors"
    found = list(path.glob(f"*{INDEX}")) or ([whole] if whole.is_file() else list(path.glob("*.safetensors")))
    return found[0] if len(found) == 1 else path


def opened(path: Path, run: Run, stack: ExitStack) -> tuple[dict[str, Part], str]:
    """What lies in `path`, by name, open as long as `stack` is; and where inside, in words. Raises ValueError
    or OSError.
    """
    if (path / NAME).is_file():
        return from_checkpoint(stack.enter_context(Checkpoint(path)), run.world), ""
    if path.is_dir():
        raise ValueError(
            f"a folder without checkpoint; it should hold one *{INDEX} or one *.safetensors, or name the file"
        )
    if not path.exists():
        raise ValueError("there is no such file")
    if path.name.endswith(INDEX):
        return from_index(path, stack), ""
    if path.suffix == ".safetensors":
        return from_file(path, stack), ""
    return from_torch(path, list(run.strategies))


def from_checkpoint(checkpoint: Checkpoint, world: World) -> dict[str, Part]:
    """One of our checkpoints, verified; each rank hashes its share of the files."""
    checkpoint.verify_sizes()
    checkpoint.verify(range(world.rank, len(checkpoint.manifest.files), world.world_size))
    parts = {}
    for model in checkpoint.models:
        prefix = f"{model}." if len(checkpoint.models) > 1 else ""
        reader = checkpoint.of(model)
        for name, shape in reader.shapes.items():
            if name.startswith("model/"):
                parts[prefix + name.removeprefix("model/")] = Part(shape, partial(reader.read, name))
        for name, first in checkpoint.manifest.tied.get(
            model, {}
        ).items():  # for a model that ties them no longer
            parts[prefix + name] = parts[prefix + first]
    return parts


def from_file(path: Path, stack: ExitStack) -> dict[str, Part]:
    """A safetensors file."""
    file = stack.enter_context(TensorFile(path))
    return {name: Part(stored.shape, partial(file.read, name)) for name, stored in file.tensors.items()}


def from_index(path: Path, stack: ExitStack) -> dict[str, Part]:
    """Several safetensors files, and the index that says which tensor lies in which."""
    try:
        held = {str(name): str(file) for name, file in json.loads(path.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path.name} is no index of safetensors files: it has no weight_map") from None
    if outside := [file for file in held.values() if Path(file).name != file]:
        raise ValueError(f"{path.name} leads out of its folder, to {outside[0]}")
    files = {file: from_file(path.with_name(file), stack) for file in set(held.values())}
    if lost := [name for name, file in held.items() if name not in files[file]]:
        raise ValueError(f"{held[lost[0]]} does not hold what {path.name} says: {join_names(lost, 3)}")
    return {name: files[file][name] for name, file in held.items()}


def from_torch(path: Path, models: list[str]) -> tuple[dict[str, Part], str]:
    """A file of torch.save. Mapped into memory: what is not asked for is not read (of files from before torch
    1.6, all is).
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # a file that is not torch's can raise anything
        unsafe = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if unsafe is None:
            raise ValueError(
                f"neither a safetensors nor a whole torch file ({type(error).__name__})"
            ) from None
        raise ValueError(
            f"it holds {unsafe[1] or unsafe[2]}, not weights alone, and to load that could run any code; "
            "where you trust the file, write another with torch.save(model.state_dict(), PATH)"
        ) from None
    tensors, inside = state_dict_in(found, models)
    return {name: Part(tuple(t.shape), partial(elements, t.detach())) for name, t in tensors.items()}, inside


def elements(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a flattened tensor."""
    return tensor.reshape(-1)[start:stop]


def state_dict_in(found: Any, models: list[str]) -> tuple[dict[str, Tensor], str]:
    """The weights in what a training script saved, and in words where they were. Raises ValueError if that is
    not clear.
    """
    inner = (
        {key: held for key, value in found.items() if (held := tensors_in(value))}
        if isinstance(found, Mapping)
        else {}
    )
    if not inner:  # beside a nested one, tensors at the top are the best score, a random state
        if held := tensors_in(found):
            return held, ""
        raise ValueError("no state_dict in it, nor one level down")
    if len(models) > 1 and (list_named := [model for model in models if model in inner]):
        return {
            f"{m}.{name}": t for m in list_named for name, t in inner[m].items()
        }, f"[{', '.join(list_named)}]"
    key = next((key for key in NESTED if key in inner), None)
    if key is None and len(inner) > 1:
        raise ValueError(
            f"several state_dicts in it ({join_names(list(map(str, inner)))}); save the one that is meant by itself"
        )
    key = next(iter(inner)) if key is None else key
    return inner[key], f"[{key}]"


def tensors_in(found: Any) -> dict[str, Tensor]:
    """The tensors of a mapping, by name."""
    items = found.items() if isinstance(found, Mapping) else ()
    return {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}


# which is which ---------------------------------------------------------------------------------------------


def fitted(
    parts: Mapping[str, Part], targets: dict[str, Target], partly: bool
) -> tuple[dict[Target, Part], str]:
    """What each tensor of the run is loaded from, and in words how many are. Raises ValueError if it does not
    fit.
    """
    match, rival = match_names(
        {n: p.shape for n, p in parts.items()}, {n: t.shape for n, t in targets.items()}
    )
    plan: dict[Target, Part] = {}
    other: dict[Target, str] = {}
    for name, target in targets.items():
        if (source := match.pairs.get(name)) is not None:
            if parts[source].shape == target.shape:
                plan.setdefault(target, parts[source])
            else:
                other[target] = (
                    f"{name} {shape_text(target.shape)}, in the file {shape_text(parts[source].shape)}"
                )
    first = {target: name for name, target in reversed(targets.items())}  # a tied tensor by its first name
    shapes = [words for target, words in other.items() if target not in plan]
    missing = [
        n for n in targets if first[t := targets[n]] == n and not (t in plan or t in other or needless(n, t))
    ]
    used = {id(parts[source]) for source in match.pairs.values()}
    unused = [name for name, part in parts.items() if id(part) not in used]
    found = f"{len(plan)} of {len(plan) + len(shapes) + len(missing)} tensors{match.prefix and f', {match.prefix}'}"
    differences = [
        *([f"not in the file: {len(missing)} ({join_names(missing)})"] if missing else []),
        *([f"of no use to the model: {len(unused)} ({join_names(unused)})"] if unused else []),
        *([f"of another shape: {len(shapes)} ({join_names(shapes)})"] if shapes else []),
    ]
    if not plan:
        raise ValueError(f"nothing in it fits the model; {'; '.join(differences)}")
    if differences and not partly:
        raise ValueError(
            f"it fits {found}; {'; '.join(differences)}. If that is meant, say init_partial=true"
        )
    if rival and differences:
        raise ValueError(
            f"it fits in two ways, {match.prefix} and {rival}; save it with the names of the model"
        )
    return plan, "; ".join([found, *differences])


def needless(name: str, target: Target) -> bool:
    """Whether it may be missing: BatchNorm's counter, as torch has it (files from before torch 0.4.1 have
    none), and nothing.
    """
    return name.endswith("num_batches_tracked") or 0 in target.shape
