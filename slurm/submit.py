"""Queue a run, or a sweep of runs, on SLURM.

    rankzero submit nodes=2 gpus=8 recipe=gpt batch_size=256 strategy=zero3
    rankzero submit gpus=8 recipe=gpt dry_run=true     print the script
    rankzero submit sweep gpus=1 recipe=gpt optim.lr=1e-3,3e-4 seed=1,2
    rankzero submit status runs/gpt/20260101-120000    how far it is
    rankzero submit cancel runs/gpt/20260101-120000

A sweep of two learning rates and two seeds is one array job of four runs.

All keys but the options below are those of `rankzero train`, which are checked before anything is queued.

In a sweep each value with commas is a list (brackets protect them: optim.betas=[0.9,0.95] is one value), and
each combination a run of its own below run_dir. The script is kept as RUN_DIR/job.sbatch;
`sbatch RUN_DIR/job.sbatch` continues the run. The site's file holds any of the options, lists as YAML writes
them: `modules: [cuda/12.4]`.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.cli import help
from launch.cli.command import HELP, Arguments, NoOptions, read_arguments, report_mistakes
from launch.cli.keys import build, check_known, keys_of, parse_value, read_argv, read_yaml
from launch.cli.resolve import resolve
from launch.runtime.exit_codes import ExitCode
from launch.runtime.world import World
from launch.training.run_dir import find_run_dir
from slurm.job_status import call_slurm, follow_job, query_job, run_progress
from slurm.script import JOB_ID_FILE, SCRIPT_FILE, JobOptions, QueuedRun, job_id_of, make_script

SITE_FILE = Path("~/.config/rankzero/slurm.yaml")
EXITS = {
    ExitCode.DONE: "queued; with follow=true, the job succeeded",
    ExitCode.FAILED: "the job that was followed failed",
    ExitCode.INTERRUPTED: "Ctrl-C while following; the job goes on",
}


def main(argv: list[str]) -> int:
    """Do what `argv` asks for; returns the exit code."""
    if not argv or any(argument in HELP for argument in argv):
        print(help.page(__doc__ or "", JobOptions, exits=EXITS))
        return ExitCode.DONE
    with report_mistakes(kinds=(ValueError, OSError)):
        if argv[0] in ("status", "cancel"):
            arguments = read_arguments(argv[1:], NoOptions, name=argv[0], positional=("RUN_DIR",))
            return status(arguments) if argv[0] == "status" else cancel(arguments)
        is_sweep = "sweep" in argv
        options, values = read_options([argument for argument in argv if argument != "sweep"])
        return submit(options, values, is_sweep)


def submit(options: JobOptions, values: dict[str, str], is_sweep: bool = False) -> int:
    """Check the runs, write the script, queue it; returns the exit code."""
    folder, runs = plan_runs(values, is_sweep)
    options.name = options.name or recipe_name(values)
    for run in runs if options.check else ():
        check_run(run, options)
    for run_dir in {folder, *(run.folder for run in runs)} if not options.after else ():
        refuse_busy(run_dir)
    script = make_script(options, folder, runs, is_sweep)
    if options.dry_run:
        print(script, end="")
        return ExitCode.DONE
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
    (folder / SCRIPT_FILE).write_text(script)
    job_id = call_slurm("sbatch", "--parsable", str(folder / SCRIPT_FILE)).partition(";")[0]
    (folder / JOB_ID_FILE).write_text(f"{job_id}\n")
    for index, run in enumerate(runs if is_sweep else ()):
        (run.folder / JOB_ID_FILE).write_text(f"{job_id}_{index}\n")
    print(f"job {job_id}: {f'{len(runs)} runs below {folder}' if is_sweep else folder}", flush=True)
    return follow_job(job_id, folder) if options.follow else ExitCode.DONE


def status(arguments: Arguments[NoOptions]) -> int:
    """Print what SLURM says of the job of a run directory, and what the run has written."""
    folder, job_id = submitted(arguments)
    tasks = query_job(job_id)
    for task in tasks:
        print(f"job {task.job}  {task.state}  {task.elapsed}  {task.nodes or task.reason}")
    if not tasks:
        print(f"job {job_id}  SLURM has forgotten it: it ended a while ago")
    inside = sorted(path.parent for path in folder.glob(f"*/{JOB_ID_FILE}"))
    for run_dir in inside or [folder]:
        print(f"{run_dir}  {run_progress(run_dir)}")
    return ExitCode.DONE


def cancel(arguments: Arguments[NoOptions]) -> int:
    """End the job of a run directory, for good."""
    folder, job_id = submitted(arguments)
    running = not all(task.has_ended for task in query_job(job_id))
    if running:
        call_slurm("scancel", job_id)
    print(f"job {job_id} of {folder} {'is cancelled' if running else 'had ended already'}")
    return ExitCode.DONE


def submitted(arguments: Arguments[NoOptions]) -> tuple[Path, str]:
    """The run directory that the command names, and its job. Raises ValueError if it has none."""
    folder = Path(arguments.positional[0])
    job_id = job_id_of(folder)
    if job_id is None:
        raise ValueError(f"{folder} was not queued by `rankzero submit`: it has no {JOB_ID_FILE}")
    return folder, job_id


# the command line -------------------------------------------------------------------------------------------


def read_options(argv: Sequence[str]) -> tuple[JobOptions, dict[str, str]]:
    """What SLURM is asked for, and the keys of the run as texts. Raises ValueError.

    The last of defaults, site file and command line wins.
    """
    known = {key.name: key for key in keys_of(JobOptions)}
    values = read_argv(argv)
    given = {**read_site(values.get("site", "")), **{name: values[name] for name in values if name in known}}
    check_known(given, known, "the site's file")
    parsed: dict[str, Any] = {
        name: parse_value(value, known[name]) if isinstance(value, str) else value
        for name, value in given.items()
    }
    return build(JobOptions, parsed), {name: text for name, text in values.items() if name not in known}


def read_site(path: str) -> dict[str, Any]:
    """The site's file: texts, as on the command line, and lists of texts. Raises ValueError."""
    file = Path(path or SITE_FILE).expanduser()
    if not path and not file.is_file():
        return {}
    return read_yaml(str(file), "site", as_text=True)  # 24:00:00 is the number 86400 in YAML


# the runs ---------------------------------------------------------------------------------------------------


def plan_runs(values: dict[str, str], is_sweep: bool) -> tuple[Path, list[QueuedRun]]:
    """The folder of the job and the runs in it: one, or in a sweep each combination. Raises ValueError."""
    mark = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    values = dict(values)
    folder = Path(values.pop("run_dir", "") or f"runs/{recipe_name(values)}/{mark}")
    if not str(folder).isprintable() or "\\" in str(folder):
        raise ValueError(f"run_dir={str(folder)!r}: SLURM cannot name its output file so; choose another")
    if not is_sweep:
        return folder, [QueuedRun([f"{name}={value}" for name, value in values.items()], folder)]
    lists = {name: parts for name, value in values.items() if len(parts := split_commas(value)) > 1}
    if not lists:
        raise ValueError("a sweep needs a list, such as optim.lr=1e-3,3e-4")
    runs = []
    for index, combination in enumerate(itertools.product(*lists.values())):
        chosen = dict(zip(lists, combination, strict=True))
        title = re.sub(r"[^\w.=+-]", "_", "-".join(f"{name}={value}" for name, value in chosen.items()))
        argv = [f"{name}={value}" for name, value in {**values, **chosen}.items()]
        runs.append(QueuedRun(argv, folder / f"{index}-{title[:100]}"))
    return folder, runs


def split_commas(value: str) -> list[str]:
    """A value at its commas, except for those in brackets."""
    parts, depth = [""], 0
    for letter in value:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def recipe_name(values: dict[str, str]) -> str:
    """The recipe's name, for folders and for the job."""
    return re.sub(r"[^\w.-]", "_", Path(values.get("recipe", "").partition(":")[0]).stem) or "rankzero"


def check_run(run: QueuedRun, options: JobOptions) -> None:
    """Check the keys of a run for the ranks that it will have, as the run itself does. Raises ValueError."""
    local = options.ranks_per_node
    world = World(world_size=options.nodes * local, local_world_size=local, launcher=options.launcher)
    own = {key.name: key for key in keys_of(JobOptions)}
    find_run_dir(resolve([*run.argv, f"run_dir={run.folder}"], world, own))


def refuse_busy(run_dir: Path) -> None:
    """Raise ValueError if a job that has not ended uses the run directory."""
    job_id = job_id_of(run_dir)
    running = [task for task in query_job(job_id) if not task.has_ended] if job_id else []
    if running:
        raise ValueError(
            f"{run_dir} is in use by job {job_id}, which is {running[0].state}; wait, cancel it, or say "
            f"after={job_id}"
        )
