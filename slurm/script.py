"""The batch script of a job, made from train.sbatch: what SLURM is asked for, and the runs in it."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

HOME = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).with_name("train.sbatch")
JOB_ID_FILE = "job.number"
"""the file in a run directory that holds the id of its job"""
SCRIPT_FILE = "job.sbatch"
"""the file in a run directory that was submitted: `sbatch RUN_DIR/job.sbatch` continues the run"""


@dataclass(kw_only=True)
class JobOptions:
    """What SLURM is asked for, and what `rankzero submit` does with it."""

    nodes: Annotated[int, Ge(1)] = 1
    """number of nodes"""
    gpus: Annotated[int, Ge(0)] = 0
    """GPUs of each node; each gets a rank"""
    ranks: Annotated[int, Ge(1)] = 1
    """without GPUs: ranks of each node"""
    cpus: Annotated[int, Ge(0)] = 0
    """CPUs of each rank (0: the site's default)"""
    time: str = ""
    """time limit, such as 24:00:00 (default: the site's); the run stops before it and is requeued"""
    partition: str = ""
    """as sbatch calls it"""
    account: str = ""
    """as sbatch calls it"""
    name: str = ""
    """the job's name (default: that of the recipe)"""
    sbatch: str = ""
    """any other options of sbatch: sbatch='--qos=high --exclusive'"""
    launcher: Literal["torchrun", "srun"] = "torchrun"
    """srun: a task a rank, without torchrun's agent"""
    container: str = ""
    """image to run in: a .sif file with apptainer, another with pyxis"""
    after: str = ""
    """begin when this job, or that of this run directory, has succeeded; never if it fails. A requeued job
    has not ended yet. after=afterany:JOB, or another of sbatch's dependencies, is taken as it is
    """
    modules: list[str] = field(default_factory=list)
    """`module load` these before the run"""
    setup: list[str] = field(default_factory=list)
    """lines of bash, before the run starts on its first node: `source ~/venv/bin/activate`"""
    follow: bool = False
    """print what the run prints until it ends; Ctrl-C leaves the job alone"""
    check: bool = True
    """check the keys of the run before it is queued; false where this machine lacks what the nodes have"""
    dry_run: bool = False
    """print the script that would be queued"""
    site: str = ""
    """YAML with this cluster's own values of these keys, which the command line overrides (default:
    ~/.config/rankzero/slurm.yaml, if it exists)
    """

    @property
    def ranks_per_node(self) -> int:
        """Those that train.sbatch starts on a node."""
        return self.gpus or self.ranks


@dataclass(frozen=True)
class QueuedRun:
    """One run of a job: its arguments for `rankzero train`, without run_dir, and its run directory."""

    argv: list[str]
    folder: Path


def make_script(options: JobOptions, folder: Path, runs: Sequence[QueuedRun], is_array: bool) -> str:
    """train.sbatch with the options of this job, the lines of the site, and the arguments of the run.

    Raises ValueError for a value that sbatch could not read.
    """
    head, mark, body = TEMPLATE.read_text().partition("set -euo pipefail\n")
    own = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", head, re.MULTILINE))
    directives = {**own, **sbatch_options(options, folder, runs, is_array)}
    exports = {"RANKZERO_HOME": shlex.quote(str(HOME))}
    if options.container:  # it has a Python of its own
        exports["RANKZERO_CONTAINER"] = shlex.quote(options.container)
    else:
        exports["PATH"] = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    lines = [f"export {name}={value}" for name, value in exports.items()]
    lines += [f"module load {shlex.join(options.modules)}"] if options.modules else []
    lines += [*options.setup, *set_arguments(options, runs, is_array)]
    made = f"# Made from train.sbatch by `rankzero submit`, {time.strftime('%Y-%m-%d %H:%M')}."
    again = f"# Queue it again: sbatch {shlex.quote(str(folder / SCRIPT_FILE))}"
    sbatch = [directive(name, value) for name, value in directives.items()]
    return "\n".join(["#!/bin/bash", made, again, "", *sbatch, "", *lines, "", mark + body])


def set_arguments(options: JobOptions, runs: Sequence[QueuedRun], is_array: bool) -> list[str]:
    """The lines of bash that give the script the arguments of its run, or of this task's run of an array."""
    sets = [
        shlex.join(["set", "--", *run.argv, f"launcher={options.launcher}", f"run_dir={run.folder}"])
        for run in runs
    ]
    if not is_array:
        return sets
    return [
        "case $SLURM_ARRAY_TASK_ID in",
        *(f"  {index}) {line} ;;" for index, line in enumerate(sets)),
        "esac",
    ]


def sbatch_options(
    options: JobOptions, folder: Path, runs: Sequence[QueuedRun], is_array: bool
) -> dict[str, str]:
    """The options of sbatch, by name. A task is a node's agent where there are GPUs, else a rank."""
    tasks = 1 if options.gpus else options.ranks
    pattern = str((folder / ("slurm-%A_%a.out" if is_array else "slurm-%j.out")).absolute())
    values = {
        "job-name": options.name,
        "chdir": str(Path.cwd()),
        "output": pattern.replace("%", "%%").replace("%%A_%%a", "%A_%a").replace("%%j", "%j"),
        "nodes": str(options.nodes),
        "ntasks-per-node": str(tasks),
        "gpus-per-node": str(options.gpus or ""),
        "cpus-per-task": str(options.cpus * options.ranks_per_node // tasks or ""),
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "array": f"0-{len(runs) - 1}" if is_array else "",
    }
    if options.after:
        after = job_id_of(Path(options.after)) or options.after
        values |= {"dependency": after if ":" in after else f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    given = {name: value for name, value in values.items() if value}
    for option in shlex.split(options.sbatch):
        name, _, value = option.partition("=")
        if not name.startswith("--"):
            raise ValueError(f"sbatch={options.sbatch}: {option} is not --option or --option=value")
        given[name.removeprefix("--")] = value
    return given


def directive(name: str, value: str) -> str:
    """An #SBATCH line. sbatch reads quotes, but cannot have both kinds in one value: ValueError."""
    if re.fullmatch(r"[\w./:,=@%+-]*", value):
        return f"#SBATCH --{name}" + (f"={value}" if value else "")
    quote = '"' if "'" in value else "'"
    if quote in value or not value.isprintable() or "\\" in value:
        raise ValueError(f"--{name}={value} cannot be written for sbatch: leave out quotes and backslashes")
    return f"#SBATCH --{name}={quote}{value}{quote}"


def job_id_of(folder: Path) -> str | None:
    """The job of a run directory, if it has one."""
    file = folder / JOB_ID_FILE
    return file.read_text().strip() if file.is_file() else None
