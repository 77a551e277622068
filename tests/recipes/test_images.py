from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.parts.data import Dataset
from recipes.parts.image_datasets import InMemoryImages
from recipes.parts.image_files import CIFAR10_FILES, MNIST_FILES, find_idx, read_digits
from recipes.parts.images import Images
from tests.recipes.checking import check_options


def sample(dataset: Dataset | None, index: int = 0) -> tuple[torch.Tensor, int]:
    assert dataset is not None
    image, label = dataset[index]
    return image, label


def varies(dataset: Dataset | None) -> bool:
    """Whether one image differs from draw to draw."""
    torch.manual_seed(0)
    return not torch.equal(sample(dataset)[0], sample(dataset)[0])


# digits -----------------------------------------------------------------------------------------------------


def test_digits_are_split_and_normalised() -> None:
    splits = Images(augment=False).build()
    assert [len(part) for part in (splits.train, splits.val, splits.test) if part] == [1437, 180, 180]
    image, label = sample(splits.train)
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.float32
    assert isinstance(label, int)
    everything = torch.stack([sample(splits.train, i)[0] for i in range(1437)])
    assert everything.mean().abs() < 0.02
    assert abs(everything.std() - 1) < 0.02


def test_splits_hold_each_digit_once() -> None:
    splits = Images(augment=False).build()
    parts = [part for part in (splits.train, splits.val, splits.test) if part]
    held = sorted(tuple(sample(part, i)[0].flatten().tolist()) for part in parts for i in range(len(part)))
    pixels, _ = read_digits()
    dataset = InMemoryImages(pixels, torch.zeros(len(pixels)), Images().pixels, Images().mean_std(), None)
    assert held == sorted(tuple(dataset[i][0].flatten().tolist()) for i in range(len(dataset)))


def test_only_training_images_are_augmented_and_from_the_default_generator() -> None:
    splits = Images().build()
    assert varies(splits.train)
    assert not varies(splits.val)
    assert not varies(splits.test)
    assert not varies(Images(augment=False).build().train)
    torch.manual_seed(7)
    first = sample(splits.train, 3)[0]
    torch.manual_seed(7)
    assert torch.equal(first, sample(splits.train, 3)[0])


def test_background_stays_background_under_augmentation() -> None:
    # what rotation uncovers must be black, not the grey that is 0 after normalisation
    train = Images(normalize="signed").build().train
    torch.manual_seed(0)
    assert min(sample(train, i)[0].min().item() for i in range(20)) == pytest.approx(-1, abs=1e-3)


def test_signed_images_lie_between_minus_one_and_one() -> None:
    image, _ = sample(Images(normalize="signed", augment=False).build().train)
    assert image.min() == -1
    assert image.max() == pytest.approx(1)


def test_image_size_is_what_the_model_gets() -> None:
    options = Images(image_size=20)
    assert (
        sample(options.build().train)[0].shape
        == (options.channels, options.pixels, options.pixels)
        == (1, 20, 20)
    )


# synthetic --------------------------------------------------------------------------------------------------


def test_synthetic_images_are_a_function_of_the_index() -> None:
    options = Images(name="synthetic", size=10**9, classes=7, image_size=16)
    first, again = (options.build().train for _ in range(2))
    for index in (0, 5, len(first) - 1):
        torch.manual_seed(index)
        image, label = sample(first, index)
        assert image.shape == (3, 16, 16)
        torch.manual_seed(99)
        assert torch.equal(image, sample(again, index)[0])
        assert label == sample(again, index)[1]
    labels = [sample(first, i)[1] for i in range(300)]
    assert set(labels) == set(range(7)) == set(range(options.num_classes()))
    assert not torch.equal(sample(first, 0)[0], sample(first, 1)[0])


# MNIST ------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + b"".join(size.to_bytes(4, "big") for size in array.shape)
        + array.tobytes()
    )


def write_mnist(folder: Path, packed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name, size in zip(MNIST_FILES, (50, 50, 20, 20), strict=True):
        shape = (size, 28, 28) if "images" in name else (size,)
        content = idx(random.integers(0, 10, shape, dtype=np.uint8))
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", ["MNIST/raw", "."])
def test_mnist_is_read_packed_or_not(tmp_path: Path, packed: bool, folder: str) -> None:
    write_mnist(tmp_path / folder, packed)
    before = sorted(tmp_path.rglob("*"))
    options = Images(name="mnist", root=str(tmp_path), augment=False)
    options.check()
    splits = options.build()
    assert [len(part) for part in (splits.train, splits.val, splits.test) if part] == [45, 5, 20]
    assert sample(splits.train)[0].shape == (1, 28, 28)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_is_no_idx_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=False)
    (tmp_path / MNIST_FILES[0]).write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=f"{MNIST_FILES[0]} is no IDX file"):
        Images(name="mnist", root=str(tmp_path)).build()


def test_the_real_mnist_has_the_statistics_that_we_divide_by() -> None:
    root = mnist_root()
    splits = Images(name="mnist", root=str(root), augment=False).build()
    assert [len(part) for part in (splits.train, splits.val, splits.test) if part] == [54_000, 6_000, 10_000]
    some = torch.stack([sample(splits.train, i)[0] for i in range(2000)])
    assert some.mean().abs() < 0.03
    assert abs(some.std() - 1) < 0.03


def mnist_root() -> Path:
    """Where the real MNIST lies; skips the test where it does not."""
    root = Path(os.environ.get("RANKZERO_MNIST", Path(__file__).parents[3] / "shared" / "data"))
    if find_idx(root, MNIST_FILES[0]) is None:
        pytest.skip(f"no MNIST in {root}: set RANKZERO_MNIST to the folder that holds MNIST/raw")
    return root


# CIFAR-10 and folders ---------------------------------------------------------------------------------------


def test_cifar10_is_read_as_torchvision_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in CIFAR10_FILES[:-1]:
        batch = {"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    # invented pixels cannot have the checksums of the real ones
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    options = Images(name="cifar10", root=str(tmp_path))
    options.check()
    splits = options.build()
    assert [len(part) for part in (splits.train, splits.val, splits.test) if part] == [18, 2, 4]
    assert sample(splits.train)[0].shape == (options.channels, options.pixels, options.pixels) == (3, 32, 32)
    assert varies(splits.train)
    assert not varies(splits.test)


def write_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 10) -> None:
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (40, 30), (i, 2 * i, 50)).save(root / name / f"{i}.png")


def test_imagefolder_with_train_and_val(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", each=3)
    options = Images(name="imagefolder", root=str(tmp_path), image_size=16)
    options.check()
    splits = options.build()
    assert options.num_classes() == 2
    assert len(splits.train) == 20
    assert splits.val is not None
    assert len(splits.val) == 6
    assert splits.test is None
    image, _ = sample(splits.train)
    assert type(image) is torch.Tensor
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert not varies(splits.val)


@pytest.mark.parametrize("share", [{"val": 0.2}, {"test": 0.2}])
def test_shares_of_a_divided_imagefolder_are_refused(tmp_path: Path, share: dict[str, float]) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val")
    with pytest.raises(ValueError, match=f"data.{next(iter(share))}=0.2 has no effect"):
        Images(name="imagefolder", root=str(tmp_path), **share).check()  # type: ignore[arg-type]


def test_imagefolder_split_by_us(tmp_path: Path) -> None:
    write_folder(tmp_path)
    splits = Images(name="imagefolder", root=str(tmp_path), image_size=16).build()
    assert [len(part) for part in (splits.train, splits.val, splits.test) if part] == [16, 2, 2]


def test_imagefolder_with_other_classes_in_val_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", classes=("cat", "horse"))
    with pytest.raises(ValueError, match="other classes"):
        Images(name="imagefolder", root=str(tmp_path)).build()


# mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("mnist", "MNIST/raw/train-images"),
        ("cifar10", "cifar-10-batches-py/"),
        ("imagefolder", "train/CLASS"),
    ],
)
def test_an_absent_folder_is_one_line_that_says_what_to_give(tmp_path: Path, name: Any, fix: str) -> None:
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            Images(name=name, root=str(root)).check()
        message = str(caught.value)
        assert str(root) in message
        assert fix in message
        assert "\n" not in message


def test_a_packed_cifar10_says_how_to_unpack_it(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(FileNotFoundError, match="tar -xzf"):
        Images(name="cifar10", root=str(tmp_path)).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Images(root="elsewhere"), "data.root=elsewhere has no effect under data.name=digits"),
        (Images(size=5), "data.size=5 has no effect"),
        (Images(name="synthetic", augment=False), "data.augment=False has no effect"),
        (Images(val=1.5), "data.val=1.5"),
        (Images(val=0.5, test=0.5), "leave nothing to train on"),
        (Images(name="synthetic", classes=0), "data.classes=0"),
        (Images(image_size=-1), "data.image_size=-1"),
    ],
)
def test_nonsense_is_refused(options: Images, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options("data", options)
