"""Reading sets of images as bytes, from where they lie. Nothing is downloaded and nothing is written."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")


def read_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: 1797 images of 8 x 8 with 17 levels of grey, as bytes."""
    import torch
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images)[:, None].mul(255 / 16).round().byte()
    return images, torch.from_numpy(digits.target)


def read_mnist(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST's images [N, 1, 28, 28] and classes, from the files as downloaded (torchvision wants them
    unpacked).
    """
    images, classes = (find_idx(root, file) for file in (MNIST_FILES[:2] if train else MNIST_FILES[2:]))
    assert images is not None
    assert classes is not None
    return read_idx(images)[:, None], read_idx(classes).long()


def find_idx(root: Path, file: str) -> Path | None:
    """An MNIST file in the folder that torchvision uses, or in `root` itself, packed or not."""
    candidates = [folder / name for folder in (root / "MNIST" / "raw", root) for name in (file, f"{file}.gz")]
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path) -> Tensor:
    """A file of the IDX format: two zero bytes, the type (8: bytes), the number of sizes, the sizes, the
    data.
    """
    import torch

    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes: fetch it again")
    sizes = [int.from_bytes(data[4 * i : 4 * i + 4], "big") for i in range(1, data[3] + 1)]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * len(sizes)).view(sizes)


def read_cifar10(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """CIFAR-10's images [N, 3, 32, 32] and classes."""
    import torch
    from torchvision.datasets import CIFAR10

    cifar = CIFAR10(root, train=train, download=False)
    return torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(cifar.targets)


def class_folders(folder: Path) -> list[str]:
    """Names of the classes under `folder`: its subfolders."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
