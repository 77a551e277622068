"""What every built-in recipe must keep of the contract."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from recipes import RECIPES
from recipes.base import Recipe, local_num_items
from recipes.gan import GAN
from tests.launch.processes import COMMAND_TIMEOUT_S

ROOT = Path(__file__).parents[2]


def recipe_of(name: str) -> Recipe:
    """The recipe as declared, made small."""
    module = importlib.import_module(RECIPES[name])
    (owner,) = (
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Recipe) and item.__module__ == module.__name__
    )
    return owner()


def batch_of(recipe: Recipe, size: int, first: int = 0) -> Any:
    train = recipe.build_data().train
    torch.manual_seed(0)
    return default_collate([train[i] for i in range(first, first + size)])


def cut(batch: Any, start: int, stop: int) -> Any:
    return [part[start:stop] for part in batch]


def build(recipe: Recipe) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: factory() for name, factory in recipe.models().items()}


each = pytest.mark.parametrize("name", RECIPES)


def test_importing_the_recipes_imports_neither_torch_nor_numpy() -> None:
    modules = ", ".join(RECIPES.values())
    code = (
        f"import sys, {modules}; heavy = "
        "{'torch', 'torchvision', 'torchmetrics', 'sklearn', 'numpy', 'pydantic'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=COMMAND_TIMEOUT_S)


def test_checking_a_recipe_imports_no_torch() -> None:
    lines = ["import sys", "from recipes.parts.option_types import check_groups"]
    for module in RECIPES.values():
        lines += [
            f"import {module} as m",
            "[(check_groups(c()), c().check()) for c in vars(m).values()",
        ]
        lines[-1] += " if getattr(c, '__module__', 0) == m.__name__ and hasattr(c, 'build_data')]"
    lines.append("assert not {'torch', 'numpy', 'sklearn'} & set(sys.modules), 'imported'")
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, check=True, timeout=COMMAND_TIMEOUT_S)


@each
def test_a_recipe_is_a_short_file_that_declares(name: str) -> None:
    path = ROOT / (RECIPES[name].replace(".", "/") + ".py")
    assert len(path.read_text().splitlines()) < 150
    for node in ast.walk(ast.parse(path.read_text())):
        imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not {module.split(".")[0] for module in imported} & {"launch", "strategies"}
        assert not isinstance(node, ast.Call) or getattr(node.func, "attr", "") not in (
            "backward",
            "step",
            "zero_grad",
        )


@each
def test_every_field_has_a_line_of_help(name: str) -> None:
    def undocumented(owner: type) -> list[str]:
        found = []
        for base in owner.__mro__:
            if not is_dataclass(base):
                continue
            (body,) = ast.parse(inspect.getsource(base)).body
            assert isinstance(body, ast.ClassDef)
            for node, after in zip(body.body, [*body.body[1:], None], strict=True):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    kind = get_type_hints(base).get(node.target.id)
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    if (
                        node.target.id in {item.name for item in fields(base)}
                        and not is_dataclass(kind)
                        and not documented
                    ):
                        found.append(f"{base.__name__}.{node.target.id}")
                    if isinstance(kind, type) and is_dataclass(kind):
                        found += undocumented(kind)
        return found

    assert undocumented(type(recipe_of(name))) == []


@each
def test_defaults_hold_for_one_to_four_ranks(name: str) -> None:
    defaults = recipe_of(name).defaults
    assert ("epochs" in defaults) != ("steps" in defaults)
    for ranks in (1, 2, 4):
        assert defaults["batch_size"] % (ranks * defaults["micro_batch_size"]) == 0


@each
def test_the_loss_is_a_sum(name: str) -> None:
    recipe = recipe_of(name)
    batch = batch_of(recipe, 8)
    models = {key: model.eval() for key, model in build(recipe).items()}
    for loss in recipe.losses().values():

        def value(start: int, stop: int, loss: Any = loss) -> float:
            with torch.no_grad():
                return float(loss(models, cut(batch, start, stop)))

        # noise that a loss draws (GAN) is drawn sample by sample: the halves go on where the whole began
        torch.manual_seed(1)
        whole = value(0, 8)
        torch.manual_seed(1)
        halves = value(0, 4) + value(4, 8)
        assert whole == pytest.approx(halves, rel=1e-5)
    assert int(local_num_items(recipe, batch)) == 2 * int(local_num_items(recipe, cut(batch, 0, 4)))


@each
def test_each_loss_reaches_all_that_it_trains(name: str) -> None:
    recipe = recipe_of(name)
    batch = batch_of(recipe, 4)
    models = build(recipe)
    assert set(recipe.losses()) == set(recipe.optimizers()) == set(models)
    for trained, loss in recipe.losses().items():
        for key, model in models.items():
            model.requires_grad_(key == trained)
        value = loss(models, batch)
        assert value.shape == ()
        value.backward()  # type: ignore[no-untyped-call]
        missing = [key for key, parameter in models[trained].named_parameters() if parameter.grad is None]
        assert missing == []


@each
def test_optimizers_hold_each_parameter_once(name: str) -> None:
    recipe = recipe_of(name)
    models = build(recipe)
    for key, factory in recipe.optimizers().items():
        held = [parameter for group in factory(models[key]).param_groups for parameter in group["params"]]
        assert len(held) == len(set(held))
        assert set(held) == set(models[key].parameters())


@each
def test_blocks_are_parts_of_the_model_and_do_not_overlap(name: str) -> None:
    recipe = recipe_of(name)
    for model in build(recipe).values():
        blocks = list(recipe.blocks(model))
        assert blocks
        assert all(block in set(model.modules()) for block in blocks)
        inside = [module for block in blocks for module in block.modules()]
        assert len(inside) == len(set(inside))
        assert all(any(True for _ in block.parameters()) for block in blocks)


@each
def test_evaluation_gives_the_loss_and_feeds_the_metrics(name: str) -> None:
    recipe = recipe_of(name)
    batch = batch_of(recipe, 6)
    models = {key: model.eval() for key, model in build(recipe).items()}
    losses, outcome = recipe.eval_step_models(models, batch)
    assert set(losses) == set(recipe.losses())
    metrics = recipe.metrics()
    assert recipe.monitor == "loss" or recipe.monitor in metrics
    assert recipe.monitor_mode in ("min", "max")
    assert (outcome is None) == (not metrics)
    if outcome is not None:
        assert float(losses["model"].detach()) == pytest.approx(
            float(recipe.loss(models["model"], batch).detach())
        )
        for metric in metrics.values():
            metric.update(*outcome)
            assert metric.compute().isfinite().all()


@each
def test_the_same_seed_builds_the_same_models_and_training_moves_them(name: str) -> None:
    recipe = recipe_of(name)
    models, again = build(recipe), build(recipe)
    batch = batch_of(recipe, 8)
    for key in models:
        for mine, other in zip(models[key].parameters(), again[key].parameters(), strict=True):
            assert torch.equal(mine, other)
    before = copy.deepcopy(models)
    for key, loss in recipe.losses().items():
        optimizer = recipe.optimizers()[key](models[key])
        for _ in range(2):  # what stands before a gain of zero moves in the second step
            optimizer.zero_grad()
            (loss(models, batch) / int(local_num_items(recipe, batch))).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        moved = [
            not torch.equal(a, b)
            for a, b in zip(models[key].parameters(), before[key].parameters(), strict=True)
        ]
        assert all(moved)


def test_the_generator_gets_its_gradient_through_a_frozen_discriminator() -> None:
    recipe = GAN()
    models = build(recipe)
    batch = batch_of(recipe, 4)
    models["discriminator"].requires_grad_(False)
    recipe.losses()["generator"](models, batch).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in models["generator"].parameters())
    assert all(parameter.grad is None for parameter in models["discriminator"].parameters())
    models = build(recipe)
    recipe.losses()["discriminator"](models, batch).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in models["generator"].parameters())
