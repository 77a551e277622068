"""What a checkpoint costs: the wait of the training, its slow-down, processor time, memory, the disk, a large
manifest.

    OMP_NUM_THREADS=1 python tests/benchmarks/checkpoint.py [folder=/where/to/write] [state_mb=200] [export_mb=2000]

One process, a state of `state_mb` (weights and two moments of Adam). Times that are compared are taken in
turns and given as the median of paired ratios. `folder` says which disk is meant (default: that of temporary
files).
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.filesize import decimal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.checkpoint.directory import list_checkpoints
from launch.checkpoint.manifest import FileEntry, Manifest, TensorEntry
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.resume import verify
from launch.checkpoint.run_state import slices_of
from launch.runtime.files import CHUNK
from launch.state.run import Run
from launch.training.loop import between_steps, finish, save, set_learning_rate, train_step
from tests.benchmarks.dense_run import Dense, prepared
from tests.launch.runs import LoopParts

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 2048
EVERY = 20
"""steps between the checkpoints of the slow-down"""


def say(what: str, value: str, aim: str = "") -> None:
    """One line of the table."""
    print(f"{what:<68}{value:>22}   {aim}".rstrip(), flush=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def dense(state_mb: float) -> Dense:
    """A recipe whose state has about that size."""
    return Dense(width=WIDTH, layers=max(round(state_mb * 1e6 / (12 * WIDTH**2)), 1), adam=True, samples=8)


def steps(run: Run, parts: LoopParts) -> Iterator[None]:
    """The body of `launch.training.loop.train`, on the same batch again and again."""
    metrics, checkpoints, requests = parts
    width = next(iter(run.strategies["model"].module.parameters())).shape[1]
    batch = run.to_device(
        [torch.randn(run.batch_plan.batch_size, width), torch.randn(run.batch_plan.batch_size, width)]
    )
    while True:
        lr = set_learning_rate(run)
        losses, norms = train_step(run, [batch])
        run.progress.step += 1
        metrics.step(losses, norms, lr)
        between_steps(run, metrics, checkpoints)
        requests.exchange()
        if run.checkpoint_due or requests.save:
            save(run, metrics, checkpoints, requests)
        yield


# the wait ---------------------------------------------------------------------------------------------------


def blocking_s(state_mb: float, rounds: int = 15) -> None:
    """Background save, memcpy, synchronous save, and what one would write by hand."""
    with prepared(dense(state_mb), every=10**9) as (run, parts):
        going = steps(run, parts)
        next(going), next(going)
        parts.checkpoints.reserve()
        size = sum(part.values.nbytes for part in slices_of(run).values())
        source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
        by_hand = parts.metrics.run_dir / "by_hand.pt"

        def torch_save() -> None:
            model, optimizer = run.models["model"], run.strategies["model"].optimizer
            with by_hand.open("wb") as file:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())

        background, copy, synchronous, hand, writes, processor = [], [], [], [], [], []
        for _ in range(rounds):
            next(going)
            copy.append(timed(lambda: target.copy_(source)))
            background.append(timed(parts.checkpoints.save))
            before = cpu_seconds()
            saved = parts.checkpoints.wait()
            processor.append(cpu_seconds() - before)
            assert saved is not None
            writes.append(saved.write_s)
            next(going)
            synchronous.append(timed(lambda: (parts.checkpoints.save(), parts.checkpoints.wait())))
            hand.append(timed(torch_save))
    say(f"stall of a background save, {decimal(size)}", f"{statistics.median(background) * 1e3:.1f} ms")
    say("  against a memcpy of as much", ratio(background, copy), "at most 1.2")
    say("  a synchronous save against it", ratio(synchronous, background), "at least 10")
    say("  torch.save and fsync against it", ratio(hand, background))
    say("written behind the training", f"{size / statistics.median(writes) / 1e9:.2f} GB/s")
    say("processor seconds behind the training", f"{statistics.median(processor) / size * 1e9:.2f} s/GB")


def ratio(ours: list[float], theirs: list[float]) -> str:
    """The median of paired ratios."""
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f} x"


def cpu_seconds() -> float:
    """Processor time of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# the slow-down ----------------------------------------------------------------------------------------------


def slow_down(state_mb: float, burner: bool, rounds: int = 4) -> None:
    """A run with a checkpoint every 20 steps against one without; with `burner` the other core is busy too."""
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range((os.cpu_count() or 1) - 1)
        if burner
    ]
    recipe = dense(state_mb)
    recipe.samples = 64
    try:
        with (
            prepared(recipe, every=EVERY) as (run, parts),
            prepared(recipe, every=10**9) as (plain_run, plain_parts),
        ):
            with_saves, without = steps(run, parts), steps(plain_run, plain_parts)
            pairs: list[tuple[float, float]] = []
            saving = lambda: [next(with_saves) for _ in range(EVERY)]  # noqa: E731
            not_saving = lambda: [next(without) for _ in range(EVERY)]  # noqa: E731
            saving(), not_saving()
            for _ in range(rounds):
                # a save goes on behind what follows it: the wait for it belongs to the run that saves
                a = timed(not_saving)
                b = timed(lambda: (saving(), parts.checkpoints.wait()))
                c = timed(lambda: (saving(), parts.checkpoints.wait()))
                d = timed(not_saving)
                pairs += [(b, a), (c, d)]
    finally:
        for other in others:
            other.kill()
            other.wait()
    step = statistics.median(a for _, a in pairs) / EVERY
    extra = statistics.median(b / a - 1 for b, a in pairs)
    where = "all cores busy" if burner else "a core to spare"
    say(
        f"a checkpoint every {EVERY} steps of {step * 1e3:.0f} ms, {where}",
        f"{extra:+.1%}",
        "" if burner else "at most +3.5 %",
    )


# memory -----------------------------------------------------------------------------------------------------


def memory(state_mb: float) -> None:
    """`peak` in a process of its own: here, what other measurements have freed would be used again."""
    ended = subprocess.run(
        [sys.executable, __file__, f"peak_of={state_mb}"], capture_output=True, text=True, check=True
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
        return (status("VmHWM") - before) / size


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
        save, dd, load, plain = [], [], [], []
        for _ in range(rounds):
            next(going)
            parts.checkpoints.save()
            saved = parts.checkpoints.wait()
            assert saved is not None
            save.append(saved.write_s)
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
            dd.append(timed(lambda words=words: subprocess.run(words, check=True)))  # type: ignore[misc]
            forget(file, other)
            plain.append(timed(lambda other=other: plain_read(other)))  # type: ignore[misc]
            load.append(timed(lambda newest=newest: load_into(run, newest)))  # type: ignore[misc]
            other.unlink()
    say("saved", f"{size / statistics.median(save) / 1e9:.2f} GB/s")
    say("  against dd with fsync", ratio(dd, save), "at least 0.6")
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


def main(words: list[str]) -> None:
    """The table."""
    said = dict(word.split("=", 1) for word in words)
    if "peak_of" in said:
        print(peak(float(said["peak_of"])))
        return
    state_mb, export_mb = float(said.get("state_mb", 200)), float(said.get("export_mb", 2000))
    tempfile.tempdir = said.get("folder", tempfile.gettempdir())
    free = decimal(shutil.disk_usage(tempfile.tempdir).free)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {os.cpu_count()} cores, {free} free"
    )
    print(f"load before the start: {os.getloadavg()[0]:.1f}\n")
    blocking_s(state_mb)
    slow_down(state_mb, burner=False)
    slow_down(state_mb, burner=True)
    memory(state_mb)
    disk(state_mb)
    manifest()
    export(export_mb)


if __name__ == "__main__":
    main(sys.argv[1:])
