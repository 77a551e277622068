"""The table of a model, before its first step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

from launch.reporting.model_table import MAX_ROWS, build_tree, model_tables, table_rows
from launch.state.run import Run
from tests.launch.processes import TINY
from tests.launch.training.test_debug import make_run, recipe  # noqa: F401  # a fixture


def table(run: Run) -> list[list[str]]:
    """The rows of the tables, each as its columns."""
    batch = next(iter(run.train_loader()))
    return [re.split(r" {2,}", line.strip()) for line in model_tables(run, batch)]


def test_the_table_tells_module_shape_dtype_and_parameters() -> None:
    found = table(make_run(f"recipe={TINY}:Fit", "batch_size=10", "precision=bf16"))
    assert ["model", "class", "output", "dtype", "parameters"] in found
    assert ["model", "Sequential", "10 x 1", "bfloat16", "57"] in found
    assert ["0", "Linear", "10 x 8", "bfloat16", "48"] in found
    assert ["3", "Dropout", "10 x 8", "bfloat16"] in found
    assert found[-1] == ["57 parameters (float32), all trainable"]


def test_each_model_has_its_table() -> None:
    found = table(make_run(f"recipe={TINY}:Pair", "batch_size=10"))
    assert [row[0] for row in found if row[-1] == "parameters"] == ["model student", "model judge"]
    assert ["judge", "Linear", "10 x 1", "(2 calls)", "float32", "6"] in found


def test_equal_blocks_are_one_row(recipe: Path) -> None:  # noqa: F811
    found = table(make_run(f"recipe={recipe}"))
    assert ["0 to 11, 12 alike", "Sequential", "4 x 8", "float32", "72"] in found


def test_what_is_not_called_frozen_or_tied_is_named() -> None:
    model = nn.ModuleDict(
        {"first": nn.Linear(2, 2), "idle": nn.Linear(3, 3), "last": nn.Linear(2, 2, bias=False)}
    )
    model["last"].weight = model["first"].weight
    model["idle"].requires_grad_(False)
    found = list(table_rows(build_tree("model", model, {}, {}), 1))
    assert ("  idle", "Linear", "not called", "", "12 frozen") in found
    assert ("  last", "Linear", "not called", "", "4 tied") in found


@pytest.mark.parametrize(("depth", "blocks"), [(18, 8), (34, 16)])
def test_a_resnet_fits_one_screen_and_each_block_shows(depth: int, blocks: int) -> None:
    run = make_run("recipe=resnet", f"model.depth={depth}", "batch_size=2", "micro_batch_size=2")
    lines = list(model_tables(run, next(iter(run.train_loader()))))
    assert len(lines) <= MAX_ROWS + 5
    assert sum(" BasicBlock " in line for line in lines) == blocks
