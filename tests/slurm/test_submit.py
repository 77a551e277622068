"""`rankzero submit` under a real SLURM. The runs are stub_run.py, except in one sweep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.processes import TINY
from tests.slurm.cluster import TIMEOUT_S, Cluster, until

SUBMIT = (sys.executable, "-m", "launch", "submit")
TRAIN = (f"recipe={TINY}:Fit", "steps=2", "workers=0")


def submit(cluster: Cluster, folder: Path, *args: str, code: int = 0) -> str:
    """What `rankzero submit` prints, which has to end with `code`."""
    ended = cluster.call(*SUBMIT, *args, cwd=folder)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout if code == 0 else ended.stderr


def number_in(folder: Path) -> str:
    """The job of a run directory."""
    return (folder / "job.number").read_text().strip()


@pytest.fixture
def site(stub: Path, tmp_path: Path) -> str:
    """The argument for a site's file with which stub_run.py is what runs."""
    file = tmp_path / "site.yaml"
    lines = ("check: false", "launcher: srun", "time: 24:00:00", "setup:", f"- export RANKZERO_HOME={stub}")
    file.write_text("\n".join([*lines, "- export FROM_SITE=yes", ""]))
    return f"site={file}"


def test_arguments_arrive_and_the_status_is_shown(cluster: Cluster, site: str, tmp_path: Path) -> None:
    special = ("a=a'; rm -rf x", 'b=$(touch x)`touch x`"')
    printed = submit(
        cluster, tmp_path, site, "nodes=2", "cpus=2", "name=a b #c", "run_dir=my runs/x", *special
    )
    number = number_in(tmp_path / "my runs/x")
    assert printed == f"job {number}: my runs/x\n"
    job = cluster.wait(number, "COMPLETED")
    assert (job["TimeLimit"], job["NumNodes"], job["CPUs/Task"]) == ("1-00:00:00", "2", "2")
    rank = json.loads((tmp_path / "my runs/x/rank1.json").read_text())
    assert rank["argv"] == [*special, "launcher=srun", "run_dir=my runs/x", "run_dir=my runs/x"]
    assert rank["environment"]["SLURM_JOB_NAME"] == "a b #c"
    status = submit(cluster, tmp_path, "status", "my runs/x").splitlines()
    assert status[0].startswith(f"job {number}  COMPLETED")
    assert status[1] == "my runs/x  no step yet"
    again = cluster.ask("sbatch", "--parsable", "my runs/x/job.sbatch", cwd=tmp_path)
    cluster.wait(again, "COMPLETED")


def test_a_dry_run_prints_the_script_and_does_nothing(cluster: Cluster, site: str, tmp_path: Path) -> None:
    printed = submit(
        cluster, tmp_path, site, "dry_run=true", "gpus=2", "nodes=2", "cpus=3", "recipe=gpt", "run_dir=run"
    )
    for line in (
        "--gpus-per-node=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=6",
        "--time=24:00:00",
        f"--chdir={tmp_path}",
    ):
        assert f"#SBATCH {line}\n" in printed
    assert "set -- recipe=gpt launcher=srun run_dir=run\n" in printed
    assert not (tmp_path / "run").exists()
    subprocess.run(["bash", "-n"], input=printed, text=True, check=True)


def test_what_comes_after_waits_until_a_stopped_run_is_done(
    cluster: Cluster, site: str, tmp_path: Path
) -> None:
    submit(cluster, tmp_path, site, "stay=true", "run_dir=first")
    submit(cluster, tmp_path, site, "after=first", "run_dir=second")
    first, second = number_in(tmp_path / "first"), number_in(tmp_path / "second")
    until((tmp_path / "first/rank0.json").exists, "the first runs")
    cluster.ask("scancel", "--signal=USR1", first)
    cluster.wait(first, "PENDING")
    assert cluster.job(second)["Reason"] == "Dependency"
    assert cluster.wait(first, "COMPLETED")["Restarts"] == "1"
    cluster.wait(second, "COMPLETED")


def test_what_comes_after_a_failure_is_dropped(cluster: Cluster, site: str, tmp_path: Path) -> None:
    submit(cluster, tmp_path, site, "fail=true", "run_dir=first", "sbatch=--hold")
    submit(cluster, tmp_path, site, "after=first", "run_dir=second")
    cluster.ask("scontrol", "release", number_in(tmp_path / "first"))
    cluster.wait(number_in(tmp_path / "second"), "CANCELLED")


def test_cancel_and_a_run_directory_in_use(cluster: Cluster, site: str, tmp_path: Path) -> None:
    submit(cluster, tmp_path, site, "stay=true", "run_dir=run")
    number = number_in(tmp_path / "run")
    until((tmp_path / "run/rank0.json").exists, "it runs")
    assert "run is in use by job" in submit(cluster, tmp_path, site, "run_dir=run", code=2)
    assert submit(cluster, tmp_path, "cancel", "run") == f"job {number} of run is cancelled\n"
    cluster.wait(number, "CANCELLED")
    assert submit(cluster, tmp_path, "cancel", "run") == f"job {number} of run had ended already\n"


def test_follow_prints_and_ends_with_the_job(cluster: Cluster, site: str, tmp_path: Path) -> None:
    printed = submit(cluster, tmp_path, site, "follow=true", "run_dir=run")
    assert printed.startswith(f"job {number_in(tmp_path / 'run')}: run\n")
    assert "cpu binding" in printed  # srun's own words, here the only ones
    err = submit(cluster, tmp_path, site, "follow=true", "fail=true", "run_dir=failing", code=1)
    assert err.endswith("is FAILED\n")


def test_ctrl_c_leaves_the_job_alone(cluster: Cluster, site: str, tmp_path: Path) -> None:
    command = [*SUBMIT, site, "follow=true", "stay=true", "run_dir=run"]
    following = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=cluster.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # who tests in the background ignores it
    )
    until((tmp_path / "run/rank0.json").exists, "it runs")
    os.kill(following.pid, signal.SIGINT)
    _, err = following.communicate(timeout=TIMEOUT_S)
    assert following.returncode == 130, err
    assert "goes on" in err
    assert cluster.job(number_in(tmp_path / "run"))["JobState"] == "RUNNING"


def test_a_sweep_is_an_array_of_runs(cluster: Cluster, tmp_path: Path) -> None:
    submit(cluster, tmp_path, "sweep", "check=false", *TRAIN, "lr=1e-3,1e-2", "seed=1,2", "run_dir=sweep")
    number = number_in(tmp_path / "sweep")
    seen = set()
    for index in range(4):
        cluster.wait(f"{number}_{index}", "COMPLETED")
    for run in sorted((tmp_path / "sweep").glob("*/config.yaml")):
        text = run.read_text()
        seen.add(
            (
                run.parent.name,
                next(line for line in text.splitlines() if line.startswith("lr:")),
                "seed: 1\n" in text,
            )
        )
    assert seen == {
        ("0-lr=1e-3-seed=1", "lr: 0.001", True),
        ("1-lr=1e-3-seed=2", "lr: 0.001", False),
        ("2-lr=1e-2-seed=1", "lr: 0.01", True),
        ("3-lr=1e-2-seed=2", "lr: 0.01", False),
    }
    status = submit(cluster, tmp_path, "status", "sweep").splitlines()
    assert len(status) == 8
    assert all("step 2, loss" in line and line.endswith("done") for line in status[4:])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nodes=two",), "nodes=two is not int (default: 1)"),
        (("nodes=0",), "nodes=0 must be 1 or more"),
        (("launcher=mpi",), "launcher=mpi is not torchrun|srun"),
        (("recipe=gpt", "partition=nowhere"), "invalid partition"),
        (("sweep", "recipe=gpt"), "a sweep needs a list"),
        (("gpt",), "'gpt' is not key=value"),
        (("site=nowhere.yaml",), "there is no such file"),
    ],
)
def test_a_mistake_is_one_line(cluster: Cluster, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    assert_one_line(submit(cluster, tmp_path, *args, "check=false", code=2), message)


def test_a_run_directory_without_a_job_is_a_mistake(cluster: Cluster, tmp_path: Path) -> None:
    assert_one_line(submit(cluster, tmp_path, "status", "nowhere", code=2), "nowhere was not queued by")
    assert_one_line(submit(cluster, tmp_path, "cancel", code=2), "cancel takes RUN_DIR")


def test_a_wrong_key_of_the_site_file_is_named(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("partitoin: gpu\n")
    err = submit(cluster, tmp_path, "recipe=gpt", "site=site.yaml", code=2)
    assert_one_line(err, "partitoin is not a key of the site's file; did you mean partition?")


def assert_one_line(err: str, message: str) -> None:
    """A mistake is reported in one line."""
    assert err.startswith("rankzero: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ("sweep", "gpus=8", "lr=1e-3,1e-2"),
        ("gpus=8", "sweep", "lr=1e-3,1e-2"),
        ("gpus=8", "lr=1e-3,1e-2", "sweep"),
    ],
    ids=" ".join,
)
def test_sweep_may_stand_anywhere(cluster: Cluster, tmp_path: Path, args: tuple[str, ...]) -> None:
    printed = submit(cluster, tmp_path, *TRAIN, *args, "dry_run=true", "run_dir=sweep")
    assert "#SBATCH --array=0-1\n" in printed
    assert "lr=1e-3 launcher=torchrun run_dir=sweep/0-lr=1e-3 ;;\n" in printed


def test_help_is_made_of_the_docstrings(cluster: Cluster, tmp_path: Path) -> None:
    printed = submit(cluster, tmp_path, "--help")
    assert printed.startswith("Queue a run, or a sweep of runs, on SLURM.")
    assert "GPUs of each node; each gets a rank" in printed


def test_a_run_that_cannot_be_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """The keys of a run are checked for the ranks that it would have."""
    err = submit(cluster, tmp_path, "nodes=3", *TRAIN, "batch_size=32", code=2)
    assert err.startswith("rankzero: batch_size=32 cannot be cut into equal parts over 3 rank(s)")
    assert not (tmp_path / "runs").exists()
    submit(cluster, tmp_path, "dry_run=true", "nodes=2", *TRAIN, "batch_size=32")
