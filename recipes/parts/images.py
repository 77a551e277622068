"""Labeled images as options: where they come from, how they are split, normalized and augmented.

A sample is (float32 tensor [channels, height, width], class). Images in memory are augmented a whole batch at
a time, by the seed of each sample; photographs in files one by one, from the default generators: who seeds
them gets the same image anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from recipes.parts.augment import random_affine, random_crop_and_flip
from recipes.parts.data import Dataset, Splits
from recipes.parts.image_datasets import InMemoryImages, SyntheticImages
from recipes.parts.image_files import (
    CIFAR10_FILES,
    MNIST_FILES,
    class_folders,
    find_idx,
    read_cifar10,
    read_digits,
    read_mnist,
)
from recipes.parts.option_types import Fraction, OptionGroup, PositiveInt, refuse_unused
from recipes.parts.split import holdout, split

if TYPE_CHECKING:
    from torch import Tensor

    from recipes.parts.image_datasets import Augment

USED_BY = {
    "root": ("mnist", "cifar10", "imagefolder"),
    "augment": ("digits", "mnist", "cifar10", "imagefolder"),
    "test": ("digits", "imagefolder", "synthetic"),
    "split_seed": ("digits", "mnist", "cifar10", "imagefolder"),
    "size": ("synthetic",),
    "classes": ("synthetic",),
}


class ImageFormat(NamedTuple):
    """The images of a set, known before it is read; `mean` and `std` per channel, of pixels from 0 to 1."""

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


FORMATS = {
    "digits": ImageFormat(1, 8, (0.3053,), (0.3760,)),
    "mnist": ImageFormat(1, 28, (0.1307,), (0.3081,)),
    "cifar10": ImageFormat(3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagefolder": ImageFormat(3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "synthetic": ImageFormat(3, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


@dataclass(kw_only=True)
class Images(OptionGroup):
    """`data.*`"""

    name: Literal["digits", "mnist", "cifar10", "imagefolder", "synthetic"] = "digits"
    """digits comes with scikit-learn; mnist, cifar10 and imagefolder are read from data.root; synthetic is
    drawn
    """
    root: str = "data"
    """folder that holds MNIST/raw/, cifar-10-batches-py/, or for imagefolder train/CLASS/*.png (val/, test/
    optional)
    """
    image_size: PositiveInt | None = None
    """height and width in pixels (default: the set's own; imagefolder 224)"""
    augment: bool = True
    """augment the training images: rotation and translation of digits, crop and flip of photographs"""
    normalize: Literal["standard", "signed"] = "standard"
    """standard: zero mean and unit variance over the set; signed: from -1 to 1"""
    val: Fraction = 0.1
    """fraction of the training images held out for validation, where the set has none"""
    test: Fraction = 0.1
    """fraction held out for the test, where the set has none"""
    split_seed: int = 0
    """which images are held out (not the run's seed: they stay held out when a run is repeated)"""
    size: PositiveInt = 10_000
    """synthetic: number of images"""
    classes: PositiveInt = 10
    """synthetic: number of classes"""

    def check(self, declared: Images | None = None) -> None:
        """Raise ValueError or FileNotFoundError, in one line for the user, without importing torch."""
        declared = declared or Images()
        refuse_unused("data", self, declared, USED_BY)
        if self.val + self.test >= 1:
            raise ValueError(
                f"data.val={self.val} and data.test={self.test} leave nothing to train on: "
                "their sum must be < 1"
            )
        if self.name in USED_BY["root"]:
            self._check_root()
        if self.name == "imagefolder":
            for name, given in (("val", (Path(self.root) / "val").is_dir()), ("test", True)):
                if self._has_splits() and given and getattr(self, name) != getattr(declared, name):
                    what = f"data.{name}={getattr(self, name)} has no effect"
                    raise ValueError(
                        f"{what}: {self.root} is divided into train/ and val/ or test/ already; leave it out"
                    )

    def _check_root(self) -> None:
        root = Path(self.root)
        given = f"data.root={self.root} (data.name={self.name})"
        if not root.is_dir():
            raise FileNotFoundError(f"{given} is no folder: give the one that holds {self._layout()}")
        if self.name == "mnist":
            missing = [file for file in MNIST_FILES if find_idx(root, file) is None]
            if missing:
                raise FileNotFoundError(
                    f"{given} holds no {missing[0]}[.gz]: expected {self._layout()}, with 4 files"
                )
        elif self.name == "cifar10":
            missing = [file for file in CIFAR10_FILES if not (root / "cifar-10-batches-py" / file).is_file()]
            if missing:
                archive = root / "cifar-10-python.tar.gz"
                fix = (
                    f"unpack it with `tar -xzf {archive} -C {root}`"
                    if archive.is_file()
                    else f"expected {self._layout()}"
                )
                raise FileNotFoundError(f"{given} holds no cifar-10-batches-py/{missing[0]}: {fix}")
        elif not class_folders(self._train_folder()):
            raise FileNotFoundError(f"{given} holds no folder a class: expected {self._layout()}")

    def _layout(self) -> str:
        return {
            "mnist": "MNIST/raw/train-images-idx3-ubyte (as downloaded, .gz or not)",
            "cifar10": "cifar-10-batches-py/ (the unpacked cifar-10-python.tar.gz)",
            "imagefolder": "train/CLASS/*.png and val/CLASS/*.png, or CLASS/*.png for us to split",
        }[self.name]

    # what a model has to know -------------------------------------------------------------------------------

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return FORMATS[self.name].channels

    @property
    def pixels(self) -> int:
        """Height and width of an image."""
        return self.image_size or FORMATS[self.name].size

    def num_classes(self) -> int:
        """Number of classes, without reading an image."""
        if self.name == "imagefolder":
            return len(class_folders(self._train_folder()))
        return self.classes if self.name == "synthetic" else 10

    # building -----------------------------------------------------------------------------------------------

    def build(self) -> Splits:
        """The splits: training images augmented, the others plain."""
        self.check(self)
        if self.name == "digits":
            return self._split(*self._in_memory(*read_digits()))
        if self.name == "synthetic":
            shape = (self.channels, self.pixels, self.pixels)
            return split(SyntheticImages(self.size, self.classes, shape), self.val, self.test)
        if self.name == "imagefolder":
            return self._imagefolder()
        read = read_mnist if self.name == "mnist" else read_cifar10
        augmented, plain = self._in_memory(*read(Path(self.root), True))
        train, val = holdout(augmented, self.val, self.split_seed, plain=plain)
        _, test = self._in_memory(*read(Path(self.root), False))
        return Splits(train=train, val=val, test=test)

    def _split(self, augmented: Dataset, plain: Dataset) -> Splits:
        return split(augmented, self.val, self.test, self.split_seed, plain=plain)

    def _in_memory(self, images: Tensor, classes: Tensor) -> tuple[Dataset, Dataset]:
        augmentation = self._augmentation() if self.augment else None
        build = partial(InMemoryImages, images, classes, self.pixels, self.mean_std())
        return build(augmentation), build(None)

    def _augmentation(self) -> Augment:
        if self.name == "cifar10":
            return partial(random_crop_and_flip, padding=self.pixels // 8)
        return partial(random_affine, degrees=10, translate=0.1)

    def _has_splits(self) -> bool:
        return (Path(self.root) / "train").is_dir()

    def _train_folder(self) -> Path:
        return Path(self.root) / "train" if self._has_splits() else Path(self.root)

    def _imagefolder(self) -> Splits:
        from torchvision.datasets import ImageFolder

        root, train = Path(self.root), self._train_folder()
        augmented = ImageFolder(train, self._photograph(self.augment))
        plain = ImageFolder(train, self._photograph(False))
        if not self._has_splits():
            return self._split(augmented, plain)
        folders = {name: root / name for name in ("val", "test") if (root / name).is_dir()}
        for folder in folders.values():
            if class_folders(folder) != class_folders(train):
                raise ValueError(f"{folder} has other classes than {train}: give both the same folders")
        held = {name: ImageFolder(folder, self._photograph(False)) for name, folder in folders.items()}
        if "val" in held:
            return Splits(train=augmented, val=held["val"], test=held.get("test"))
        rest, val = holdout(augmented, self.val, self.split_seed, plain=plain)
        return Splits(train=rest, val=val, test=held.get("test"))

    def _photograph(self, augment: bool) -> Callable[[Any], Tensor]:
        import torch
        from torchvision.transforms import v2

        size = self.pixels
        # torchvision's own recipe for ImageNet: 256 pixels are resized to for a crop of 224
        fit = [v2.Resize(size * 256 // 224), v2.CenterCrop(size)]
        vary = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        convert = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*self.mean_std())]
        return v2.Compose([*(vary if augment else fit), *convert, v2.ToPureTensor()])  # type: ignore[no-any-return]

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What is subtracted from each channel and what it is divided by, for pixels from 0 to 1."""
        image_format = FORMATS[self.name]
        if self.normalize == "signed":
            return (0.5,) * image_format.channels, (0.5,) * image_format.channels
        return image_format.mean, image_format.std
