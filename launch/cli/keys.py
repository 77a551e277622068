"""A dataclass as dotted keys, key=value: what there is, and how it is read, parsed, checked, suggested and
written.

No torch; pydantic is imported by `build` alone, so that `--help` and an unknown key are answered without it.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from inspect import get_annotations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from launch.cli.ranges import OUT_OF_RANGE, describe_range
from launch.cli.suggestions import suggest
from launch.cli.synonyms import explain

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")
YAML_1_1_BOOLS = ("yes", "no", "on", "off", "y", "n")
"""true and false for PyYAML, in any case: a key here takes `true` and `false` only"""


@dataclass(frozen=True)
class Key:
    """One key of the command line."""

    name: str
    hint: Any
    """its type, without the range"""
    default: Any
    owner: type
    """the dataclass that declares it: where its help text stands"""
    annotated: Any = None
    """its type with the range"""

    @property
    def type_name(self) -> str:
        """The type for people: `int`, `a|b`, `float|null`."""
        return describe_type(self.hint)


def describe_type(hint: Any) -> str:
    """A type hint as a user would write it."""
    if hint is type(None):
        return "null"
    if hint is bool:
        return "true|false"
    if get_origin(hint) in (Union, types.UnionType):
        return "|".join(describe_type(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return "|".join(format_value(value) for value in get_args(hint))
    if get_args(hint):
        inner = ",".join(describe_type(part) for part in get_args(hint) if part is not Ellipsis)
        return f"{get_origin(hint).__name__}[{inner}]"
    return str(getattr(hint, "__name__", hint))


def keys_of(owner: type, prefix: str = "", declared: Any = None) -> Iterator[Key]:
    """The keys of a dataclass type and, under its name and a dot, of each dataclass in it.

    `declared` is the instance that the outer dataclass has for a default: a recipe's own `Optim(lr=0.02)`.
    """
    hints, annotated = get_type_hints(owner), get_type_hints(owner, include_extras=True)
    for item in fields(owner):
        hint = hints[item.name]
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if declared is not None:
            default = getattr(declared, item.name)
        if is_dataclass(hint):
            yield from keys_of(hint, f"{prefix}{item.name}.", default)  # type: ignore[arg-type]  # a class, not an instance
        else:
            yield Key(
                prefix + item.name, hint, default, declaring_class(owner, item.name), annotated[item.name]
            )


def declaring_class(owner: type, name: str) -> type:
    """The class in whose body the field `name` of `owner` is written."""
    return next(base for base in owner.__mro__ if name in get_annotations(base))


# reading ----------------------------------------------------------------------------------------------------


def read_argv(argv: Sequence[str]) -> dict[str, str]:
    """`key=value` arguments as a mapping; the last of a repeated key counts. Raises ValueError for any other
    argument.
    """
    values: dict[str, str] = {}
    for argument in argv:
        name, equals, value = argument.partition("=")
        if not equals or not name:
            raise ValueError(f"{argument!r} is not key=value; `--help` lists the keys")
        values[name.removeprefix("--")] = value
    return values


def read_yaml(path: str, key: str = "config", as_text: bool = False) -> dict[str, Any]:
    """The keys of a YAML file, which `key` names, flattened to dotted names; `as_text`: values as written.

    Raises ValueError if it is not a mapping of keys.
    """
    if not Path(path).is_file():
        raise ValueError(f"{key}={path}: there is no such file")
    loader = yaml.BaseLoader if as_text else yaml.SafeLoader
    try:
        content = yaml.load(Path(path).read_text(), loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{key}={path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{key}={path} must hold `key: value` lines, not a {type(content).__name__}")
    return dict(flatten({name: value for name, value in content.items() if name != "made_with"}))


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} as ("a.b", 1)."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def parse_value(text: str, key: Key) -> Any:
    """A value of the command line as YAML, except where the key wants the text itself, or a list without
    brackets.
    """
    is_list = get_origin(key.hint) in (list, tuple)
    wants_text = not is_list and str in (get_args(key.hint) or (key.hint,)) and text != "null"
    if wants_text or text.lower() in YAML_1_1_BOOLS:
        return text
    if is_list and not text.startswith("["):
        text = f"[{text.removeprefix('(').removesuffix(')')}]"
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


# checking ---------------------------------------------------------------------------------------------------


def check_known(values: Mapping[str, Any], known: Mapping[str, Key], where: str) -> None:
    """Raise ValueError for the first key that nobody declares, with its name here or the nearest names."""
    for name, value in values.items():
        if name not in known:
            text = format_value(value)
            hint = suggest(name, text, known) or "`--help` lists the keys"
            raise ValueError(explain(name, text, known) or f"{name} is not a key of {where}; {hint}")


def build(owner: type[T], values: Mapping[str, Any]) -> T:
    """An instance of the dataclass `owner` from dotted keys, each checked against its declared type and
    range.

    Raises ValueError, in one line for the user.
    """
    from pydantic import TypeAdapter, ValidationError

    known = {key.name: key for key in keys_of(owner)}
    if missing := [name for name, key in known.items() if key.default is MISSING and name not in values]:
        raise ValueError(f"{missing[0]}= is missing; it is {known[missing[0]].type_name}")
    for name, value in values.items():
        refuse_text_for_bool(known[name], value)
    # a group that is given in part keeps the recipe's own defaults for the rest, not those of the group's
    # class
    values = {name: key.default for name, key in known.items() if "." in name} | dict(values)
    try:
        return TypeAdapter(owner).validate_python(unflatten(values))
    except ValidationError as error:
        raise ValueError(one_line(error.errors(), known, values)) from None


def refuse_text_for_bool(key: Key, value: Any) -> None:
    """Raise ValueError for `yes`, `on`, ... where a key takes true or false: pydantic would take them."""
    parts = get_args(key.hint) or (key.hint,)
    if isinstance(value, str) and bool in parts and str not in parts:
        raise ValueError(type_message(key, value))


def one_line(errors: Sequence[ErrorDetails], known: Mapping[str, Key], values: Mapping[str, Any]) -> str:
    """The first of pydantic's errors, for the user: a value out of its range, or of another type."""
    name = key_at(errors[0]["loc"], known)
    if not name:  # raised by the dataclass itself
        return str(errors[0]["msg"]).removeprefix("Value error, ")
    key = known[name]
    of_key = {str(error["type"]) for error in errors if key_at(error["loc"], known) == name}
    return range_message(key, values[name]) if of_key & OUT_OF_RANGE else type_message(key, values[name])


def key_at(location: Sequence[int | str], known: Mapping[str, Key]) -> str:
    """The key that pydantic's location of an error is in, or "" if it is in none."""
    parts = [str(part) for part in location]
    dotted = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in dotted if name in known), "")


def range_message(key: Key, value: Any) -> str:
    """That a value is of the key's type, and out of its range."""
    each = ": each" if isinstance(value, (list, tuple)) else ""
    return f"{key.name}={format_value(value)}{each} must be {describe_range(key.annotated)}{default_of(key)}"


def type_message(key: Key, value: Any) -> str:
    """That a value is not of the key's type."""
    return f"{key.name}={format_value(value)} is not {key.type_name}{default_of(key)}"


def default_of(key: Key) -> str:
    """The default, as messages end with it."""
    return "" if key.default is MISSING else f" (default: {format_value(key.default)})"


def unflatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return nested


# writing ----------------------------------------------------------------------------------------------------


def format_value(value: Any) -> str:
    """A value as one would type it."""
    if value is None or value is MISSING:
        return "null" if value is None else "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(format_value(part) for part in value)}]"
    return str(value)


def to_dict(instance: Any) -> dict[str, Any]:
    """A dataclass as a plain nested dict of YAML's own types, for config.yaml."""
    return {
        item.name: to_dict(value) if is_dataclass(value := getattr(instance, item.name)) else plain(value)
        for item in fields(instance)
    }


def plain(value: Any) -> Any:
    """Tuples and other sequences as lists: YAML has no other."""
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value
