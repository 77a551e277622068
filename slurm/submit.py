"""Queue a run, or a sweep of runs, on SLURM.

    python slurm/submit.py nodes=2 gpus=8 time=24:00:00 recipe=gpt strategy=zero3
    python slurm/submit.py nodes=2 gpus=8 recipe=gpt dry_run=true           print the script, queue nothing
    python slurm/submit.py sweep gpus=1 recipe=gpt optim.lr=1e-3,3e-4 seed=1,2        four runs, one array job
    python slurm/submit.py status runs/gpt/20260101-120000                  what SLURM and the run itself say
    python slurm/submit.py cancel runs/gpt/20260101-120000

These words are for SLURM, all others go to launch/run.py, which checks them before anything is queued:

    nodes=1           number of nodes
    gpus=0            GPUs of each node; each gets a rank
    ranks=1           without GPUs: ranks of each node
    cpus=N            CPUs of each rank (default: the site's)
    time=24:00:00     time limit (default: the site's). The run stops before it and goes back into the queue.
    partition= account= name=     as sbatch calls them; name= is by default that of the recipe
    sbatch='--qos=high --exclusive'     any other option of sbatch
    launcher=torchrun    or srun: a task a rank, without torchrun
    container=IMAGE   run in it: a .sif file with apptainer, another image with pyxis
    after=JOB         begin when this job, or that of this run directory, has succeeded; never if it fails. A job that stops and
                      goes on later has not ended yet. after=afterany:JOB, or another of sbatch's dependencies, is taken as it is.
    follow=true       print what the run prints until it ends; Ctrl-C leaves the job alone
    check=false       do not check the words first: where this machine lacks what the nodes have
    dry_run=true      print the script that would be queued
    site=FILE         YAML with this cluster's own values (default: ~/.config/rankzero/slurm.yaml, if it is there)

The site's file holds any of the words above, which the command line overrides, and two lists:

    partition: gpu
    account: physics
    modules: [cuda/12.4, python/3.12]     # module load ...
    setup: [source ~/venv/bin/activate]   # lines of bash, before the run starts on its first node

In a sweep each value with commas is a list (brackets protect them: optim.betas=[0.9,0.95] is one value), and
each combination a run of its own below run_dir. The script is kept as RUN_DIR/job.sbatch; `sbatch
RUN_DIR/job.sbatch` continues the run. Exit codes: 0 queued, or with follow=true done; 1 the job that was
followed failed; 2 a mistake, told in one line.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import yaml
from batch import HOME, NUMBER, Job, Run, number_of, script  # beside this file, which is run as it stands

SITE = Path("~/.config/rankzero/slurm.yaml")
ALIVE = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "RESIZING",
    "SIGNALING",
    "STOPPED",
}
POLL = 2.0
"""seconds between questions to SLURM, whose controller serves everybody"""


def main(words: list[str]) -> int:
    """Do what `words` say; returns the exit code."""
    if not words or "--help" in words or "-h" in words:
        print((__doc__ or "").strip())
        return 0
    try:
        if words[0] in COMMANDS:
            return COMMANDS[words[0]](words[1:])
        return submit(words)
    except (ValueError, OSError) as error:
        print(f"rankzero: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


# the commands -----------------------------------------------------------------------------------------------


def submit(words: Sequence[str], many: bool = False) -> int:
    """Check the words, write the script, queue it."""
    job, theirs = read(words)
    folder, runs = runs_of(theirs, many)
    job.name = job.name or name_of(theirs)
    for run in runs if job.check else ():
        check(run, job)
    for place in {folder, *(run.folder for run in runs)}:
        if (
            not job.after
            and (number := number_of(place))
            and (alive := [row for row in rows(number) if row["state"] in ALIVE])
        ):
            raise ValueError(
                f"{place} is in use by job {number}, which is {alive[0]['state']}; wait, cancel it, or say after={number}"
            )
    text = script(job, folder, runs, many)
    if job.dry_run:
        print(text, end="")
        return 0
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.sbatch").write_text(text)
    number = slurm("sbatch", "--parsable", str(folder / "job.sbatch")).partition(";")[0]
    (folder / NUMBER).write_text(f"{number}\n")
    for index, run in enumerate(runs):
        if many:
            (run.folder / NUMBER).write_text(f"{number}_{index}\n")
    print(f"job {number}: {f'{len(runs)} runs below {folder}' if many else folder}", flush=True)
    return follow(number, folder) if job.follow else 0


def sweep(words: Sequence[str]) -> int:
    """Queue each combination of the values with commas, as one array job."""
    return submit(words, many=True)


def status(words: Sequence[str]) -> int:
    """What SLURM says of the job of a run directory, and what the run has written."""
    folder, number = found(words)
    known = rows(number)
    for row in known:
        where = row["nodes"] or row["reason"]
        print(f"job {row['job']}  {row['state']}  {row['time']}  {where}")
    if not known:
        print(f"job {number}  SLURM has forgotten it: it ended a while ago")
    inside = sorted(path.parent for path in folder.glob(f"*/{NUMBER}"))
    for place in inside or [folder]:
        print(f"{place}  {progress(place)}")
    return 0


def cancel(words: Sequence[str]) -> int:
    """End the job of a run directory, for good."""
    folder, number = found(words)
    alive = [row for row in rows(number) if row["state"] in ALIVE]
    if alive:
        slurm("scancel", number)
    print(f"job {number} of {folder} {'is cancelled' if alive else 'had ended already'}")
    return 0


COMMANDS = {"sweep": sweep, "status": status, "cancel": cancel}


# words ------------------------------------------------------------------------------------------------------


def read(words: Sequence[str]) -> tuple[Job, dict[str, str]]:
    """What SLURM is asked for, and the words that are the run's. Raises ValueError for what is neither."""
    said: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ValueError(
                f"{word!r} is not key=value; commands are {', '.join(COMMANDS)}; `--help` is the manual"
            )
        said[name.removeprefix("--")] = value
    types = {item.name: str(item.type) for item in fields(Job)}
    site = read_site(said.pop("site", None))
    if unknown := [name for name in site if name not in types]:
        raise ValueError(f"{unknown[0]} is not a key of the site's file; there are {', '.join(types)}")
    job = Job()
    mine = {name: value for name, value in said.items() if name in types}
    for name, given in {**site, **mine}.items():
        setattr(job, name, parse(name, given, types[name]))
    for name in ("nodes", "ranks"):
        if getattr(job, name) < 1:
            raise ValueError(f"{name}={getattr(job, name)} must be at least 1")
    if job.launcher not in ("torchrun", "srun"):
        raise ValueError(f"launcher={job.launcher} is neither torchrun nor srun")
    return job, {name: value for name, value in said.items() if name not in types}


def read_site(path: str | None) -> dict[str, object]:
    """The site's file: texts, and lists of texts."""
    file = Path(path or SITE).expanduser()
    if not file.is_file():
        if path:
            raise ValueError(f"site={path}: there is no such file")
        return {}
    try:
        content = yaml.load(
            file.read_text(), Loader=yaml.BaseLoader
        )  # all as texts: YAML's own 24:00:00 is the number 86400
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold `key: value` lines")
    return content


def parse(name: str, value: object, kind: str) -> object:
    """A text, or from the site's file a list of them, as the field of Job wants it."""
    if kind == "list[str]":
        return [str(part) for part in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, str):
        if kind == "int" and value.isdecimal():
            return int(value)
        if kind == "bool" and value in ("true", "false"):
            return value == "true"
        if kind == "str" and value.isprintable():
            return value
    raise ValueError(
        f"{name}={value} is not {dict(int='a number', bool='true or false').get(kind, 'a line of text')}"
    )


def runs_of(said: Mapping[str, str], many: bool) -> tuple[Path, list[Run]]:
    """The folder of the job and the runs in it: one, or in a sweep each combination."""
    said = dict(said)
    folder = Path(
        said.pop("run_dir", "")
        or f"runs/{name_of(said)}/{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    )
    if not str(folder).isprintable() or "\\" in str(folder):
        raise ValueError(f"run_dir={str(folder)!r}: SLURM cannot name its output file so; choose another")
    if not many:
        return folder, [Run([f"{name}={value}" for name, value in said.items()], folder)]
    lists = {name: values for name, value in said.items() if len(values := split(value)) > 1}
    if not lists:
        raise ValueError("a sweep needs a list, such as optim.lr=1e-3,3e-4")
    runs = []
    for index, combination in enumerate(itertools.product(*lists.values())):
        chosen = dict(zip(lists, combination, strict=True))
        title = re.sub(r"[^\w.=+-]", "_", "-".join(f"{name}={value}" for name, value in chosen.items()))
        runs.append(
            Run(
                [f"{name}={value}" for name, value in {**said, **chosen}.items()],
                folder / f"{index}-{title[:100]}",
            )
        )
    return folder, runs


def split(value: str) -> list[str]:
    """A value at its commas, but for those in brackets."""
    parts, depth = [""], 0
    for letter in value:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def name_of(said: Mapping[str, str]) -> str:
    """The recipe's name, for folders and lists."""
    return re.sub(r"[^\w.-]", "_", Path(said.get("recipe", "").partition(":")[0]).stem) or "rankzero"


def check(run: Run, job: Job) -> None:
    """Let launch/run.py check the words of a run for the ranks that it will have. Raises ValueError with what
    it says.
    """
    world = {
        "RANK": "0",
        "WORLD_SIZE": str(job.nodes * job.ranks_per_node),
        "LOCAL_WORLD_SIZE": str(job.ranks_per_node),
    }
    command = [
        sys.executable,
        str(HOME / "launch" / "run.py"),
        "--check",
        *run.words,
        f"run_dir={run.folder}",
    ]
    ended = subprocess.run(command, env={**os.environ, **world}, capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"the check ended with {ended.returncode}"]
        raise ValueError(lines[-1].removeprefix("rankzero: "))


# SLURM ------------------------------------------------------------------------------------------------------


def slurm(*command: str) -> str:
    """What a command of SLURM prints. Raises ValueError with what it complains of."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError(
            f"there is no {command[0]} here: run this where SLURM is, or add dry_run=true"
        ) from None
    if ended.returncode:
        raise ValueError(ended.stderr.strip() or f"{command[0]} ended with {ended.returncode}")
    return ended.stdout.strip()


def rows(number: str) -> list[dict[str, str]]:
    """What SLURM knows of a job, or of each task of an array; empty when it has forgotten it."""
    names = {"job": "%i", "state": "%T", "time": "%M", "nodes": "%N", "reason": "%r"}
    form = "|".join(names.values())
    try:
        listed = slurm(
            "squeue", "--noheader", "--array", "--states=all", f"--jobs={number}", f"--format={form}"
        )
    except ValueError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    return [dict(zip(names, line.split("|"), strict=True)) for line in listed.splitlines()]


def found(words: Sequence[str]) -> tuple[Path, str]:
    """The run directory that is the only word, and its job."""
    if len(words) != 1:
        raise ValueError("name one run directory, such as runs/gpt/20260101-120000")
    number = number_of(Path(words[0]))
    if number is None:
        raise ValueError(f"{words[0]} was not queued by submit.py: it has no {NUMBER}")
    return Path(words[0]), number


def follow(number: str, folder: Path) -> int:
    """Print what a job prints until it has ended; returns 0 if it succeeded."""
    shown: dict[str, int] = {}
    before = ""
    try:
        while True:
            known = rows(number)
            states = ", ".join(
                sorted({f"{row['state']} ({row['reason']})" for row in known if row["state"] == "PENDING"})
            )
            if states and states != before:
                print(f"rankzero: job {number} is {states}", file=sys.stderr, flush=True)
            before = states
            for text in news(folder, number, shown):
                print(text, end="", flush=True)
            if not any(row["state"] in ALIVE for row in known):
                break
            time.sleep(POLL)
    except KeyboardInterrupt:
        print(
            f"\nrankzero: job {number} goes on; python slurm/submit.py cancel {folder} ends it",
            file=sys.stderr,
        )
        return 130
    print(
        f"rankzero: job {number} is {', '.join(sorted({row['state'] for row in known})) or 'gone'}",
        file=sys.stderr,
    )
    return int(any(row["state"] != "COMPLETED" for row in known))


def news(folder: Path, number: str, shown: dict[str, int]) -> Iterator[str]:
    """What the job's files have got since the last time."""
    for path in sorted(folder.glob(f"slurm-{number}*.out")):
        with path.open("rb") as file:
            file.seek(shown.get(path.name, 0))
            content = file.read()
            shown[path.name] = file.tell()
        yield content.decode(errors="replace")


def progress(folder: Path) -> str:
    """How far a run is, by its own files."""
    ending = {
        "failure.json": "failed",
        "stopped.json": "stopped, to be continued",
        "model.safetensors": "done",
    }
    words = next((said for name, said in ending.items() if (folder / name).is_file()), "")
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # it is being written
            continue
        if "loss" in row:
            return f"step {row['step']}, loss {row['loss']:.4g}{f', {words}' if words else ''}"
    return words or "no step yet"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
