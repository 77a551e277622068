"""`--help`: every key with its type, default and one line, taken from the docstrings under the fields. No
torch.
"""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING

from launch.cli.config import Config, Key, keys_of, read_line, show
from launch.cli.resolve import find_recipe
from recipes import RECIPES


def page(usage: str, words: Sequence[str]) -> str:
    """How to call, the keys of a run and, if `words` name a recipe, its own."""
    name = read_line(words).get("recipe")
    width = min(shutil.get_terminal_size((110, 24)).columns, 130)
    lines = [usage.strip(), "", "keys of a run (key=value, YAML values, dots for nesting):", ""]
    lines += table(list(keys_of(Config)), width)
    if name is None:
        lines += [
            "",
            f"recipes: {', '.join(RECIPES)}; `recipe=NAME --help` adds the keys of one, e.g. model.*, data.*, optim.*",
        ]
        return "\n".join(lines)
    owner = find_recipe(name)
    about = (owner.__doc__ or "").strip().partition("\n")[0]
    if about.startswith(f"{owner.__name__}("):  # what dataclass makes up for a class without docstring
        about = ""
    lines += ["", f"keys of recipe={name}: {about}", ""]
    lines += table(list(keys_of(owner)), width)
    changed = ", ".join(f"{key}={show(value)}" for key, value in owner.defaults.items())
    return "\n".join([*lines, "", *textwrap.wrap(f"its defaults for keys of a run: {changed}", width)])


def table(keys: list[Key], width: int) -> list[str]:
    """One paragraph a key: name and default, type, and its docstring, in three columns."""
    left = min(max((len(assignment(key)) for key in keys), default=0), 34)
    middle = min(max((len(key.type_name) for key in keys), default=0), 20)
    indent = " " * (left + middle + 6)
    lines: list[str] = []
    documentation: dict[type, dict[str, str]] = {}
    for key in keys:
        words = documentation.setdefault(key.owner, docstrings(key.owner)).get(
            key.name.rpartition(".")[2], ""
        )
        head = f"  {assignment(key):{left}}  {key.type_name:{middle}}  "
        body = textwrap.wrap(words, max(width - len(indent), 30)) or [""]
        if len(head) > len(indent):
            lines.append(head.rstrip())
            head = indent
        lines += [(head + body[0]).rstrip(), *(indent + more for more in body[1:])]
    return lines


def assignment(key: Key) -> str:
    """`key=default`, as one would type it."""
    return f"{key.name}={'' if key.default in (None, '', MISSING) else show(key.default)}"


def docstrings(owner: type) -> dict[str, str]:
    """The docstring under each field of a class: Python does not keep them, so they are read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    return dict(_documented(body))


def _documented(body: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for item, after in zip(body.body, body.body[1:], strict=False):
        match item, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())
