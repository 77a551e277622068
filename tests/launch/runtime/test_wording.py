"""How messages write shapes, names and counts."""

from __future__ import annotations

from launch.runtime.wording import join_names, plural, shape_text


def test_shapes() -> None:
    assert shape_text((64, 3, 32, 32)) == "64 x 3 x 32 x 32"
    assert shape_text(()) == "scalar"


def test_names_beyond_the_limit_are_counted() -> None:
    assert join_names(["a", "b", "c"], 2) == "a, b, c"
    assert join_names(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert join_names(["a", "b", "c", "d"], 2, "nodes") == "a, b and 2 more nodes"
    assert join_names([]) == ""


def test_counts() -> None:
    assert [plural(count, "file") for count in (0, 1, 1024)] == ["0 files", "1 file", "1,024 files"]
