"""Checkpoints are saved in the background, committed or absent, verified before a resume, and never lost."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.checkpoint import directory
from launch.checkpoint.manifest import MANIFEST_NAME, DamagedCheckpoint, Manifest
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.resume import resume
from launch.checkpoint.writer import SaveError
from launch.reporting.console import Console
from launch.state.run import Run
from launch.training.loop import finish, save, train
from tests.launch.runs import (
    LoopParts,
    loop_parts,
    make_run,
    metric_values,
    read_metrics,
    single_rank,
    train_run,
)
from tests.ranks import CpuWorld, run_ranks

WORDS = ("batch_size=16", "micro_batch_size=4", "steps=6", "checkpoint.every=2", "checkpoint.keep=2")


# damage -----------------------------------------------------------------------------------------------------


def life(world: CpuWorld, folder: Path, *words: str) -> None:
    train_run(make_run(world, "Fit", *WORDS, *words), folder)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, with checkpoints of steps 4 and 6. Its tests work on copies."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, life, folder)
    assert [path.name for path in directory.list_checkpoints(folder)] == [
        "step-00000004",
        "step-00000006",
    ]
    return folder


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
    run = make_run(single_rank(), "Fit", *WORDS)
    asked: list[Path] = []
    read = Checkpoint.read

    def recording_read(self: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
        asked.append(self.folder)
        return read(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read", recording_read)
    for number, damage in enumerate(islice(cycle(DAMAGES), 50)):
        copy = tmp_path / str(number)
        shutil.copytree(run_dir, copy)
        older, newest = directory.list_checkpoints(copy)
        damage(newest, older, random.Random(number))
        assert resume(run, copy) == older, f"{damage.__name__} {number}"
        assert run.progress.step == 4
        assert set(asked) == {older}, "nothing of what is damaged reaches the model"
        told = capfd.readouterr().err
        assert told.startswith(f"rankzero: {newest}"), told
        assert told.endswith(f"; going back to {older}\n")
        assert told.count("\n") == 1
        assert [path.name for path in directory.list_step_folders(copy)] == [older.name]
        assert newest.with_name(newest.name + ".damaged").is_dir(), "set aside, not lost"
        asked.clear()


def resumed(world: CpuWorld, folder: Path, *words: str) -> int:
    run = make_run(world, "Fit", *WORDS, *words)
    resume(run, folder)
    return run.progress.step


def test_all_ranks_go_back_though_only_one_has_seen_the_damage(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    path = directory.list_checkpoints(tmp_path / "run")[-1] / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run_ranks(2, resumed, tmp_path / "run") == [4, 4]


def test_without_a_whole_one_the_run_does_not_start_afresh(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    for folder in directory.list_checkpoints(tmp_path / "run"):
        next(folder.glob("*.safetensors")).unlink()
    for _ in range(2):  # nor at a second try
        with pytest.raises(
            ValueError, match=r"rank-0000\d.safetensors is missing .* no intact checkpoint is left"
        ):
            resume(make_run(single_rank(), "Fit", *WORDS), tmp_path / "run")


def test_going_back_within_a_run_is_refused(run_dir: Path) -> None:
    older, newest = directory.list_checkpoints(run_dir)
    with pytest.raises(ValueError, match=f"would mix two runs.* remove {newest}"):
        resume(make_run(single_rank(), "Fit", *WORDS, f"resume={older}"), run_dir)


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


# in the background ------------------------------------------------------------------------------------------


def test_saves_are_recorded_with_their_times(run_dir: Path) -> None:
    lines = [line for line in read_metrics(run_dir) if "checkpoint/blocking" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["checkpoint/bytes"] > 0 and line["checkpoint/write"] > 0 for line in lines)


def test_what_is_saved_is_the_state_at_its_step(tmp_path: Path) -> None:
    """Training goes on while it is written: the copy must be complete before the next step."""
    run = train_run(
        make_run(single_rank(), "Fit", *WORDS, "checkpoint.every=1", "checkpoint.keep=6"), tmp_path / "often"
    )
    for folder in directory.list_checkpoints(tmp_path / "often"):
        stopped = make_run(single_rank(), "Fit", *WORDS)
        stopped.stop_at = directory.step_of(folder)
        train_run(stopped, tmp_path / folder.name)
        again = directory.list_checkpoints(tmp_path / folder.name)[-1]
        assert Manifest.read(folder).files[0].digest == Manifest.read(again).files[0].digest
    assert run.progress.step == 6


def on_the_clock(world: CpuWorld, folder: Path) -> list[str]:
    words = ("checkpoint.every=1000", "checkpoint.every_minutes=0.00001", "checkpoint.keep=9")
    train_run(make_run(world, "Fit", *WORDS, *words), folder, period=0.0)
    return [path.name for path in directory.list_checkpoints(folder)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_saves_by_the_clock_too(tmp_path: Path, world_size: int) -> None:
    """By that of rank zero; several ranks agree a step later, and what was asked meanwhile has then been
    answered.
    """
    found = run_ranks(world_size, on_the_clock, tmp_path)[0]
    assert found == [f"step-{step:08d}" for step in range(world_size, 7, world_size)]


def once_overdue(world: CpuWorld, folder: Path) -> list[str]:
    run = make_run(world, "Fit", *WORDS, "checkpoint.every=1000", "checkpoint.keep=9")
    if world.rank == 0:
        folder.mkdir()
    parts = loop_parts(run, folder)
    parts.requests.consensus.period, parts.checkpoints.last_save_time = 0.0, -1e9
    train(run, *parts)
    finish(run, *parts)
    return [path.name for path in directory.list_checkpoints(folder)]


def test_by_the_clock_it_saves_once(tmp_path: Path) -> None:
    """What is heard of the clock is a step old: by then a save may have been asked for twice."""
    assert run_ranks(2, once_overdue, tmp_path / "run")[0] == ["step-00000002", "step-00000006"]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: a write fails in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def interrupted(world: CpuWorld, folder: Path, trouble: str) -> tuple[list[str], list[str]]:
    """A save before, one during and one after some trouble; the checkpoints after the second and after the
    third.
    """
    run = make_run(world, "Fit", *WORDS)
    parts = loop_parts(run, folder, Console(world.rank == 0))
    step(run, parts)
    parts.metrics.checkpoint(parts.checkpoints.wait())
    if trouble == "vanished":
        directory.checkpoints_dir(folder).rename(folder / "elsewhere") if world.rank == 0 else None
        torch.distributed.barrier()
        step(run, parts)
        parts.metrics.checkpoint(parts.checkpoints.wait())
        torch.distributed.barrier()
        (folder / "elsewhere").rename(directory.checkpoints_dir(folder)) if world.rank == 0 else None
    else:
        with full_disk(100 if world.rank == 1 else 2**40):
            step(run, parts)
            parts.metrics.checkpoint(parts.checkpoints.wait())
    torch.distributed.barrier()
    during = [path.name for path in directory.checkpoints_dir(folder).iterdir()]
    torch.distributed.barrier()
    step(run, parts)
    finish(run, *parts)
    return during, [path.name for path in directory.list_checkpoints(folder)]


def step(run: Run, parts: LoopParts) -> None:
    run.progress.step += 1
    save(run, *parts)


@pytest.mark.parametrize("trouble", ["full", "vanished"])
def test_a_save_that_fails_costs_nothing_but_itself(tmp_path: Path, trouble: str) -> None:
    for during, after in run_ranks(2, interrupted, tmp_path, trouble):
        assert during == ["step-00000001"], "what was saved before, and no remains"
        assert after == ["step-00000001", "step-00000003"]
    with Checkpoint(directory.list_checkpoints(tmp_path)[0]) as checkpoint:
        checkpoint.verify()


def test_a_run_whose_last_save_fails_does_not_end_well(tmp_path: Path) -> None:
    run = make_run(single_rank(), "Fit", *WORDS, "checkpoint.every=4", "steps=6")
    parts = loop_parts(run, tmp_path, Console(True))
    run.stop_at = 4
    train(run, *parts)
    finish(run, *parts)
    run.stop_at = None
    (file,) = directory.list_checkpoints(tmp_path)[0].glob("*.safetensors")
    with full_disk(file.stat().st_size - 1):  # metrics.jsonl is smaller
        train(run, *parts)
        with pytest.raises(
            SaveError, match=r"step 6 was not saved: File too large: .*A rank writes about 716 bytes"
        ):
            finish(run, *parts)
    assert [path.name for path in directory.list_checkpoints(tmp_path)] == ["step-00000004"]
    assert len(metric_values(tmp_path)) == 6


# kept -------------------------------------------------------------------------------------------------------


def test_what_is_being_read_is_not_removed(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    older, newest = directory.list_checkpoints(tmp_path / "run")
    with Checkpoint(older):
        assert directory.prune(tmp_path / "run", keep=1) == []
    assert directory.prune(tmp_path / "run", keep=1) == [older]
    assert sorted(path.name for path in directory.checkpoints_dir(tmp_path / "run").iterdir()) == [
        newest.name
    ]


def test_the_newest_is_kept_whatever_lies_behind_it(run_dir: Path, tmp_path: Path) -> None:
    """A run that went back must not lose its only good checkpoint to a newer one that is damaged."""
    shutil.copytree(run_dir, tmp_path / "run")
    os.truncate(directory.list_checkpoints(tmp_path / "run")[-1] / "rank-00000.safetensors", 10)
    run = make_run(single_rank(), "Fit", *WORDS, "checkpoint.every=5", "checkpoint.keep=1")
    resume(run, tmp_path / "run")
    run.stop_at = 5
    train_run(run, tmp_path / "run")
    assert [path.name for path in directory.list_checkpoints(tmp_path / "run")] == ["step-00000005"]


def test_what_a_kill_left_is_swept_up(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    for name in (".step-00000008.partial", ".step-00000002.removed"):
        (directory.checkpoints_dir(tmp_path / "run") / name).mkdir()
        (directory.checkpoints_dir(tmp_path / "run") / name / "rank-00000.safetensors").write_bytes(
            b"half of i"
        )
    assert resumed(single_rank(), tmp_path / "run") == 6
    loop_parts(make_run(single_rank(), "Fit", *WORDS), tmp_path / "run")
    assert sorted(path.name for path in directory.checkpoints_dir(tmp_path / "run").iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]


def test_the_format_is_open(run_dir: Path) -> None:
    """JSON, and files that the safetensors package reads."""
    for file in directory.list_checkpoints(run_dir)[-1].glob("*.safetensors"):
        assert all(tensor.ndim == 1 for tensor in load_file(file).values())
    found = json.loads((directory.list_checkpoints(run_dir)[-1] / MANIFEST_NAME).read_text())["manifest"]
    assert (found["step"], found["samples"]) == (6, 96)
    assert found["config"]["lr"] == 0.01
    assert found["optimizers"]["model"][0]["optimizer"] == "AdamW"
    weight = found["tensors"]["model/model/0.weight"]
    assert (weight["dtype"], weight["shape"], weight["cuts"], weight["files"]) == (
        "F32",
        [8, 5],
        [0, 20, 40],
        [0, 1],
    )
