"""The checkpoint commands: what they say, and what they leave."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.checkpoint import directory
from launch.checkpoint.directory import checkpoint_dir
from launch.checkpoint.manifest import FileEntry, Manifest, TensorEntry
from launch.cli.command import is_key_value
from launch.cli.keys import keys_of
from launch.commands import ckpt
from launch.runtime.files import remove_folder
from tests.launch.checkpoints import (
    WEIGHTS,
    call,
    damage,
    shorten,
    state,
    write_checkpoint,
    write_run_with_best,
)
from tests.launch.processes import COMMAND_TIMEOUT_S, rankzero

IMPORTS = {"PYTHONPROFILEIMPORTTIME": "1"}


def run_ckpt(*argv: str, cwd: Path, expect: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """The real command, in `cwd`."""
    done = subprocess.run(
        rankzero("ckpt", *argv),
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints, of which the first is the best."""
    return write_run_with_best(tmp_path / "run")


# the real command -------------------------------------------------------------------------------------------


def test_list_inspect_and_prune_import_no_torch(run: Path) -> None:
    for argv in (
        ["list", "run"],
        ["inspect", "run"],
        ["prune", "run", "keep=1"],
        ["--help"],
        ["prune", "run"],
    ):
        start = time.perf_counter()
        done = run_ckpt(*argv, cwd=run.parent, expect=2 if argv == ["prune", "run"] else 0, **IMPORTS)
        print(f"{' '.join(argv)}: {time.perf_counter() - start:.2f} s")
        modules = [
            line.rpartition("|")[2].strip()
            for line in done.stderr.splitlines()
            if line.startswith("import time:")
        ]
        assert "launch.checkpoint.directory" in modules
        assert not {"torch", "numpy", "safetensors"} & set(modules)
    assert [step.name for step in directory.list_checkpoints(run)] == [
        "step-00000010",
        "step-00000030",
    ]


def test_export_and_verify_as_users_call_them(run: Path) -> None:
    output = run_ckpt("export", "run", "to=weights.safetensors", cwd=run.parent).stdout.splitlines()
    assert output[0].startswith("3 tensors of step 30")
    assert output[1] == 'load with: safetensors.torch.load_model(model, "weights.safetensors")'
    assert all(
        torch.equal(tensor, WEIGHTS[name])
        for name, tensor in load_file(run.parent / "weights.safetensors").items()
    )
    assert len(run_ckpt("verify", "run", cwd=run.parent).stdout.splitlines()) == 3


def test_no_argument_is_the_manual(tmp_path: Path) -> None:
    manual = run_ckpt("--help", cwd=tmp_path).stdout
    assert run_ckpt(cwd=tmp_path).stdout == manual
    assert manual.startswith("Look into the checkpoints of a run")
    for name, subcommand in ckpt.SUBCOMMANDS.items():
        assert " ".join([name, *subcommand.positional]) in manual
        assert all(f"{key.name}=" in manual for key in keys_of(subcommand.options))
    narrow = run_ckpt("--help", cwd=tmp_path, COLUMNS="80").stdout
    assert max(map(len, narrow.splitlines())) <= 80


# list, inspect ----------------------------------------------------------------------------------------------


def test_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_dir(run, 20).joinpath("rank-00001.safetensors").unlink()
    directory.quarantine(checkpoint_dir(run, 30))
    write_checkpoint(
        checkpoint_dir(run, 40), state("model", WEIGHTS), step=40, ranks=64, progress={"best_step": 10}
    )
    shorten(checkpoint_dir(run, 40) / "rank-00063.safetensors")
    lines = [" ".join(line.split()) for line in call(capsys, "list", run).splitlines() if "step-" in line]
    assert [line.split()[0] for line in lines] == [
        "step-00000010",
        "step-00000020",
        "step-00000040",
        "step-00000030.damaged",
    ]
    assert lines[0].endswith("ddp x 3 complete best")
    assert lines[1].endswith("ddp x 3 damaged rank-00001.safetensors is missing (No such file or directory)")
    assert "ddp x 64 damaged rank-00063.safetensors has" in lines[2]
    assert lines[3].endswith("damaged quarantined by its run")


def test_list_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run" in call(capsys, "list", tmp_path, expect=2)
    directory.checkpoints_dir(tmp_path).mkdir()
    assert "has no checkpoint yet" in call(capsys, "list", tmp_path)


def test_what_the_run_removes_meanwhile(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing and the opening: the real race is too narrow to be met, so the removal is put into
    it.
    """
    reading = Manifest.read

    def removed_first(folder: Path) -> Manifest:
        if folder == checkpoint_dir(run, 20):
            remove_folder(folder)
        return reading(folder)

    monkeypatch.setattr(Manifest, "read", staticmethod(removed_first))
    output = call(capsys, "list", run)
    assert "removed just now: the run goes on" in output
    assert "30" in output
    for argv in (["inspect"], ["export", "to=w.safetensors"], ["verify"]):
        write_checkpoint(checkpoint_dir(run, 20), WEIGHTS, step=20)
        output = call(capsys, argv[0], checkpoint_dir(run, 20), *argv[1:], expect=2)
        assert "step-00000020 has just been removed: its run goes on" in output
    write_checkpoint(checkpoint_dir(run, 20), WEIGHTS, step=20)
    output = call(capsys, "verify", run)  # of the others there are news
    assert output.count("is intact") == 2
    assert output.count("has just been removed") == 1


def test_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = call(capsys, "inspect", run)
    assert output.splitlines()[0] == str(checkpoint_dir(run, 30))
    for text in (
        "30 (1,920 samples, of a training set of 1,000)",
        "ddp x 3 (device cpu)",
        "torch 2.14.1",
        "best 0.25, best_step 10",
        "AdamW of 2 parameters: weight_decay 0.1, betas [0.9,0.95]",
        "head.weight is layer.weight",
        "optim.lr=0.1",
        "complete, by their sizes",
    ):
        assert text in output
    row = next(line for line in output.splitlines() if "weights" in line)
    assert row.split() == ["model", "weights", "3", "36", "148", "bytes", "F32", "I64", "1", "to", "3"]
    assert str(checkpoint_dir(run, 10)) in call(capsys, "inspect", checkpoint_dir(run, 10))


# verify -----------------------------------------------------------------------------------------------------


def test_verify_names_each_damaged_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "verify", run).count("is intact: 3 files") == 3
    damage(checkpoint_dir(run, 20) / "rank-00000.safetensors")
    shorten(checkpoint_dir(run, 20) / "rank-00002.safetensors")
    damage(checkpoint_dir(run, 30) / "manifest.json", 300)
    output = call(capsys, "verify", run, expect=1)
    for name in ("step-00000020/rank-00000", "step-00000020/rank-00002", "step-00000030/manifest.json"):
        assert f"{name}" in output
    assert output.count("is damaged") == 3
    assert output.count("is intact") == 1
    call(capsys, "verify", checkpoint_dir(run, 10))
    call(capsys, "verify", checkpoint_dir(run, 20), expect=1)


# mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("lst RUN", "'lst' is not a command; there are list, inspect, verify, diff, export, prune"),
        ("list", "list takes RUN, given is none"),
        ("list RUN RUN", "list takes RUN, given is /"),
        ("list RUN keep=2", "keep is not a key of list"),
        ("diff RUN", "diff takes A and B, given is /"),
        ("prune RUN", "keep= is missing; it is int"),
        ("prune RUN keep=some", "keep=some is not int"),
        ("prune RUN/checkpoints/step-00000010 keep=1", "is not a run that has checkpoints"),
        ("inspect nowhere", "nowhere is neither a checkpoint nor a run that has one"),
        ("inspect lr/x=0.1", "lr/x=0.1 is neither a checkpoint nor a run"),
        (
            "inspect RUN/checkpoints/step-00000011",
            "does not exist, or no longer; the run has step-00000010, step-00000020",
        ),
        (
            "export RUN",
            "to= must name a file to write that ends in .safetensors, such as to=weights.safetensors",
        ),
        ("export RUN to=w.onnx", "to=w.onnx must name a file"),
        (
            "export RUN to=w.pt",
            "write to=w.safetensors, then convert it with torch.save({k: v.clone() for k, v in "
            'safetensors.torch.load_file("w.safetensors").items()}, "w.pt")',
        ),
        ("export RUN to=w.pth", 'load_file("w.safetensors").items()}, "w.pth")'),
        ("export RUN to=nowhere/w.safetensors", "there is no folder nowhere"),
        ("export RUN to=RUN/there.safetensors", "exists already, and is not overwritten"),
        ("export RUN to=RUN/cut.safetensors", "cut-00001-of-00002.safetensors exists already"),
        ("export RUN to=w.safetensors shard=1", "shard is not a key of export; did you mean shard_gb?"),
        ("export RUN to=w.safetensors shard_gb=0", "shard_gb=0 must be greater than 0"),
        ("export RUN to=w.safetensors dtype=int8", "dtype=int8 is not fp32|bf16|fp16|null"),
        (
            "export RUN to=w.safetensors model=judge",
            "model=judge is not in the checkpoint of step 30, which holds model",
        ),
    ],
)
def test_mistakes(run: Path, capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    for name in ("there.safetensors", "cut-00001-of-00002.safetensors"):
        (run / name).touch()
    assert message in call(capsys, *argv.replace("RUN", str(run)).split(), expect=2)


def test_a_path_may_hold_an_equals_sign(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.rename(run.with_name("lr=0.1"))
    monkeypatch.chdir(run.parent)
    assert "step-00000030" in call(capsys, "list", "lr=0.1")
    assert not is_key_value("runs/lr=0.2")


# size -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_manifest_of_a_thousand_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks, each = 1024, 64
    manifest = Manifest(
        step=1,
        samples=64,
        time=0.0,
        progress={},
        config={},
        train_samples=1000,
        optimizers={},
        tied={},
        versions={},
        writer={"strategy": "fsdp", "world_size": ranks},
        files=[
            FileEntry(name=f"rank-{rank:05d}.safetensors", size=10**9, digest="0" * 32)
            for rank in range(ranks)
        ],
        tensors={
            f"net/model/layers.{n}.weight": TensorEntry(
                dtype="F32",
                shape=[ranks, each],
                cuts=[each * rank for rank in range(ranks + 1)],
                files=list(range(ranks)),
                offsets=[8 + 4 * each * n] * ranks,
            )
            for n in range(1000)
        },
    )
    folder = checkpoint_dir(tmp_path, 1)
    folder.mkdir(parents=True)
    manifest.write(folder)
    start = time.perf_counter()
    assert Manifest.read(folder) == manifest
    with capsys.disabled():
        size = (folder / "manifest.json").stat().st_size / 1e6
        print(f"\n{size:.0f} MB of manifest read and checked in {time.perf_counter() - start:.2f} s")
    assert "rank-00000.safetensors is missing" in call(capsys, "list", tmp_path)
    assert "1,024 files" in call(capsys, "inspect", tmp_path)
