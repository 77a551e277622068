"""Each recipe learns what it is for, in a plain loop on one process: no strategy, no engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from recipes.base import Recipe, local_num_items
from recipes.gan import GAN
from recipes.gpt import GPT
from recipes.gpt import Model as GPTModel
from recipes.mnist import MNIST
from recipes.parts.data import Dataset
from recipes.parts.images import Images
from recipes.parts.permutation import Permutation
from recipes.parts.text import Text
from recipes.resnet import ResNet
from tests.recipes.test_images import mnist_root


def train(recipe: Recipe, *, epochs: int | None = None, steps: int | None = None) -> dict[str, nn.Module]:
    """Textbook training with the recipe's own batch sizes; drops the ragged end of each epoch."""
    recipe.check()
    torch.manual_seed(0)
    data = recipe.build_data().train
    models = {name: build() for name, build in recipe.models().items()}
    for model in models.values():
        init_weights: Any = getattr(model, "init_weights", None)
        for module in model.modules() if init_weights is not None else ():
            init_weights(module)
    optimizers = {name: build(models[name]) for name, build in recipe.optimizers().items()}
    rates = {
        name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in optimizers.items()
    }
    batch_size, micro = recipe.defaults["batch_size"], recipe.defaults["micro_batch_size"]
    in_epoch = len(data) // batch_size
    total = steps or in_epoch * (epochs or recipe.defaults["epochs"])
    for step in range(total):
        order = Permutation(len(data), 0, step // in_epoch)
        first = step % in_epoch * batch_size
        starts = range(first, first + batch_size, micro)
        batches = [default_collate([data[order[i]] for i in range(start, start + micro)]) for start in starts]
        count = sum(int(local_num_items(recipe, batch)) for batch in batches)
        for name, loss in recipe.losses().items():
            for other, model in models.items():
                model.requires_grad_(other == name)
            for batch in batches:
                (loss(models, batch) / count).backward()  # type: ignore[no-untyped-call]
            for group, rate in zip(optimizers[name].param_groups, rates[name], strict=True):
                group["lr"] = rate * recipe.schedule.factor(step, total)
            optimizers[name].step()
            optimizers[name].zero_grad()
    return models


@torch.no_grad()
def accuracy(recipe: Recipe, model: nn.Module, data: Dataset | None) -> float:
    assert data is not None
    model.eval()
    metric = recipe.metrics()["accuracy"]
    for start in range(0, len(data), 100):
        batch = default_collate([data[i] for i in range(start, min(start + 100, len(data)))])
        metric.update(*recipe.eval_step(model, batch)[1:])
    return float(metric.compute())


@pytest.mark.slow
def test_resnet_reads_digits() -> None:
    recipe = ResNet()
    model = train(recipe, epochs=4)["model"]
    assert accuracy(recipe, model, recipe.build_data().test) >= 0.95


@pytest.mark.slow
def test_mnist_reads_digits() -> None:
    recipe = MNIST()
    model = train(recipe, epochs=10)["model"]
    assert accuracy(recipe, model, recipe.build_data().test) >= 0.97


@pytest.mark.slow
def test_mnist_reads_mnist() -> None:
    recipe = MNIST(data=Images(name="mnist", root=str(mnist_root())))
    model = train(recipe, epochs=1)["model"]
    assert accuracy(recipe, model, recipe.build_data().test) >= 0.98  # 0.99 after three epochs


@pytest.mark.slow
def test_gpt_learns_the_letters_of_source_code() -> None:
    recipe = GPT(model=GPTModel(layers=2, width=64), data=Text(block=32))
    model = train(recipe, steps=60)["model"].eval()
    test = recipe.build_data().test
    assert test is not None
    batch = default_collate([test[i] for i in range(100)])
    # the frequencies of the bytes alone are worth 3.3 nats
    assert float(recipe.loss(model, batch).detach()) / int(local_num_items(recipe, batch)) < 3.2


@pytest.mark.slow
def test_gan_draws_what_looks_like_digits() -> None:
    recipe = GAN()
    splits = recipe.build_data()

    def pixels(data: Dataset | None) -> Tensor:
        assert data is not None
        return torch.stack([data[i][0] for i in range(len(data))]).flatten(1)

    train_images, test_images = pixels(splits.train), pixels(splits.test)

    def distance(images: Tensor) -> float:
        return float(torch.cdist(images, train_images).min(1).values.mean())

    generator = train(recipe)["generator"].eval()
    torch.manual_seed(0)
    drawn = generator(torch.randn(200, recipe.model.latent)).detach().flatten(1)
    shuffled = test_images[:, torch.randperm(64)]
    # as near to a training image as unseen digits are, or nearly; the same pixels in another order are far
    # away
    assert distance(drawn) < 2 * distance(test_images) < distance(shuffled)
    assert len(torch.cdist(drawn, train_images).argmin(1).unique()) > 20  # type: ignore[no-untyped-call]
