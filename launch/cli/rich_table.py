"""The tables that commands print: one look for all of them. No torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def make_table(columns: Sequence[str], title: str = "", wrap: Collection[str] | None = None) -> Table:
    """An empty rich table. A column whose heading begins with `>` is of numbers, and stands right-aligned.

    `wrap`: the headings of columns that may take several lines where the terminal is narrow (default: the
    last, unless it is of numbers).
    """
    from rich import box
    from rich.table import Table

    if wrap is None:
        wrap = {name for name in columns[-1:] if not name.startswith(">")}
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=title or None,
        title_justify="left",
    )
    for name in columns:
        is_numeric = name.startswith(">")
        table.add_column(
            name.removeprefix(">"),
            justify="right" if is_numeric else "left",
            no_wrap=name not in wrap,
            overflow="fold",
        )
    return table
