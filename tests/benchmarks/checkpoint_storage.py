"""What a checkpoint takes: memory while saving, the speed of the disk, an export, a large manifest."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from rich.filesize import decimal

from launch.checkpoint.directory import list_checkpoints
from launch.checkpoint.manifest import FileEntry, Manifest, TensorEntry
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.resume import verify
from launch.checkpoint.saved_state import slices_of
from launch.runtime.files import CHUNK
from launch.state.run import Run
from launch.training.loop import finish, save, train_step
from tests.benchmarks.checkpoint_run import WIDTH, dense, ratio, say, steps, timed
from tests.benchmarks.dense_run import prepared

ROOT = Path(__file__).resolve().parents[2]

# memory -----------------------------------------------------------------------------------------------------


def memory(state_mb: float, script: Path) -> None:
    """`peak`, in a process that runs `script`: this one reuses memory that others have freed."""
    ended = subprocess.run(
        [sys.executable, str(script), f"peak_of={state_mb}"], capture_output=True, text=True, check=True
    )
    say("peak extra memory while saving, against the state", f"{float(ended.stdout):.2f} x", "at most 1.3")


def peak(state_mb: float) -> float:
    """Peak resident memory while saving, above that before the first save, against the size of the state."""
    with prepared(dense(state_mb), every=10**9) as (run, parts):
        batch = torch.randn(8, WIDTH)
        train_step(run, [[batch, batch]])  # without the record, which would make the room ahead
        run.progress.step += 1
        size = sum(part.values.nbytes for part in slices_of(run).values())
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = status("VmRSS")
        save(run, *parts)
        finish(run, *parts)
        return float(status("VmHWM") - before) / size


def status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# the disk ---------------------------------------------------------------------------------------------------


def disk(state_mb: float, rounds: int = 5) -> None:
    """Save against `dd`, and verifying and reading back against a plain read, the file not in memory."""
    with prepared(dense(state_mb), every=10**9, keep=1) as (run, parts):
        going = steps(run, parts)
        next(going)
        folder = parts.metrics.run_dir
        written, dd, load, plain = [], [], [], []
        for _ in range(rounds):
            next(going)
            parts.checkpoints.save()
            saved = parts.checkpoints.wait()
            assert saved is not None
            written.append(saved.write_s)
            newest = list_checkpoints(folder)[-1]
            file = next(newest.glob("*.safetensors"))
            size, other = file.stat().st_size, folder / "dd"
            words = [
                "dd",
                "if=/dev/zero",
                f"of={other}",
                f"bs={CHUNK}",
                f"count={size // CHUNK}",
                "conv=fsync",
                "status=none",
            ]
            dd.append(timed(partial(subprocess.run, words, check=True)))
            forget(file, other)
            plain.append(timed(partial(plain_read, other)))
            load.append(timed(partial(load_into, run, newest)))
            other.unlink()
    say("saved", f"{size / statistics.median(written) / 1e9:.2f} GB/s")
    say("  against dd with fsync", ratio(dd, written), "at least 0.6")
    say("loaded: verified, then read into the model", f"{size / statistics.median(load) / 1e9:.2f} GB/s")
    say("  against a plain read", ratio(plain, load), "at least 0.6")


def forget(*files: Path) -> None:
    """Take files out of the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def plain_read(path: Path) -> None:
    """All bytes, once."""
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def load_into(run: Run, folder: Path) -> None:
    """What a resume does with a checkpoint."""
    checkpoint, error = verify(folder, run.world, run.phase.tick)
    assert checkpoint is not None, error
    with checkpoint:
        run.strategies["model"].load_state(checkpoint.of("model"))


# export and manifest ----------------------------------------------------------------------------------------


def export(size_mb: float) -> None:
    """Peak memory of `rankzero ckpt export`, over that of a process which has imported torch."""
    with prepared(dense(size_mb * 3), every=10**9) as (run, parts):  # the weights are a third of the state
        going = steps(run, parts)
        next(going)
        save(run, *parts)
        finish(run, *parts)
        newest = list_checkpoints(parts.metrics.run_dir)[-1]
        weights = sum(p.nbytes for p in run.models["model"].parameters())
        measure = "import sys\nfrom launch.commands import main\nmain(['ckpt', 'export', *sys.argv[1:]])\n"
        measure += (
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        argv = [
            sys.executable,
            "-c",
            measure,
            str(newest),
            f"to={parts.metrics.run_dir / 'export.safetensors'}",
        ]
        ended = subprocess.run(argv, capture_output=True, text=True, check=True)
        peak = int(ended.stdout.split()[-1]) * 1024
        say(f"export of {decimal(weights)}: peak memory of the process", decimal(peak), "below 500 MB")


def manifest(ranks: int = 1024, tensors: int = 1000) -> None:
    """Opening and checking that of a large run."""
    cuts = [rank * 65536 for rank in range(ranks + 1)]
    made = Manifest(
        step=1,
        samples=1,
        time=0.0,
        progress={},
        config={},
        train_samples=1,
        optimizers={},
        tied={},
        versions={},
        writer={},
        files=[
            FileEntry(name=f"rank-{rank:05d}.safetensors", size=1, digest="0" * 32) for rank in range(ranks)
        ],
        tensors={
            f"model/model/blocks.{index}.weight": TensorEntry(
                dtype="F32",
                shape=[cuts[-1]],
                cuts=cuts,
                files=list(range(ranks)),
                offsets=[100_000 + index * 262_144] * ranks,
            )
            for index in range(tensors)
        },
    )
    with tempfile.TemporaryDirectory() as name:
        made.write(Path(name))
        size = (Path(name) / "manifest.json").stat().st_size
        found = timed(lambda: Checkpoint(Path(name)).close())
    say(
        f"manifest of {ranks:,} ranks and {tensors:,} tensors, {decimal(size)}: opened in",
        f"{found:.2f} s",
        "below 2 s",
    )
