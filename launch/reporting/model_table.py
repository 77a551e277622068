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
from launch.runtime.wording import shape_text

if TYPE_CHECKING:
    from launch.state.run import Run
    from recipes.parts.data import Batch
    from strategies.base import Strategy

MAX_ROWS = 30
"""of a table, which goes as deep into the model as they allow: one screen"""
FOLD_FROM = 8
"""so many equal siblings in a row become one row"""


@dataclass
class ModuleOutput:
    """The first output of a module in a forward pass, and the number of its calls."""

    shapes: str
    dtypes: str
    calls: int = 1


@dataclass
class TableNode:
    """A module in the table, or several alike."""

    name: str
    cells: tuple[str, ...]
    """class, output, dtype, parameters"""
    children: list[TableNode] = field(default_factory=list)


def model_tables(run: Run, batch: Batch) -> Iterator[str]:
    """The models, as text. Runs each loss once on `batch`, without gradient."""
    outputs: dict[nn.Module, ModuleOutput] = {}
    modules = dict.fromkeys(
        module for strategy in run.strategies.values() for module in strategy.module.modules()
    )
    handles = [module.register_forward_hook(record_output(outputs)) for module in modules]
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
        yield from render_table(name, build_tree(name, strategy.module, outputs, strategy.layout.shapes))
        yield f"  {total_line(strategy)}"


def record_output(outputs: dict[nn.Module, ModuleOutput]) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that remembers the first output of each module, and counts."""

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if module in outputs:
            outputs[module].calls += 1
            return
        parts = list(tensors_of(output))
        dtypes = dict.fromkeys(str(part.dtype).removeprefix("torch.") for part in parts)
        shapes = ", ".join(shape_text(part.shape) for part in parts)
        outputs[module] = ModuleOutput(shapes or type(output).__name__, ", ".join(dtypes))

    return note


def build_tree(
    name: str,
    root: nn.Module,
    outputs: Mapping[nn.Module, ModuleOutput],
    shapes: Mapping[str, tuple[int, ...]],
) -> TableNode:
    """The modules of `root` as nodes, in the order in which they were registered; `shapes` as in `Layout`."""
    sizes = parameter_sizes(root, shapes)
    owners = {
        id(parameter): owner for owner, parameter in root.named_parameters()
    }  # of a tied one, the first

    def node(label: str, path: str, module: nn.Module, usual: int) -> TableNode:
        held = list({id(p): p for p in module.parameters()}.values())
        tied = path != "" and held and not any(owners[id(p)].startswith(f"{path}.") for p in held)
        frozen = held and not any(p.requires_grad for p in held)
        count = (
            f"{sum(sizes[id(p)] for p in held):,}{' tied' if tied else ''}{' frozen' if frozen else ''}"
            if held
            else ""
        )
        note = outputs.get(module)
        calls = note.calls if note else usual  # shown where it is not the parent's
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
        return TableNode(
            label, cells, [node(n, f"{path}.{n}".strip("."), c, calls) for n, c in module.named_children()]
        )

    return node(name, "", root, 1)


def parameter_sizes(root: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, int]:
    """Elements of each whole parameter by its id, however much of it this rank holds."""
    return {
        id(parameter): math.prod(shapes.get(f"model/{name}", tuple(parameter.shape)))
        for name, parameter in root.named_parameters()
    }


def fold_repeated(siblings: list[TableNode]) -> Iterator[TableNode]:
    """The siblings, with a long row of equal ones as one node."""
    start = 0
    while start < len(siblings):
        first = siblings[start]
        stop = start + 1
        while stop < len(siblings) and is_same(siblings[stop], first):
            stop += 1
        if stop - start >= FOLD_FROM:
            yield TableNode(
                f"{first.name} to {siblings[stop - 1].name}, {stop - start} alike",
                first.cells,
                first.children,
            )
        else:
            yield from siblings[start:stop]
        start = stop


def is_same(a: TableNode, b: TableNode) -> bool:
    """Whether two nodes differ in their names only."""
    return a.cells == b.cells and [child.name for child in a.children] == [child.name for child in b.children]


def table_rows(node: TableNode, depth: int, level: int = 0) -> Iterator[tuple[str, ...]]:
    """The table down to `depth`."""
    yield ("  " * level + node.name, *node.cells)
    if level < depth:
        for child in fold_repeated(node.children):
            yield from table_rows(child, depth, level + 1)


def render_table(name: str, root: TableNode) -> list[str]:
    """The deepest table that fits one screen, as lines."""
    from rich.console import Console
    from rich.text import Text

    shown, depth = list(table_rows(root, 1)), 1
    while len(deeper := list(table_rows(root, depth + 1))) <= MAX_ROWS and len(deeper) > len(shown):
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


def total_line(strategy: Strategy) -> str:
    """The last line of a table."""
    parameters = list(strategy.module.parameters())
    sizes = parameter_sizes(strategy.module, strategy.layout.shapes)
    trainable = sum(sizes[id(p)] for p in parameters if p.requires_grad)
    dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parameters)
    total = strategy.layout.num_parameters
    share = "all trainable" if trainable == total else f"{trainable:,} trainable"
    return f"{total:,} parameters ({', '.join(dtypes)}), {share}"
