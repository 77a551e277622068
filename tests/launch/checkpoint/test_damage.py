"""A damaged checkpoint is found before a tensor of it is read, and the run goes back to the one before."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch

from launch.checkpoint import directory
from launch.checkpoint.manifest import MANIFEST_NAME, DamagedCheckpoint, Manifest
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.resume import resume
from tests.launch.checkpoints import FIT_KEYS
from tests.launch.runs import (
    make_run,
    single_rank,
)
from tests.ranks import CpuWorld, run_ranks


def flip(newest: Path, _: Path, draw: random.Random) -> None:
    path = draw.choice(sorted(newest.iterdir()))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(newest: Path, _: Path, draw: random.Random) -> None:
    path = draw.choice(sorted(newest.iterdir()))
    os.truncate(path, draw.randrange(path.stat().st_size))


def append(newest: Path, _: Path, draw: random.Random) -> None:
    with draw.choice(sorted(newest.iterdir())).open("ab") as file:
        file.write(b"\0")


def delete(newest: Path, _: Path, draw: random.Random) -> None:
    draw.choice(sorted(newest.iterdir())).unlink()


def swap(newest: Path, *_: object) -> None:
    first, second = sorted(newest.glob("*.safetensors"))
    first.rename(newest / "aside")
    second.rename(first)
    (newest / "aside").rename(second)


def take_from_older(newest: Path, older: Path, draw: random.Random) -> None:
    path = draw.choice(sorted(newest.iterdir()))
    shutil.copy(older / path.name, path)


def edit(newest: Path, *_: object) -> None:
    text = (newest / MANIFEST_NAME).read_text()
    (newest / MANIFEST_NAME).write_text(text.replace('"best_step": null', '"best_step": 1'))


def escape(newest: Path, older: Path, _: random.Random) -> None:
    """By somebody who knows how to make the digest right."""
    manifest = Manifest.read(newest)
    manifest.files[0].name = f"../{older.name}/{manifest.files[0].name}"
    manifest.validate = lambda: None  # type: ignore[method-assign]
    manifest.write(newest)


DAMAGES: list[Callable[[Path, Path, random.Random], None]] = [
    *(flip, truncate, append, delete, swap, take_from_older, edit, escape)
]


def test_fifty_corruptions_are_found_before_a_tensor_is_read(
    run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(single_rank(), "Fit", *FIT_KEYS)
    folders_read: list[Path] = []
    read = Checkpoint.read

    def recording_read(self: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
        folders_read.append(self.folder)
        return read(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read", recording_read)
    for number, damage in enumerate(islice(cycle(DAMAGES), 50)):
        copy = tmp_path / str(number)
        shutil.copytree(run_dir, copy)
        older, newest = directory.list_checkpoints(copy)
        damage(newest, older, random.Random(number))
        assert resume(run, copy) == older, f"{damage.__name__} {number}"
        assert run.progress.step == 4
        assert set(folders_read) == {older}, "nothing of what is damaged reaches the model"
        stderr = capfd.readouterr().err
        assert stderr.startswith(f"rankzero: {newest}"), stderr
        assert stderr.endswith(f"; going back to {older}\n")
        assert stderr.count("\n") == 1
        assert [path.name for path in directory.list_step_folders(copy)] == [older.name]
        assert newest.with_name(newest.name + ".damaged").is_dir(), "set aside, not lost"
        folders_read.clear()


def resume_from(world: CpuWorld, folder: Path, *argv: str) -> int:
    run = make_run(world, "Fit", *FIT_KEYS, *argv)
    resume(run, folder)
    return run.progress.step


def test_all_ranks_go_back_though_only_one_finds_the_damage(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    path = directory.list_checkpoints(tmp_path / "run")[-1] / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run_ranks(2, resume_from, tmp_path / "run") == [4, 4]


def test_without_an_intact_one_the_run_does_not_start_afresh(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    for folder in directory.list_checkpoints(tmp_path / "run"):
        next(folder.glob("*.safetensors")).unlink()
    for _ in range(2):  # nor at a second try
        with pytest.raises(
            ValueError, match=r"rank-0000\d.safetensors is missing .* no intact checkpoint is left"
        ):
            resume(make_run(single_rank(), "Fit", *FIT_KEYS), tmp_path / "run")


def test_going_back_within_a_run_is_refused(run_dir: Path) -> None:
    older, newest = directory.list_checkpoints(run_dir)
    with pytest.raises(ValueError, match=f"would mix two runs.* remove {newest}"):
        resume(make_run(single_rank(), "Fit", *FIT_KEYS, f"resume={older}"), run_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.files[0].__setattr__("name", "/etc/passwd"), "no name of a rank's file"),
        (lambda m: m.files.append(m.files[0]), "listed twice"),
        (lambda m: next(iter(m.tensors.values())).cuts.pop(), "not covered"),
        (lambda m: next(iter(m.tensors.values())).cuts.__setitem__(0, 1), "not covered"),
        (lambda m: next(iter(m.tensors.values())).cuts.insert(0, 0), "not in order"),
        (lambda m: next(iter(m.tensors.values())).files.__setitem__(0, 7), "not listed"),
        (lambda m: next(iter(m.tensors.values())).offsets.__setitem__(0, -8), "where in its files"),
        (lambda m: m.__setattr__("format", 99), "format 99 is not the 1"),
    ],
)
def test_a_manifest_that_cannot_be_true_is_refused(
    run_dir: Path, tmp_path: Path, change: Callable[[Manifest], object], message: str
) -> None:
    folder = shutil.copytree(directory.list_checkpoints(run_dir)[-1], tmp_path / "copy")
    manifest = Manifest.read(folder)
    change(manifest)
    manifest.validate = lambda: None  # type: ignore[method-assign]
    manifest.write(folder)
    with pytest.raises(DamagedCheckpoint, match=message):
        Manifest.read(folder)
