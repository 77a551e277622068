"""From the command to a network that reads digits: `launch/run.py recipe=mnist`, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks.gpu_rows import WRONG, GpuSettings, Measurement

ROOT = Path(__file__).resolve().parents[3]
WORDS = (
    "recipe=mnist",
    "data.name=mnist",
    "data.val=0",
    "precision=bf16",
    "batch_size=256",
    "micro_batch_size=256",
)
EPOCHS = 5
GOAL = 0.99
"""test accuracy"""


def rows(settings: GpuSettings) -> Iterator[Measurement]:
    """One row."""
    yield Measurement(
        section="mnist", name=f"from the command to {GOAL:.0%}", measure=partial(timed, settings)
    )


def timed(settings: GpuSettings) -> dict[str, Any]:
    """Seconds to the end of the command, import to export; no figure for a network that has not learnt."""
    with TemporaryDirectory() as folder:
        if not settings.rehearse:
            return (
                {"note": "give mnist=FOLDER"}
                if settings.mnist is None
                else command(settings.mnist, Path(folder), EPOCHS, GOAL)
            )
        from tests.benchmarks.data import write_images

        write_images(Path(folder), 256)  # noise: nothing to learn
        return command(folder, Path(folder), 1, 0.0)


def command(data: str, folder: Path, epochs: int, goal: float) -> dict[str, Any]:
    """One run on the files in `data`."""
    run_dir = folder / "run"
    words = [*WORDS, f"data.root={data}", f"epochs={epochs}", f"run_dir={run_dir}"]
    start = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "launch/run.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if ended.returncode:
        raise RuntimeError(f"exit code {ended.returncode}: {''.join(ended.stderr.strip().splitlines()[-1:])}")
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    accuracy = f"test accuracy {last['test/accuracy']:.4f}"
    if last["test/accuracy"] < goal:
        return {"note": f"{WRONG}: {accuracy} after {epochs} epochs"}
    return {"rate": seconds, "unit": "s", "note": f"{accuracy} after {epochs} epochs"}
