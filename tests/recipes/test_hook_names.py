"""Another framework's method, or an old name, is answered with ours; helpers are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli.resolve import find_recipe

HEAD = """
from dataclasses import dataclass
from recipes.base import Recipe
from recipes.parts.classification import Classification

@dataclass(kw_only=True)
"""


def find(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(HEAD + text)
    return find_recipe(str(path)).__name__


@pytest.mark.parametrize(
    ("base", "signature", "ours"),
    [
        ("Recipe", "training_step(self, batch, batch_idx)", "loss(self, model, batch)"),
        ("Classification", "training_step(self, batch, batch_idx)", "loss(self, model, batch)"),
        ("Recipe", "compute_loss(self, model, inputs)", "loss(self, model, batch)"),
        ("Recipe", "forward(self, x)", "build_model(self)"),
        ("Recipe", "configure_optimizers(self)", "build_optimizer(self, model)"),
        ("Recipe", "train_dataloader(self)", "build_data(self)"),
        ("Recipe", "validation_step(self, batch, batch_idx)", "eval_step(self, model, batch)"),
        ("Recipe", "evaluate(self, model, batch)", "eval_step(self, model, batch)"),
        ("Recipe", "score(self, models, batch)", "eval_step_models(self, models, batch)"),
        ("Recipe", "count(self, batch)", "num_items(self, batch)"),
        ("Recipe", "count_per_sample(self)", "items_per_sample(self)"),
    ],
)
def test_a_name_that_nothing_calls(tmp_path: Path, base: str, signature: str, ours: str) -> None:
    text = f"class Mine({base}):\n    def {signature}: ...\n"
    with pytest.raises(ValueError, match=r"^Mine\.\w+ is .*; override ") as caught:
        find(tmp_path, "foreign", text)
    message = str(caught.value)
    assert f"Mine.{signature.partition('(')[0]} is " in message
    assert f"override {ours}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        # a helper of one's own, by its arguments
        "class Mine(Classification):\n    def evaluate(self, path): ...\n    def count(self): ...\n",
        # called by a method of the recipe
        "class Mine(Recipe):\n"
        "    def losses(self): return {'model': lambda models, batch: self.forward(models, batch)}\n"
        "    def forward(self, models, batch): ...\n",
        # ours is there too
        "class Mine(Recipe):\n    def loss(self, model, batch): ...\n"
        "    def training_step(self, batch): ...\n",
        "class Mine(Recipe):\n    def losses(self): ...\n    def compute_loss(self): ...\n",
        # an option
        "class Mine(Recipe):\n    score: float = 0.5\n    count: int = 3\n",
    ],
)
def test_a_helper_is_no_mistake(tmp_path: Path, text: str) -> None:
    assert find(tmp_path, "helper", text) == "Mine"
