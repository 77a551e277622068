"""The configuration of a run: what the command line and YAML files may say, and what it means. Imports no
torch.
"""

from __future__ import annotations

import difflib
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from strategies.options import Options


@dataclass(kw_only=True)
class CheckpointOptions:
    """`checkpoint.*`"""

    every: int | None = None
    """steps between resumable checkpoints (default: once an epoch, and at the end)"""
    every_minutes: float | None = 30.0
    """minutes between them as well, whatever the steps; null: never by the clock"""
    keep: int = 2
    """newest checkpoints to keep"""
    best: bool = False
    """keep the best by the recipe's objective as well"""


@dataclass(kw_only=True)
class EvalOptions:
    """`eval.*`"""

    every: int | None = None
    """steps between evaluations on the validation split (default: once an epoch, and at the end)"""
    patience: int | None = None
    """stop early after this many evaluations without a better objective"""
    min_delta: float = 0.0
    """what counts as better for eval.patience"""


@dataclass(kw_only=True)
class LogOptions:
    """`log.*`"""

    every: int = 10
    """steps between lines on the screen; metrics.jsonl holds every step"""


@dataclass(kw_only=True)
class Config(Options):
    """A run, apart from its recipe's own fields."""

    recipe: str = ""
    """what to train: a built-in name, a file (./mine.py) or a dotted module"""
    config: str | None = None
    """YAML file of keys, read first; the command line wins"""
    run_dir: str | None = None
    """where the run is kept (default: runs/RECIPE/TIME-MARK)"""
    resume: str = "auto"
    """auto: continue the run in run_dir if there is one; none: start afresh; PATH: start from that checkpoint"""
    init: str | None = None
    """weights to start a new run from: a .safetensors or torch file, a checkpoint, or a run; no optimizer
    state is taken
    """
    init_partial: bool = False
    """let init= leave parameters as they are that it has no weights for, and pass over weights that the model
    has no use for
    """
    batch_size: int = 64
    """GLOBAL batch in samples, the unit of an optimizer step"""
    micro_batch_size: int | Literal["auto"] | None = None
    """samples per forward on one rank (default: batch_size / ranks); accumulation is derived. auto: the
    largest that fits into memory, found by halving, with the global batch unchanged
    """
    epochs: int | None = None
    """passes over the training data"""
    steps: int | None = None
    """optimizer steps, instead of epochs"""
    workers: int | None = None
    """data-loading processes per rank (default: what the CPUs of this rank allow, at most 8)"""
    sync_batchnorm: bool = False
    """BatchNorm over the micro-batches of all ranks (CUDA only)"""
    debug: bool | int = False
    """true, or a number of steps: one process makes the first 8 (or so many) steps of the run under anomaly
    detection, after a table of the model and a check that one batch can be overfitted; pdb on an exception
    """
    launcher: Literal["auto", "torchrun", "srun", "accelerate", "mpirun", "environment", "python"] = "auto"
    """who started the ranks, if the environment could be read in several ways"""
    max_time: str | None = None
    """stop, save and exit with 75 before this time is up, written as SLURM does: 90 (minutes), 1:30:00, 2-12
    (days-hours); SLURM's own limit is read as well
    """
    start_timeout: float = 60.0
    """seconds for all ranks to come together, before the run ends and names who is missing"""
    hang_timeout: float = 600.0
    """seconds without progress on any rank, before the run ends and says where each rank hangs (first step: 3
    times that)
    """
    chaos: str | None = None
    """a fault to happen once, KIND:rank=R,step=S; kinds: kill, stall, slow, nan, sigterm, torn_checkpoint,
    oom
    """
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    log: LogOptions = field(default_factory=LogOptions)

    @property
    def given_micro_batch_size(self) -> int | None:
        """`micro_batch_size` as a number, where it was said as one or has been found."""
        return None if self.micro_batch_size == "auto" else self.micro_batch_size


# keys: a dataclass seen as dotted names ---------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One thing that can be said on the command line."""

    name: str
    hint: Any
    default: Any
    owner: type
    """the dataclass that declares it: where its help text stands"""

    @property
    def type_name(self) -> str:
        """The type in words for people: `int`, `a | b`, `float or null`."""
        return describe(self.hint)


def describe(hint: Any) -> str:
    """A type hint as one would say it."""
    if hint is type(None):
        return "null"
    if get_origin(hint) in (Union, types.UnionType):
        return "|".join(describe(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return "|".join(show(value) for value in get_args(hint))
    if get_args(hint):
        inner = ",".join(describe(part) for part in get_args(hint) if part is not Ellipsis)
        return f"{get_origin(hint).__name__}[{inner}]"
    return str(getattr(hint, "__name__", hint))


def keys_of(owner: type, prefix: str = "", declared: Any = None) -> Iterator[Key]:
    """The keys of a dataclass type and, under its name and a dot, of each dataclass in it.

    `declared` is the instance that the outer dataclass has for a default: a recipe's own `Optim(lr=0.02)`.
    """
    hints = get_type_hints(owner)
    for item in fields(owner):
        hint = hints[item.name]
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if declared is not None:
            default = getattr(declared, item.name)
        if is_dataclass(hint):
            yield from keys_of(hint, f"{prefix}{item.name}.", default)  # type: ignore[arg-type]  # a class, not an instance
        else:
            yield Key(prefix + item.name, hint, default, declaring(owner, item.name))


def declaring(owner: type, name: str) -> type:
    """The class in whose body the field `name` of `owner` is written."""
    return next(base for base in owner.__mro__ if name in get_annotations(base))


# reading ----------------------------------------------------------------------------------------------------


def read_line(arguments: Sequence[str]) -> dict[str, str]:
    """`key=value` words as a mapping; the last of a repeated key counts. Raises ValueError for any other
    word.
    """
    said: dict[str, str] = {}
    for word in arguments:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ValueError(f"{word!r} is not key=value; `--help` lists the keys")
        said[name.removeprefix("--")] = value
    return said


def read_file(path: str) -> dict[str, Any]:
    """The keys of a YAML file, flattened to dotted names. Raises ValueError if it is not a mapping of keys."""
    if not Path(path).is_file():
        raise ValueError(f"config={path}: there is no such file")
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config={path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"config={path} must hold `key: value` lines, not a {type(content).__name__}")
    return dict(flatten({name: value for name, value in content.items() if name != "made_with"}))


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} as ("a.b", 1)."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def parse(text: str, key: Key) -> Any:
    """A word of the command line as YAML, except where the key wants the text itself, or a list without
    brackets.
    """
    parts = get_args(key.hint) or (key.hint,)
    if str in parts and text != "null":
        return text
    if get_origin(key.hint) in (list, tuple) and not text.startswith("["):
        text = f"[{text.removeprefix('(').removesuffix(')')}]"
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def check_known(said: Mapping[str, Any], known: Mapping[str, Key], where: str) -> None:
    """Raise ValueError, with the nearest names, for the first key that nobody declares."""
    for name in said:
        if name in known:
            continue
        group = [key for key in known if key.startswith(name + ".")]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        # a right word under the wrong group, or without one: `lr` for optim.lr
        near += [
            key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2] and key not in near
        ]
        hint = (
            f"it is a group: {', '.join(group)}"
            if group
            else f"did you mean {' or '.join(near[:3])}?"
            if near
            else ""
        )
        raise ValueError(f"{name} is not a key of {where}; {hint or '`--help` lists the keys'}")


def build(owner: type, said: Mapping[str, Any]) -> Any:
    """An instance of the dataclass `owner` from dotted keys, each checked against its declared type
    (ValueError).
    """
    from pydantic import TypeAdapter, ValidationError

    known = {key.name: key for key in keys_of(owner)}
    if missing := [name for name, key in known.items() if key.default is MISSING and name not in said]:
        raise ValueError(f"{missing[0]}= is missing; it is {known[missing[0]].type_name}")
    # a group that is said in part keeps the recipe's own defaults for the rest, not those of the group's
    # class
    said = {name: key.default for name, key in known.items() if "." in name} | dict(said)
    nested: dict[str, Any] = {}
    for name, value in said.items():
        *groups, last = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    try:
        return TypeAdapter(owner).validate_python(nested)
    except ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"]]
        name = next(
            (dotted for n in range(len(where), 0, -1) if (dotted := ".".join(where[:n])) in known), ""
        )
        if not name:  # raised by the dataclass itself
            raise ValueError(str(first["msg"]).removeprefix("Value error, ")) from None
        key = known[name]
        raise ValueError(
            f"{name}={said[name]} is not {key.type_name} (default: {show(key.default)})"
        ) from None


def show(value: Any) -> str:
    """A default as one would type it."""
    if value is None or value is MISSING:
        return "null" if value is None else "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(show(part) for part in value)}]"
    return str(value)


def nested(instance: Any) -> dict[str, Any]:
    """A dataclass as a plain nested dict of YAML's own types, for config.yaml."""
    return {
        item.name: nested(value) if is_dataclass(value := getattr(instance, item.name)) else plain(value)
        for item in fields(instance)
    }


def plain(value: Any) -> Any:
    """Tuples and other sequences as lists: YAML has no other."""
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


RANK_ZERO_GRACE_S = 5.0
"""seconds that other ranks leave to rank zero to speak: it ends then, and the launcher ends them"""


def exit_with_mistake(error: Exception, rank: int, leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """One line for a user's mistake, from rank zero, and exit code 2.

    The first rank to end makes the launcher end the others: these wait, else rank zero might be ended before
    it spoke. A rank that is still there after that has made a mistake that rank zero has not (no data on its
    node), and speaks itself.
    """
    if rank > 0:
        time.sleep(RANK_ZERO_GRACE_S)
    print(f"rankzero: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    leave(2)
