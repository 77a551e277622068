"""`--help`: how to call a command, each key with its type, default and meaning, and the exit codes. No torch.

The meaning of a key is the docstring under its field.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields

from launch.cli.config import HEADINGS, Config
from launch.cli.exits import MEANINGS
from launch.cli.keys import Key, format_value, keys_of
from launch.cli.resolve import find_recipe
from launch.runtime.exit_codes import ExitCode
from recipes import RECIPES

NARROW = 100
"""columns below which a key's meaning stands under it, not beside it"""
WIDEST = 120


def screen_width() -> int:
    """Columns to write in: those of the terminal, or of a usual one."""
    return min(shutil.get_terminal_size((110, 24)).columns, WIDEST)


def page(
    manual: str,
    options: type | None = None,
    *,
    takes_run: bool = False,
    recipe: str = "",
    exits: Mapping[ExitCode, str] | None = None,
    width: int = 0,
) -> str:
    """The manual, a command's own options, the keys of a run and of its recipe where it takes them, the exit
    codes.
    """
    width = width or screen_width()
    sections = [reflow(manual, width)]
    if options is not None and fields(options):
        sections.append("\n".join(["Options (key=value)", *key_table(list(keys_of(options)), width)]))
    if takes_run:
        sections += run_sections(recipe, width)
    sections.append("\n".join(exit_table(exits or {}, width)))
    return "\n\n".join(sections)


def run_sections(recipe: str, width: int) -> Iterator[str]:
    """The keys of a run under their headings, then those of the recipe, or which recipes there are."""
    keys = list(keys_of(Config))
    yield "Keys of a run: key=value, values as in YAML, dots for nesting"
    for heading, names in HEADINGS.items():
        chosen = [key for name in names for key in keys if name in (key.name, key.name.partition(".")[0])]
        yield "\n".join([heading, *key_table(chosen, width)])
    if recipe:
        yield from recipe_sections(recipe, width)
    else:
        built_in = (
            f"Recipes built in: {', '.join(RECIPES)}; recipe=NAME --help adds the keys of one (model.*, ...)"
        )
        yield textwrap.fill(built_in, width)


def recipe_sections(recipe: str, width: int) -> Iterator[str]:
    """The keys of a recipe, a section each for its groups, and its defaults for keys of a run."""
    owner = find_recipe(recipe)
    about = (owner.__doc__ or "").strip().partition("\n")[0]
    if about.startswith(f"{owner.__name__}("):  # what dataclass makes up for a class without docstring
        about = ""
    yield textwrap.fill(f"Keys of recipe={recipe}{': ' if about else ''}{about}", width)
    groups: dict[str, list[Key]] = {}
    for key in keys_of(owner):
        groups.setdefault(key.name.rpartition(".")[0], []).append(key)
    for group, keys in groups.items():
        yield "\n".join([f"{group}.*" if group else "Its own", *key_table(keys, width)])
    if owner.defaults:
        changed = ", ".join(f"{key}={format_value(value)}" for key, value in owner.defaults.items())
        yield textwrap.fill(f"Its defaults for keys of a run: {changed}", width)


# parts of a page --------------------------------------------------------------------------------------------


def reflow(text: str, width: int) -> str:
    """The paragraphs of a module's docstring in lines of `width`; what is indented (commands) stays so."""
    paragraphs = re.split("\n\n+", text.strip("\n"))
    return "\n\n".join(
        paragraph if paragraph.startswith(" ") else textwrap.fill(" ".join(paragraph.split()), width)
        for paragraph in paragraphs
    )


def key_table(keys: Sequence[Key], width: int) -> list[str]:
    """A paragraph for each key: name and default, type, docstring; in three columns where there is room."""
    left = min(max((len(assignment(key)) for key in keys), default=0), 34)
    middle = min(max((len(key.type_name) for key in keys), default=0), 20)
    indent = " " * (left + middle + 6 if width >= NARROW else 6)
    lines: list[str] = []
    for key in keys:
        body = textwrap.wrap(meaning(key), width - len(indent)) or [""]
        head = f"  {assignment(key):{left}}  {key.type_name:{middle}}  "
        if width < NARROW:
            lines += textwrap.wrap(f"  {assignment(key)}  {key.type_name}", width)
        elif len(head) > len(indent):
            lines.append(head.rstrip())
        else:
            lines.append((head + body.pop(0)).rstrip())
        lines += [indent + more for more in body if more]
    return lines


def exit_table(exits: Mapping[ExitCode, str], width: int) -> list[str]:
    """The exit codes that a command names, or all."""
    shown = {code: exits.get(code, MEANINGS[code]) for code in ExitCode if code in exits or not exits}
    shown[ExitCode.MISTAKE] = MEANINGS[ExitCode.MISTAKE]
    lines = ["Exit codes"]
    for code, text in sorted(shown.items()):
        lines += textwrap.wrap(text, width, initial_indent=f"  {code:<5}", subsequent_indent=" " * 7)
    return lines


def assignment(key: Key) -> str:
    """`key=default`, as one would type it."""
    return f"{key.name}={'' if key.default in (None, '', MISSING) else format_value(key.default)}"


def meaning(key: Key) -> str:
    """The docstring under the key's field."""
    return docstrings(key.owner).get(key.name.rpartition(".")[2], "")


def docstrings(owner: type) -> dict[str, str]:
    """The docstring under each field of a class: Python does not keep them, so they are read from its
    source.
    """
    if owner not in _DOCSTRINGS:
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        _DOCSTRINGS[owner] = dict(_documented(body))
    return _DOCSTRINGS[owner]


_DOCSTRINGS: dict[type, dict[str, str]] = {}


def _documented(body: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for item, after in zip(body.body, body.body[1:], strict=False):
        match item, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())
