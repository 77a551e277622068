"""Our safetensors files and those of the safetensors package are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.checkpoint import tensor_file
from launch.runtime.files import write_hashed

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "half": torch.arange(5, dtype=torch.bfloat16),
    "bytes": torch.tensor([True, False, True]),
    "scalar": torch.tensor(7),
    "none": torch.empty(0, 4),
    "long name " * 30: torch.arange(3, dtype=torch.int16),
}


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    kinds = {
        name: (tensor_file.dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    header, placed, size = tensor_file.file_header(kinds)
    body = bytearray(size)
    for name, stored in placed.items():
        body[stored.offset : stored.offset + stored.nbytes] = bytes(
            TENSORS[name].reshape(-1).view(torch.uint8).numpy()
        )
    write_hashed(tmp_path / "file", [header, memoryview(body)])
    found = load_file(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in TENSORS.items()
    )


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file", metadata={"format": "pt"})
    with tensor_file.TensorFile(tmp_path / "file") as file:
        assert file.tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(file.read(name, 0, tensor.numel()).view(tensor.shape), tensor)
        assert file.read("wide", 2, 5).tolist() == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\xff" * 100, (2).to_bytes(8, "little") + b"[]", b"\x10" + b"\0" * 20]
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="is no safetensors file"):
        tensor_file.TensorFile(tmp_path / "file")
