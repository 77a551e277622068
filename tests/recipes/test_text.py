from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.parts.text import Text, Windows, stdlib_source
from tests.recipes.checking import check_options


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "text.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def all_x(windows: object) -> list[int]:
    assert isinstance(windows, Windows)
    return torch.cat([windows[i][0] for i in range(len(windows))]).tolist()


def test_a_sample_is_a_window_and_the_same_one_token_on(tmp_path: Path) -> None:
    text = bytes(range(256)) * 4
    train = Text(path=written(tmp_path, text), block=10).build().train
    x, y = train[3]
    assert x.dtype == y.dtype == torch.int64
    assert x.tolist() == list(range(30, 40))
    assert y.tolist() == list(range(31, 41))


@pytest.mark.parametrize("size", [11, 12, 20, 21, 22, 101])
def test_windows_do_not_overlap_and_leave_out_less_than_one(size: int) -> None:
    windows = Windows(torch.arange(size), 10, 10)
    assert all_x(windows) == list(range(10 * len(windows)))
    assert 0 <= size - 1 - 10 * len(windows) < 10
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_a_stride_makes_windows_overlap() -> None:
    windows = Windows(torch.arange(21), 10, 3)
    assert [windows[i][0][0].item() for i in range(len(windows))] == [0, 3, 6, 9]
    assert windows[3][1][-1] == 19


def test_validation_and_test_are_the_tail(tmp_path: Path) -> None:
    text = "".join(chr(33 + i // 100) for i in range(5000))
    splits = Text(path=written(tmp_path, text), block=9, val=0.1, test=0.2).build()
    train, val, test = (all_x(part) for part in (splits.train, splits.val, splits.test))
    assert max(train) == 33 + 34
    assert (min(val), max(val)) == (33 + 35, 33 + 39)
    assert (min(test), max(test)) == (33 + 40, 33 + 49)
    alone = Text(path=written(tmp_path, text), val=0, test=0).build()
    assert alone.val is alone.test is None


def test_characters_are_the_sorted_set_of_the_text(tmp_path: Path) -> None:
    text = "ünïcode — and 漢字 🙂 text, " * 50
    options = Text(path=written(tmp_path, text), tokens="chars", block=16)
    assert options.vocabulary == sorted(set(text))
    assert options.vocabulary_size == len(set(text))
    x, _ = options.build().train[2]
    assert "".join(options.vocabulary[token] for token in x) == text[32:48]


def test_bytes_take_anything(tmp_path: Path) -> None:
    options = Text(path=written(tmp_path, b"\xff\xfe\x00" * 1000), block=8)
    assert options.vocabulary_size == 256
    assert options.build().train[0][0].tolist() == [255, 254, 0, 255, 254, 0, 255, 254]


def test_the_default_text_is_the_standard_library() -> None:
    source = stdlib_source()
    assert source == stdlib_source()
    assert len(source) > 1_500_000
    assert b"def __init__(self" in source
    assert source.decode("utf-8")
    splits = Text().build()
    assert bytes(splits.train[0][0].tolist()) == source[:128]
    assert Text(tokens="chars").vocabulary_size > 90


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.path=.*nowhere.txt is no file"):
        Text(path=str(tmp_path / "nowhere.txt")).check()
    with pytest.raises(ValueError, match=r"holds 5 bytes: data.block=128"):
        Text(path=written(tmp_path, "short")).check()
    with pytest.raises(ValueError, match="not UTF-8 at byte 3"):
        Text(path=written(tmp_path, b"abc\xff" * 1000), tokens="chars").build()
    with pytest.raises(ValueError, match=r"data.val is 50 tokens of 1000: a window needs"):
        Text(path=written(tmp_path, "x" * 1000)).build()
    with pytest.raises(ValueError, match=r"data.block=0"):
        check_options("data", Text(block=0))
    with pytest.raises(ValueError, match="below 1 together"):
        Text(val=0.5, test=0.5).check()
