"""A table of the models of a run, from one batch: module, class, output shape, dtype and parameters."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launch.cli.rich_table import make_table
from launch.data.batch import tensors_of
from launch.runtime.seeding import seed_device
from launch.runtime.text import shape_text

if TYPE_CHECKING:
    from launch.state.run import Run
    from recipes.parts.data import Batch
    from strategies.base import Strategy

TABLE_ROWS = 30
"""the table goes as deep into the model as so many rows allow: one screen"""
ALIKE = 8
"""so many equal siblings in a row are drawn as one"""


@dataclass
class Seen:
    """What a forward pass showed of a module."""

    shapes: str
    dtypes: str
    calls: int = 1


@dataclass
class Node:
    """A module in the table, or several alike."""

    name: str
    cells: tuple[str, ...]
    """class, output, dtype, parameters"""
    children: list[Node] = field(default_factory=list)


def tables(run: Run, batch: Batch) -> Iterator[str]:
    """The models, as text. Runs each loss once on `batch`, without gradient."""
    seen: dict[nn.Module, Seen] = {}
    modules = dict.fromkeys(
        module for strategy in run.strategies.values() for module in strategy.module.modules()
    )
    handles = [module.register_forward_hook(noting(seen)) for module in modules]
    try:
        with torch.no_grad():
            for name, loss_function in run.recipe.losses().items():
                seed_device(run.config.seed, "debug")
                with run.strategies[name].inference():
                    loss_function(run.models, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, strategy in run.strategies.items():
        yield ""
        yield from draw(name, tree(name, strategy.module, seen, strategy.layout.shapes))
        yield f"  {totals(strategy)}"


def noting(seen: dict[nn.Module, Seen]) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that remembers the first output of each module, and counts."""

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if module in seen:
            seen[module].calls += 1
            return
        parts = list(tensors_of(output))
        dtypes = dict.fromkeys(str(part.dtype).removeprefix("torch.") for part in parts)
        shapes = ", ".join(shape_text(part.shape) for part in parts)
        seen[module] = Seen(shapes or type(output).__name__, ", ".join(dtypes))

    return note


def tree(
    name: str, root: nn.Module, seen: Mapping[nn.Module, Seen], shapes: Mapping[str, tuple[int, ...]]
) -> Node:
    """The modules of `root` as nodes, in the order in which they were registered; `shapes` as in `Layout`."""
    sizes = parameter_sizes(root, shapes)
    owners = {
        id(parameter): owner for owner, parameter in root.named_parameters()
    }  # of a tied one, the first

    def node(label: str, path: str, module: nn.Module, usual: int) -> Node:
        held = list({id(p): p for p in module.parameters()}.values())
        tied = path != "" and held and not any(owners[id(p)].startswith(f"{path}.") for p in held)
        frozen = held and not any(p.requires_grad for p in held)
        count = (
            f"{sum(sizes[id(p)] for p in held):,}{' tied' if tied else ''}{' frozen' if frozen else ''}"
            if held
            else ""
        )
        note = seen.get(module)
        calls = note.calls if note else usual  # told where it is not that of the whole
        times = f"  ({calls} calls)" if calls != usual else ""
        # a list of modules is a name, not something to call
        output = (
            f"{note.shapes}{times}"
            if note
            else ""
            if isinstance(module, nn.ModuleList | nn.ModuleDict)
            else "not called"
        )
        cells = (type(module).__name__, output, note.dtypes if note else "", count)
        return Node(
            label, cells, [node(n, f"{path}.{n}".strip("."), c, calls) for n, c in module.named_children()]
        )

    return node(name, "", root, 1)


def parameter_sizes(root: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, int]:
    """Elements of each whole parameter by its id, however much of it this rank holds."""
    return {
        id(parameter): math.prod(shapes.get(f"model/{name}", tuple(parameter.shape)))
        for name, parameter in root.named_parameters()
    }


def fold(siblings: list[Node]) -> Iterator[Node]:
    """The siblings, with a long row of equal ones as one node."""
    start = 0
    while start < len(siblings):
        first = siblings[start]
        stop = start + 1
        while stop < len(siblings) and alike(siblings[stop], first):
            stop += 1
        if stop - start >= ALIKE:
            yield Node(
                f"{first.name} to {siblings[stop - 1].name}, {stop - start} alike",
                first.cells,
                first.children,
            )
        else:
            yield from siblings[start:stop]
        start = stop


def alike(a: Node, b: Node) -> bool:
    """Whether two nodes differ in their names only."""
    return a.cells == b.cells and [child.name for child in a.children] == [child.name for child in b.children]


def rows(node: Node, depth: int, level: int = 0) -> Iterator[tuple[str, ...]]:
    """The table down to `depth`."""
    yield ("  " * level + node.name, *node.cells)
    if level < depth:
        for child in fold(node.children):
            yield from rows(child, depth, level + 1)


def draw(name: str, root: Node) -> list[str]:
    """The deepest table that fits one screen, as lines."""
    from rich.console import Console
    from rich.text import Text

    shown, depth = list(rows(root, 1)), 1
    while len(deeper := list(rows(root, depth + 1))) <= TABLE_ROWS and len(deeper) > len(shown):
        shown, depth = deeper, depth + 1
    headings = [f"model {name}" if name != "model" else "model", "class", "output", "dtype"]
    table = make_table([*headings, ">parameters"], wrap=headings)
    for row in shown:
        table.add_row(*map(Text, row))
    width = shutil.get_terminal_size((110, 24)).columns
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [f" {line.rstrip()}" for line in capture.get().splitlines() if line.strip()]


def totals(strategy: Strategy) -> str:
    """The last line of a table."""
    parameters = list(strategy.module.parameters())
    sizes = parameter_sizes(strategy.module, strategy.layout.shapes)
    trainable = sum(sizes[id(p)] for p in parameters if p.requires_grad)
    dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parameters)
    total = strategy.layout.num_parameters
    share = "all trainable" if trainable == total else f"{trainable:,} trainable"
    return f"{total:,} parameters ({', '.join(dtypes)}), {share}"
