"""The norm of the gradients: exact, whatever they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strategies.grad_norm import ROW, SMALL, squared_norm


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]), dtype=dtype)


def exact(tensors: list[Tensor]) -> float:
    return sum(float(tensor.to_dense().abs().double().square().sum()) for tensor in tensors)


@pytest.mark.parametrize("numel", [0, 1, SMALL, SMALL + 1, 2 * SMALL + ROW - 1, 2_400_000])
def test_it_is_exact_at_any_size(numel: int) -> None:
    tensors = [drawn(7, 3), drawn(numel).mul(1e-3)]
    assert squared_norm(tensors, "cpu").item() == pytest.approx(exact(tensors), rel=3e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("numel", [100, SMALL + 1])
def test_it_is_exact_in_any_type(dtype: torch.dtype, numel: int) -> None:
    """Rows of half precision are not summed up in it: 65504 is soon reached."""
    tensors = [drawn(9), drawn(numel, dtype=dtype) * 1000]
    assert squared_norm(tensors, "cpu").item() == pytest.approx(exact(tensors), rel=3e-6)


def test_sparse_gradients_and_views_count_too() -> None:
    table = torch.nn.Embedding(50, 8, sparse=True)
    table(torch.tensor([3, 3, 7])).square().sum().backward()
    assert table.weight.grad is not None
    tensors = [table.weight.grad, drawn(300, 200).t()]
    assert squared_norm(tensors, "cpu").item() == pytest.approx(exact(tensors), rel=1e-6)


def test_without_gradients_it_is_zero() -> None:
    assert squared_norm([], "cpu").item() == 0.0
