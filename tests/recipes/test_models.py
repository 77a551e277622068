"""What is particular to one recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from recipes.base import local_num_items
from recipes.gan import GAN
from recipes.gan import Model as GANModel
from recipes.gpt import GPT
from recipes.gpt import Model as GPTModel
from recipes.mnist import MNIST
from recipes.parts.data import Splits
from recipes.parts.images import Images
from recipes.parts.optim import Optim
from recipes.parts.regression import Regression
from recipes.parts.text import Text
from recipes.parts.transformer import Decoder
from recipes.resnet import Model, ResNet
from tests.recipes.checking import check_recipe

# resnet -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "blocks"), [(18, 8), (34, 16), (50, 16), (101, 33), (152, 50)])
def test_resnet_has_its_depth(depth: int, blocks: int) -> None:
    with torch.device("meta"):
        recipe = ResNet(model=Model(depth=depth))  # type: ignore[arg-type]
        model = recipe.build_model()
    assert len(list(recipe.blocks(model))) == blocks
    convolutions = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d) and "downsample" not in name
    ]
    assert len(convolutions) + 1 == depth


def test_resnet_stem_follows_the_images() -> None:
    def stem(**data: object) -> tuple[nn.Conv2d, nn.Module]:
        model = ResNet(data=Images(**data)).build_model()  # type: ignore[arg-type]
        assert isinstance(model.conv1, nn.Conv2d)
        assert isinstance(model.maxpool, nn.Module)
        return model.conv1, model.maxpool

    small_images: list[dict[str, Any]] = [{}, {"name": "synthetic"}, {"name": "synthetic", "image_size": 64}]
    large_images: list[dict[str, Any]] = [{"name": "synthetic", "image_size": 65}, {"image_size": 224}]
    for data in small_images:
        conv, pool = stem(**data)
        assert (conv.kernel_size, conv.stride) == ((3, 3), (1, 1))
        assert isinstance(pool, nn.Identity)
    for data in large_images:
        conv, pool = stem(**data)
        assert (conv.kernel_size, conv.stride) == ((7, 7), (2, 2))
        assert isinstance(pool, nn.MaxPool2d)
    assert stem(image_size=224)[0].in_channels == 1
    small = ResNet(model=Model(small_stem=True), data=Images(name="synthetic", image_size=224)).build_model()
    assert isinstance(small.maxpool, nn.Identity)


def test_resnet_on_large_images_is_torchvisions() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(3)
    ours = ResNet(data=Images(name="synthetic", image_size=224, classes=5)).build_model()
    torch.manual_seed(3)
    theirs = resnet18(num_classes=5, zero_init_residual=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_label_smoothing_is_for_training_only() -> None:
    plain, smooth = ResNet(), ResNet(label_smoothing=0.1)
    torch.manual_seed(0)
    model = plain.build_model()
    batch = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    assert smooth.loss(model.eval(), batch) == plain.loss(model.eval(), batch)
    assert smooth.loss(model.train(), batch) != plain.loss(model.train(), batch)
    with pytest.raises(ValueError, match=r"label_smoothing=1\.5"):
        check_recipe(ResNet(label_smoothing=1.5))


# mnist ------------------------------------------------------------------------------------------------------


def test_mnist_is_initialised_after_kaiming() -> None:
    torch.manual_seed(0)
    recipe = MNIST()
    model = recipe.build_model()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            gain = 1.0 if len(module.weight) == 10 else math.sqrt(2)
            expected = gain / math.sqrt(module.weight[0].numel())
            assert module.weight.std().item() == pytest.approx(expected, rel=0.12)
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize(("pixels", "channels"), [(8, 1), (28, 1), (30, 3)])
def test_mnist_takes_any_size(pixels: int, channels: int) -> None:
    data = Images(image_size=pixels) if channels == 1 else Images(name="synthetic", image_size=pixels)
    model = MNIST(data=data).build_model()
    assert model(torch.randn(2, channels, pixels, pixels)).shape == (2, 10)


# gpt --------------------------------------------------------------------------------------------------------


def initialised(recipe: GPT) -> Decoder:
    torch.manual_seed(0)
    model = recipe.build_model()
    assert isinstance(model, Decoder)
    for module in model.modules():
        model.init_weights(module)
    return model


def test_gpt_sees_no_future() -> None:
    model = initialised(GPT(data=Text(block=16))).eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 256
    same = (model(tokens) == model(changed)).all(-1)[0]
    assert same[:9].all()
    assert not same[9:].any()


def test_gpt_starts_from_small_weights_and_the_loss_of_a_guess() -> None:
    recipe = GPT(data=Text(block=32))
    model = initialised(recipe)
    assert model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in recipe.blocks(model):
        up = block.get_submodule("up")
        assert isinstance(up, nn.Linear)
        assert up.weight.std().item() == pytest.approx(0.02, rel=0.05)
        for name in ("down", "attention.out"):
            layer = block.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            assert layer.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
            assert not layer.bias.any()
    tokens = torch.randint(256, (4, 33))
    batch = tokens[:, :-1], tokens[:, 1:]
    assert local_num_items(recipe, batch) == 4 * 32
    loss = recipe.loss(model.eval(), batch).item()
    assert loss / local_num_items(recipe, batch) == pytest.approx(math.log(256), rel=0.02)


def test_gpt_shares_the_embedding_with_the_head() -> None:
    model = initialised(GPT())
    assert model.head.weight is model.tokens.weight
    before = model.tokens.weight.clone()
    model.init_weights(model.head)
    assert torch.equal(before, model.tokens.weight)
    assert "head.weight" not in dict(model.named_parameters())


def test_gpt_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        model = GPT(model=GPTModel(layers=2, width=4096, heads=32)).build_model()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert list(model.buffers()) == []
    assert model(torch.zeros(1, 8, dtype=torch.long, device="meta")).shape == (1, 8, 256)


def test_gpt_knows_its_vocabulary_before_torch(tmp_path: Path) -> None:
    path = tmp_path / "abc.txt"
    path.write_text("abcd" * 1000)
    model = GPT(data=Text(path=str(path), tokens="chars")).build_model()
    assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 4)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (GPT(model=GPTModel(width=100, heads=3)), "model.width=100 over model.heads=3"),
        (GPT(model=GPTModel(layers=0)), "model.layers=0"),
        (GPT(model=GPTModel(dropout=1.0)), "model.dropout=1.0"),
        (GPT(optim=Optim(name="adamw", nesterov=True)), "optim.nesterov=True has no effect"),
        (MNIST(data=Images(image_size=3)), "data.image_size=3"),
        (GAN(data=Images(image_size=10)), "data.image_size=10"),
        (GAN(model=GANModel(latent=0)), "model.latent=0"),
    ],
)
def test_what_cannot_work_is_refused(recipe: GPT, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_recipe(recipe)


# gan --------------------------------------------------------------------------------------------------------


def test_gan_makes_images_of_the_size_and_range_of_the_data() -> None:
    for data in (
        Images(augment=False, normalize="signed"),
        Images(name="synthetic", normalize="signed", image_size=16),
    ):
        recipe = GAN(data=data)
        real = torch.stack([recipe.build_data().train[i][0] for i in range(4)])
        fake = recipe.build_generator()(torch.randn(4, recipe.model.latent))
        assert fake.shape == real.shape
        assert fake.abs().max() <= 1
        assert recipe.build_discriminator()(fake).shape == (4, 1)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in GAN().build_discriminator().modules())


def test_gan_losses_are_the_papers() -> None:
    recipe = GAN()
    torch.manual_seed(0)
    models = {name: build().eval() for name, build in recipe.models().items()}
    real = torch.randn(6, 1, 8, 8)
    torch.manual_seed(1)
    fake = models["generator"](recipe.noise(real))
    d_real, d_fake = (models["discriminator"](images).sigmoid().log() for images in (real, fake))
    d_not_fake = (1 - models["discriminator"](fake).sigmoid()).log()
    for name, expected in (("discriminator", -(d_real + d_not_fake).sum()), ("generator", -d_fake.sum())):
        torch.manual_seed(1)
        assert recipe.losses()[name](models, (real, None)).item() == pytest.approx(expected.item(), rel=1e-5)


# regression -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Line(Regression):
    """y = 2 x + 1 with noise."""

    def build_data(self) -> Splits:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(64, 1, generator=generator)
        return Splits(train=TensorDataset(x, 2 * x + 1 + 0.1 * torch.randn(64, 1, generator=generator)))

    def build_model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        return torch.optim.LBFGS(model.parameters(), max_iter=50)


def test_regression_sums_squares_and_measures() -> None:
    recipe = Line()
    train = recipe.build_data().train
    x, y = (torch.stack([train[i][part] for i in range(64)]) for part in (0, 1))
    model = recipe.build_model()

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = recipe.loss(model, (x, y))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    recipe.build_optimizer(model).step(closure)  # type: ignore[arg-type]
    loss, predictions, targets = recipe.eval_step(model, (x, y))
    metrics = recipe.metrics()
    for metric in metrics.values():
        metric.update(predictions, targets)
    assert loss.item() / 64 == pytest.approx(float(metrics["mse"].compute()), rel=1e-5)
    errors = (predictions - targets).detach()
    assert float(metrics["mae"].compute()) == pytest.approx(float(errors.abs().mean()), rel=1e-5)
    assert float(metrics["r2"].compute()) == pytest.approx(
        float(1 - errors.square().mean() / y.var(correction=0)), rel=1e-4
    )
    assert float(metrics["mse"].compute()) < 0.02
