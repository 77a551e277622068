"""What submit.py queues: a job, its runs, and the script made from train.sbatch."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).with_name("train.sbatch")
NUMBER = "job.number"
"""the file in a run directory that says which job it is of"""


@dataclass(kw_only=True)
class Job:
    """What SLURM is asked for."""

    nodes: int = 1
    gpus: int = 0
    ranks: int = 1
    cpus: int = 0
    time: str = ""
    partition: str = ""
    account: str = ""
    name: str = ""
    sbatch: str = ""
    launcher: str = "torchrun"
    container: str = ""
    after: str = ""
    follow: bool = False
    check: bool = True
    dry_run: bool = False
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)

    @property
    def ranks_per_node(self) -> int:
        """Those that train.sbatch starts on a node."""
        return self.gpus or self.ranks


@dataclass(frozen=True)
class Run:
    """One run: its words for launch/run.py, without run_dir, and its folder."""

    words: list[str]
    folder: Path


def script(job: Job, folder: Path, runs: Sequence[Run], many: bool) -> str:
    """train.sbatch with this job's options in place of its own, the site's lines, and the words of the run."""
    head, mark, body = TEMPLATE.read_text().partition("set -euo pipefail\n")
    own = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", head, re.MULTILINE))
    options = "\n".join(
        directive(name, value) for name, value in {**own, **options_of(job, folder, runs, many)}.items()
    )
    exports = {"RANKZERO_HOME": shlex.quote(str(HOME))}
    if job.container:  # it has a Python of its own
        exports["RANKZERO_CONTAINER"] = shlex.quote(job.container)
    else:
        exports["PATH"] = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    lines = [f"export {name}={value}" for name, value in exports.items()]
    lines += [f"module load {shlex.join(job.modules)}"] if job.modules else []
    lines += job.setup
    sets = [
        shlex.join(["set", "--", *run.words, f"launcher={job.launcher}", f"run_dir={run.folder}"])
        for run in runs
    ]
    chosen = [f"  {index}) {line} ;;" for index, line in enumerate(sets)]
    lines += ["case $SLURM_ARRAY_TASK_ID in", *chosen, "esac"] if many else sets
    where = shlex.quote(str(folder / "job.sbatch"))
    about = f"# Made from train.sbatch by submit.py, {time.strftime('%Y-%m-%d %H:%M')}. Queue it again: sbatch {where}"
    return "\n".join(["#!/bin/bash", about, "", options, "", *lines, "", mark + body])


def options_of(job: Job, folder: Path, runs: Sequence[Run], many: bool) -> dict[str, str]:
    """The options of sbatch, by name. A task is a node's torchrun where there are GPUs, else a rank."""
    tasks = 1 if job.gpus else job.ranks
    pattern = str((folder / ("slurm-%A_%a.out" if many else "slurm-%j.out")).absolute())
    options = {
        "job-name": job.name,
        "chdir": str(Path.cwd()),
        "output": pattern.replace("%", "%%").replace("%%A_%%a", "%A_%a").replace("%%j", "%j"),
        "nodes": str(job.nodes),
        "ntasks-per-node": str(tasks),
        "gpus-per-node": str(job.gpus or ""),
        "cpus-per-task": str(job.cpus * job.ranks_per_node // tasks or ""),
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "array": f"0-{len(runs) - 1}" if many else "",
    }
    if job.after:
        after = number_of(Path(job.after)) or job.after
        options |= {"dependency": after if ":" in after else f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    given = {name: value for name, value in options.items() if value}
    for word in shlex.split(job.sbatch):
        name, _, value = word.partition("=")
        if not name.startswith("--"):
            raise ValueError(f"sbatch={job.sbatch}: {word} is not --option or --option=value")
        given[name.removeprefix("--")] = value
    return given


def directive(name: str, value: str) -> str:
    """An #SBATCH line. sbatch knows quotes, but no way to have both kinds in one value."""
    if re.fullmatch(r"[\w./:,=@%+-]*", value):
        return f"#SBATCH --{name}" + (f"={value}" if value else "")
    mark = '"' if "'" in value else "'"
    if mark in value or not value.isprintable() or "\\" in value:
        raise ValueError(f"--{name}={value} cannot be written for sbatch: leave out quotes and backslashes")
    return f"#SBATCH --{name}={mark}{value}{mark}"


def number_of(folder: Path) -> str | None:
    """The job of a run directory, if it has one."""
    file = folder / NUMBER
    return file.read_text().strip() if file.is_file() else None
