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
from launch.checkpoint.reader import Checkpoint
from launch.cli.command import is_key_value
from launch.cli.keys import keys_of
from launch.commands import ckpt
from launch.runtime.files import remove_folder
from tests.launch.checkpoints import CONFIG, GROUPS, call, state, write_checkpoint, write_run
from tests.launch.processes import COMMAND_TIMEOUT_S, rankzero

WEIGHTS = {
    "layer.weight": torch.arange(30.0).view(5, 6),
    "layer.bias": torch.ones(5),
    "count": torch.tensor(7),
}
IMPORTS = {"PYTHONPROFILEIMPORTTIME": "1"}


def run(*words: str, cwd: Path, expect: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """The real command, in `cwd`."""
    done = subprocess.run(
        rankzero("ckpt", *words),
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
def made(tmp_path: Path) -> Path:
    """A run with three checkpoints, of which the first is the best."""
    return write_run(
        tmp_path / "run",
        state("model", WEIGHTS),
        config={**CONFIG, "checkpoint": {"keep": 2, "best": True}},
        progress={"step": 30, "best": 0.25, "best_step": 10, "bad_evaluations": 2},
        optimizers={"model": GROUPS},
        tied={"model": {"head.weight": "layer.weight"}},
    )


def spoil(path: Path, position: int = -1) -> None:
    """Change one byte, or with `position` 0 lose one."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content if position else content[1:])


# the real command -------------------------------------------------------------------------------------------


def test_list_inspect_and_prune_import_no_torch(made: Path) -> None:
    for words in (
        ["list", "run"],
        ["inspect", "run"],
        ["prune", "run", "keep=1"],
        ["--help"],
        ["prune", "run"],
    ):
        start = time.perf_counter()
        done = run(*words, cwd=made.parent, expect=2 if words == ["prune", "run"] else 0, **IMPORTS)
        print(f"{' '.join(words)}: {time.perf_counter() - start:.2f} s")
        modules = [
            line.rpartition("|")[2].strip()
            for line in done.stderr.splitlines()
            if line.startswith("import time:")
        ]
        assert "launch.checkpoint.directory" in modules
        assert not {"torch", "numpy", "safetensors"} & set(modules)
    assert [step.name for step in directory.list_checkpoints(made)] == [
        "step-00000010",
        "step-00000030",
    ]


def test_export_and_verify_as_users_call_them(made: Path) -> None:
    said = run("export", "run", "to=weights.safetensors", cwd=made.parent).stdout.splitlines()
    assert said[0].startswith("3 tensors of step 30")
    assert said[1] == 'load with: safetensors.torch.load_model(model, "weights.safetensors")'
    assert all(
        torch.equal(tensor, WEIGHTS[name])
        for name, tensor in load_file(made.parent / "weights.safetensors").items()
    )
    assert len(run("verify", "run", cwd=made.parent).stdout.splitlines()) == 3


def test_no_words_is_the_manual(tmp_path: Path) -> None:
    manual = run("--help", cwd=tmp_path).stdout
    assert run(cwd=tmp_path).stdout == manual
    assert manual.startswith("Look into the checkpoints of a run")
    for name, subcommand in ckpt.SUBCOMMANDS.items():
        assert " ".join([name, *subcommand.positional]) in manual
        assert all(f"{key.name}=" in manual for key in keys_of(subcommand.options))
    assert max(map(len, run("--help", cwd=tmp_path, COLUMNS="80").stdout.splitlines())) <= 80


# list, inspect ----------------------------------------------------------------------------------------------


def test_list(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_dir(made, 20).joinpath("rank-00001.safetensors").unlink()
    directory.quarantine(checkpoint_dir(made, 30))
    write_checkpoint(
        checkpoint_dir(made, 40), state("model", WEIGHTS), step=40, ranks=64, progress={"best_step": 10}
    )
    spoil(checkpoint_dir(made, 40) / "rank-00063.safetensors", 0)
    lines = [" ".join(line.split()) for line in call(capsys, "list", made).splitlines() if "step-" in line]
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
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing and the opening: the real race is too narrow to be met, so the removal is put into
    it.
    """
    reading = Manifest.read

    def removed_first(folder: Path) -> Manifest:
        if folder == checkpoint_dir(made, 20):
            remove_folder(folder)
        return reading(folder)

    monkeypatch.setattr(Manifest, "read", staticmethod(removed_first))
    said = call(capsys, "list", made)
    assert "removed just now: the run goes on" in said
    assert "30" in said
    for words in (["inspect"], ["export", "to=w.safetensors"], ["verify"]):
        write_checkpoint(checkpoint_dir(made, 20), WEIGHTS, step=20)
        said = call(capsys, words[0], checkpoint_dir(made, 20), *words[1:], expect=2)
        assert "step-00000020 has just been removed: its run goes on" in said
    write_checkpoint(checkpoint_dir(made, 20), WEIGHTS, step=20)
    said = call(capsys, "verify", made)  # of the others there are news
    assert said.count("is intact") == 2
    assert said.count("has just been removed") == 1


def test_inspect(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = call(capsys, "inspect", made)
    assert said.splitlines()[0] == str(checkpoint_dir(made, 30))
    for words in (
        "30 (1,920 samples, of a training set of 1,000)",
        "ddp x 3 (device cpu)",
        "torch 2.14.1",
        "best 0.25, best_step 10",
        "AdamW of 2 parameters: weight_decay 0.1, betas [0.9,0.95]",
        "head.weight is layer.weight",
        "optim.lr=0.1",
        "complete, by their sizes",
    ):
        assert words in said
    row = next(line for line in said.splitlines() if "weights" in line)
    assert row.split() == ["model", "weights", "3", "36", "148", "bytes", "F32", "I64", "1", "to", "3"]
    assert str(checkpoint_dir(made, 10)) in call(capsys, "inspect", checkpoint_dir(made, 10))


# verify -----------------------------------------------------------------------------------------------------


def test_verify_names_each_damaged_file(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "verify", made).count("is intact: 3 files") == 3
    spoil(checkpoint_dir(made, 20) / "rank-00000.safetensors")
    spoil(checkpoint_dir(made, 20) / "rank-00002.safetensors", 0)
    spoil(checkpoint_dir(made, 30) / "manifest.json", 300)
    said = call(capsys, "verify", made, expect=1)
    for name in ("step-00000020/rank-00000", "step-00000020/rank-00002", "step-00000030/manifest.json"):
        assert f"{name}" in said
    assert said.count("is damaged") == 3
    assert said.count("is intact") == 1
    call(capsys, "verify", checkpoint_dir(made, 10))
    call(capsys, "verify", checkpoint_dir(made, 20), expect=1)


# export -----------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_not_exported(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(checkpoint_dir(made, 30) / "rank-00001.safetensors")
    assert "rank-00001.safetensors is damaged" in call(
        capsys, "export", made, f"to={made / 'w.safetensors'}", expect=1
    )
    assert [path.name for path in made.iterdir()] == ["checkpoints"]
    call(capsys, "export", checkpoint_dir(made, 20), f"to={made / 'w.safetensors'}")


def test_export_of_several_models(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(made / "two", state("student", WEIGHTS) | state("teacher", WEIGHTS))
    said = call(capsys, "export", folder, f"to={made / 'w.safetensors'}", "shard_gb=1e-7")
    index = made / "w.safetensors.index.json"
    assert f'accelerate.load_checkpoint_in_model(torch.nn.ModuleDict(models), "{index}")' in said
    said = call(capsys, "export", folder, f"to={made / 't.safetensors'}", "model=teacher", "dtype=fp16")
    loaded = load_file(made / "t.safetensors")
    assert {name: tensor.dtype for name, tensor in loaded.items() if name != "count"} == {
        "layer.weight": torch.float16,
        "layer.bias": torch.float16,
    }
    assert f'safetensors.torch.load_model(model, "{made / "t.safetensors"}")' in said


# prune ------------------------------------------------------------------------------------------------------


def test_prune(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (40, 50):
        write_checkpoint(
            checkpoint_dir(made, step),
            WEIGHTS,
            step=step,
            config={"checkpoint": {"best": True}},
            progress={"best_step": 10},
        )
    with Checkpoint(checkpoint_dir(made, 20)):
        said = call(capsys, "prune", made, "keep=2").splitlines()
    assert [line.split()[0] for line in said] == ["kept", "kept", "removed", "kept", "kept"]
    assert said[0].endswith("step-00000010, the best")
    assert said[1].endswith("step-00000020, a process reads it")
    assert [directory.step_of(folder) for folder in directory.list_checkpoints(made)] == [
        10,
        20,
        40,
        50,
    ]
    call(capsys, "prune", made, "keep=9")
    assert len(directory.list_checkpoints(made)) == 4


def test_prune_leaves_something_to_go_on_from(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "keep=0 must be 1 or more" in call(capsys, "prune", made, "keep=0", expect=2)
    spoil(checkpoint_dir(made, 30) / "rank-00002.safetensors", 0)
    assert "would keep no intact checkpoint (rank-00002.safetensors" in call(
        capsys, "prune", made, "keep=1", expect=2
    )
    assert len(directory.list_checkpoints(made)) == 3
    call(capsys, "prune", made, "keep=2")
    assert [directory.step_of(folder) for folder in directory.list_checkpoints(made)] == [
        10,
        20,
        30,
    ]  # the first is the best


# mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
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
        ("export RUN to=w.safetensors shard_gb=0", "shard_gb=0 must be greater than 0 and below 1e+06"),
        ("export RUN to=w.safetensors dtype=int8", "dtype=int8 is not fp32|bf16|fp16|null"),
        (
            "export RUN to=w.safetensors model=judge",
            "model=judge is not in the checkpoint of step 30, which holds model",
        ),
    ],
)
def test_mistakes(made: Path, capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    for name in ("there.safetensors", "cut-00001-of-00002.safetensors"):
        (made / name).touch()
    assert said in call(capsys, *words.replace("RUN", str(made)).split(), expect=2)


def test_a_path_may_hold_an_equals_sign(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made.rename(made.with_name("lr=0.1"))
    monkeypatch.chdir(made.parent)
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
