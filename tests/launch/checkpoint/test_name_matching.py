"""Which name of a model is which name in a file of weights."""

from __future__ import annotations

import pytest

from launch.checkpoint.name_matching import match_names


@pytest.mark.parametrize(
    ("sources", "targets", "expected"),
    [
        ("a.w b.w", "b.w a.w", "b.w a.w"),
        ("module.a.w", "a.w", "module.a.w"),
        ("a.w", "_orig_mod.a.w", "a.w"),
        ("a._fsdp_wrapped_module._checkpoint_wrapped_module.w b._orig_mod.w", "a.w b.w", None),
        ("module.w w", "module.w w", None),
        ("module.module.w module.w", "module.w w", None),
        ("model.a.w model.b.w head.w", "a.w b.w head.w", None),
        ("a.w b.w head.w", "net.a.w net.b.w head.w", None),
        ("ema.a.w ema.b.w a.w", "a.w b.w", "ema.a.w ema.b.w"),
        ("module.a.w a.w", "a.w", "a.w"),
        ("x.y", "a.w", ""),
    ],
)
def test_match_names(sources: str, targets: str, expected: str | None) -> None:
    matching, _ = match_names(
        {name: (2,) for name in sources.split()}, {name: (2,) for name in targets.split()}
    )
    expected = sources if expected is None else expected
    assert [matching.pairs[name] for name in targets.split() if name in matching.pairs] == expected.split()


def test_of_two_prefixes_the_one_that_fits_by_shape() -> None:
    sources = {"a.w": (2, 3), "b.w": (4, 5)}
    matching, rival = match_names(sources, {"w": (4, 5)})
    assert matching.pairs == {"w": "b.w"}
    assert not rival
    assert "'module.'" in match_names({"_orig_mod.w": (2,), "module.w": (2,)}, {"w": (2,)})[1]
