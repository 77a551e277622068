"""slurm/train.sbatch under a real SLURM: what it starts, and after which ends it is requeued. The ranks are
stub_run.py.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import CPUS, DEVICES, Cluster, environment, until

SPECIAL = ("a=a'; rm -rf x", 'b=$(touch x) `touch x` "', "c=two  words\ttab *", "d=\\n\\", "e=ä#;&|<>")
"""arguments that a shell would take for something else"""


def rank_records(run_dir: Path) -> list[dict[str, Any]]:
    """What each rank was given."""
    return [json.loads(path.read_text()) for path in sorted(run_dir.glob("rank*.json"))]


def start_waiting(
    cluster: Cluster, stub: Path, folder: Path, *args: str, options: str = "--nodes=2", ranks: int = 2
) -> str:
    """A job whose ranks wait for a signal; without the agent: its import of torch takes seconds."""
    number = cluster.submit(
        "launcher=srun", "stay=true", "run_dir=run", *args, cwd=folder, home=stub, options=options
    )
    until(lambda: len(rank_records(folder / "run")) == ranks, "all ranks are there")
    return number


def gone(cluster: Cluster, number: str) -> bool:
    """Whether nothing runs any more that the job has started."""
    return not [process for process in cluster.tasks() if environment(process).get("SLURM_JOB_ID") == number]


@pytest.mark.parametrize(
    ("launcher", "options", "ranks", "threads"),
    [
        ("srun", "--nodes=2", 1, 1),
        ("srun", "--nodes=2 --ntasks-per-node=2 --cpus-per-task=2", 2, 2),
        ("srun", "--nodes=1 --gpus-per-node=2 --cpus-per-task=4", 2, 2),
        ("srun", "--nodes=2 --gpus-per-node=2 --ntasks-per-node=2", 2, 1),
        ("srun", "--nodes=2 --gres=gpu:2 --exclusive", 2, CPUS // 2),
        ("torchrun", "--nodes=2 --gres=gpu:2 --exclusive", 2, CPUS // 2),
    ],
)
def test_a_rank_for_each_gpu_or_task(
    cluster: Cluster, stub: Path, tmp_path: Path, launcher: str, options: str, ranks: int, threads: int
) -> None:
    number = cluster.submit(
        f"launcher={launcher}", "run_dir=run", *SPECIAL, cwd=tmp_path, home=stub, options=options
    )
    cluster.done(number)
    nodes = 2 if "--nodes=2" in options else 1
    records = rank_records(tmp_path / "run")
    assert len(records) == nodes * ranks
    for index, rank in enumerate(records):
        environ = rank["environment"]
        assert rank["argv"] == [f"launcher={launcher}", "run_dir=run", *SPECIAL, "run_dir=run"]
        assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("n1", str(10000 + int(number)))
        assert environ["OMP_NUM_THREADS"] == str(threads)
        assert environ["SLURM_NODEID"] == str(index // ranks)
        if launcher == "torchrun":
            assert (environ["RANK"], environ["LOCAL_RANK"]) == (str(index), str(index % ranks))
            assert (environ["WORLD_SIZE"], environ["LOCAL_WORLD_SIZE"]) == (str(nodes * ranks), str(ranks))
        else:
            assert (environ["SLURM_PROCID"], environ["SLURM_LOCALID"]) == (str(index), str(index % ranks))
            assert environ["SLURM_STEP_NUM_TASKS"] == str(nodes * ranks)
    assert {path.name for path in tmp_path.iterdir()} == {"run", f"rankzero-{number}.out"}


def test_a_port_that_is_taken_is_passed_over(cluster: Cluster, stub: Path, tmp_path: Path) -> None:
    number = cluster.submit("launcher=srun", cwd=tmp_path, home=stub, options="--hold")
    with socket.create_server(("0.0.0.0", 10000 + int(number))):
        cluster.ask("scontrol", "release", number)
        cluster.done(number)
    (rank,) = rank_records(tmp_path / "runs" / f"slurm-{number}")
    assert rank["environment"]["MASTER_PORT"] == str(10001 + int(number))


def test_an_image_is_run_in(
    cluster: Cluster, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apptainer is not in Debian: what stands in for it notes its arguments and does without the image."""
    stand_in = tmp_path / "bin" / "apptainer"
    stand_in.parent.mkdir()
    lines = ("#!/bin/bash", f'echo "$@" > {tmp_path}/arguments', "until [[ $1 == *.sif ]]; do shift; done")
    stand_in.write_text("\n".join([*lines, "shift", 'exec "$@"', ""]))
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("RANKZERO_CONTAINER", "torch.sif")
    cluster.done(cluster.submit("launcher=srun", "run_dir=run", cwd=tmp_path, home=stub))
    assert (tmp_path / "arguments").read_text().startswith(f"exec --nv --bind {tmp_path} torch.sif python ")
    assert len(rank_records(tmp_path / "run")) == 1


def test_an_unknown_launcher_is_a_mistake(cluster: Cluster, stub: Path, tmp_path: Path) -> None:
    number = cluster.submit("launcher=mpi", cwd=tmp_path, home=stub)
    assert cluster.wait(number, "FAILED")["ExitCode"] == "2:0"
    assert "launcher=mpi is neither" in (tmp_path / f"rankzero-{number}.out").read_text()


# stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["USR1", "USR2", "TERM", "USR1 --batch", "TERM --batch"])
def test_a_stop_on_purpose_is_requeued(cluster: Cluster, stub: Path, tmp_path: Path, sent: str) -> None:
    number = start_waiting(cluster, stub, tmp_path)
    cluster.ask("scancel", *f"--signal={sent}".split(), number)
    job = cluster.wait(number, "COMPLETED")
    assert job["Restarts"] == "1"
    assert {rank["attempt"] for rank in rank_records(tmp_path / "run")} == {"second"}
    assert not (tmp_path / "run" / "stopped.json").exists()


def test_a_run_that_misses_its_time_limit_saves_after_it(
    cluster: Cluster, stub: Path, tmp_path: Path
) -> None:
    """SLURM says TERM then, and kills KillWait seconds later."""
    number = start_waiting(cluster, stub, tmp_path, options="--nodes=2 --time=5")
    end = int(rank_records(tmp_path / "run")[0]["environment"]["SLURM_JOB_END_TIME"])
    assert end == pytest.approx(time.time() + 300, abs=30)
    cluster.ask("scontrol", "update", f"JobId={number}", "EndTime=now+1seconds")
    assert cluster.wait(number, "COMPLETED")["Restarts"] == "1"
    assert "DUE TO TIME LIMIT" in (tmp_path / f"rankzero-{number}.out").read_text()


def test_a_preempted_run_saves_and_comes_back(cluster: Cluster, stub: Path, tmp_path: Path) -> None:
    number = start_waiting(
        cluster, stub, tmp_path, options="--nodes=2 --exclusive", ranks=2 * len(DEVICES)
    )  # the GPUs, too
    urgent = cluster.submit(cwd=tmp_path, home=stub, options="--partition=urgent --nodes=2 --exclusive")
    cluster.done(urgent)
    assert cluster.wait(number, "COMPLETED")["Restarts"] == "1"
    assert {rank["attempt"] for rank in rank_records(tmp_path / "run")} == {"second"}


def test_a_cancelled_run_does_not_come_back(cluster: Cluster, stub: Path, tmp_path: Path) -> None:
    number = start_waiting(cluster, stub, tmp_path)
    cluster.ask("scancel", number)
    job = cluster.wait(number, "CANCELLED")
    assert (tmp_path / "run" / "saved").exists()
    assert job["Restarts"] == "0"
    until(lambda: gone(cluster, number), "nothing is left running")


def test_a_failure_is_not_requeued(cluster: Cluster, stub: Path, tmp_path: Path) -> None:
    """Not even if an earlier life has left its note."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stopped.json").write_text("{}")
    number = cluster.submit(
        "launcher=srun", "run_dir=run", "fail=true", cwd=tmp_path, home=stub, options="--nodes=2"
    )
    job = cluster.wait(number, "FAILED")
    # 143: the other rank, which srun has ended before it came that far
    assert job["ExitCode"] in ("1:0", "143:0")
    assert job["Restarts"] == "0"


def test_a_job_that_may_not_come_back_says_so(cluster: Cluster, stub: Path, tmp_path: Path) -> None:
    number = start_waiting(cluster, stub, tmp_path, options="--nodes=2 --no-requeue")
    cluster.ask("scancel", "--signal=USR1", number)
    job = cluster.wait(number, "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("75:0", "0")
    assert (
        "not requeued; the same command with run_dir=run continues it"
        in (tmp_path / f"rankzero-{number}.out").read_text()
    )


def test_one_task_of_an_array_stops_alone(cluster: Cluster, stub: Path, tmp_path: Path) -> None:
    """The last task of an array has the number of the whole."""
    number = cluster.submit(
        "launcher=srun", "stay=true", cwd=tmp_path, home=stub, options="--array=0-2 --nodes=1"
    )
    runs = [tmp_path / "runs" / f"slurm-{number}_{index}" for index in range(3)]
    until(lambda: all((run / "rank0.json").exists() for run in runs), "all tasks are there")
    ports = {rank_records(run)[0]["environment"]["MASTER_PORT"] for run in runs}
    assert len(ports) == 3
    cluster.ask("scancel", "--signal=USR1", f"{number}_2")
    assert cluster.wait(f"{number}_2", "COMPLETED")["Restarts"] == "1"
    for index in (0, 1):
        job = cluster.job(f"{number}_{index}")
        assert (job["JobState"], job["Restarts"]) == ("RUNNING", "0")
    cluster.ask("scancel", number)
    until(lambda: not cluster.tasks(), "nothing is left running")
