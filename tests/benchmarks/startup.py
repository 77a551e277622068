"""How long a run takes to its first step, against a script written by hand that does the same.

    OMP_NUM_THREADS=1 python tests/benchmarks/startup.py rounds=10 recipes=mnist

`--help`, and a mistake in the command: processor seconds, over those of a Python that does nothing. Imports:
processor seconds (user and system) of a process that imports what a run does, over one that imports
torch. First step: seconds from the start of the command to the end of the first optimizer step, as
`metrics.jsonl` has it, over those of
`raw_loop.py`: the same data, model, optimizer, batch; the same imports but rankzero's own; one process, and
two under torchrun and DDP. All in turns (A B B A); the figure is the median of paired ratios. The parts of
the start are those that the last run tells on its screen; a run of several ranks has its roll-call in
`ranks`. `start_timeout` bounds that and is no cost.
"""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from launch.cli.command import read_command
from tests.benchmarks.benchmark_report import Report, interleave, ratios
from tests.launch.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    **{
        "what": "<40",
        "rankzero": ">9.3f",
        "raw": ">9.3f",
        "ratio": ">8.3f",
        "low": ">8.3f",
        "high": ">8.3f",
    },
    **{"aim": ">9", "parts": ""},
}
BATCH = 64


@dataclass(kw_only=True)
class Options:
    """The options of this benchmark."""

    rounds: int = 10
    """A B B A of each comparison"""
    recipes: list[str] = field(default_factory=lambda: ["mnist", "gpt"])
    """recipes whose first step is waited for, separated by commas"""
    json: str | None = None
    """file for the rows as JSON, with machine and versions"""


def main(argv: list[str]) -> None:
    """Print the table."""
    options = read_command(argv, __doc__, Options, name="startup.py").options
    rounds = options.rounds
    report = Report(options.json, COLUMNS)
    for what, args in (("--help", ["--help"]), ("a misspelt key", ["recipe=resnet", "optim.lrr=0.1"])):
        answers = interleave(
            partial(processor, ["-c", "pass"]), partial(processor, ["launch/run.py", *args]), rounds
        )
        report.row(what=f"{what}, answered", **row(answers), aim="<= 0.3 s")
    imports = interleave(
        partial(processor, ["-c", "import torch"]),
        partial(processor, ["-c", "from launch.commands.train import load_trainer; load_trainer()"]),
        rounds,
    )
    report.row(what="imports, against `import torch`", **row(imports), aim="<= 1.05")
    for recipe in options.recipes:
        for ranks in (1, 2):
            parts: list[str] = []
            pairs = interleave(partial(raw, recipe, ranks), partial(rankzero, recipe, ranks, parts), rounds)
            where = f"torchrun, {ranks} ranks, ddp" if ranks > 1 else "one process"
            report.row(what=f"first step of {recipe}, {where}", **row(pairs), aim="<= 1.15", parts=parts[-1])


def row(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Medians and ratios of (raw, rankzero)."""
    theirs, ours = zip(*pairs, strict=True)
    return {"rankzero": statistics.median(ours), "raw": statistics.median(theirs), **ratios(pairs)}


def processor(args: list[str]) -> float:
    """Processor seconds of `python ARGS`, which may end with a mistake."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode not in (0, 2):
        sys.exit(ended.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def raw(recipe: str, ranks: int) -> float:
    """Seconds to the first step of the script."""
    strategy = "ddp" if ranks > 1 else "single"
    words = [f"recipe={recipe}", f"strategy={strategy}", f"batch_size={BATCH}", "steps=1"]
    start = time.time()
    return float(output("tests/benchmarks/raw_loop.py", ranks, words).split()[0]) - start


def rankzero(recipe: str, ranks: int, parts: list[str]) -> float:
    """Seconds to the first step of a run; appends what it says of its start to `parts`."""
    with tempfile.TemporaryDirectory() as folder:
        micro = f"micro_batch_size={BATCH // ranks}"
        words = [
            f"recipe={recipe}",
            f"batch_size={BATCH}",
            micro,
            "steps=1",
            "data.test=0",
            "data.val=0",
            f"run_dir={folder}/run",
        ]
        start = time.time()
        said = output("launch/run.py", ranks, words)
        parts.append(" ".join(re.findall(r"^ *start-up (.*)$", said, re.MULTILINE)))
        first = json.loads(Path(folder, "run", "metrics.jsonl").read_text().splitlines()[0])
        return float(first["time"]) - start


def output(script: str, ranks: int, words: list[str]) -> str:
    """What a script prints, under torchrun if it has several ranks."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    command = [sys.executable, *(torchrun if ranks > 1 else ()), script, *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(command)}\n{ended.stdout}{ended.stderr}")
    return ended.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
