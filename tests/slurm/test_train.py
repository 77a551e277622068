"""Real trainings under a real SLURM of two nodes: the numbers stay those of one process, whatever happens to
the job.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.launch.processes import ROOT, TINY
from tests.launch.runs import metric_values, uninterrupted_losses
from tests.slurm.cluster import ENDED, SCRIPT, Cluster, until

ARGS = ("batch_size=32", "micro_batch_size=16", "workers=0", "checkpoint.every_minutes=null")
FIT = (f"recipe={TINY}:Fit", "size=64", "steps=6", *ARGS)
LONG = (f"recipe={TINY}:Broken", "size=64", "checkpoint.every=5", *ARGS)
NODES = "--nodes=2 --cpus-per-task=1"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process without SLURM."""
    return uninterrupted_losses(tmp_path_factory.mktemp("alone") / "run", *FIT)


def steps(run_dir: Path) -> int:
    """The optimizer steps that are recorded."""
    return len(metric_values(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def start_training(cluster: Cluster, folder: Path, *args: str, options: str = NODES) -> str:
    """A long training on two nodes that is under way."""
    number = cluster.submit(*LONG, "run_dir=run", *args, cwd=folder, options=options)
    until(lambda: steps(folder / "run") > 5 or cluster.job(number)["JobState"] in ENDED, "the run trains")
    assert cluster.job(number)["JobState"] == "RUNNING", cluster.messages(number)
    return number


@pytest.mark.parametrize(
    "args",
    [("strategy=ddp",), ("strategy=fsdp",), ("strategy=zero3",), ("strategy=ddp", "launcher=srun")],
    ids=" ".join,
)
def test_two_nodes_train_as_one_process(
    cluster: Cluster, alone: list[float], tmp_path: Path, args: tuple[str, ...]
) -> None:
    number = cluster.submit(*FIT, "run_dir=run", *args, cwd=tmp_path, options=NODES)
    printed = cluster.done(number)
    assert "2 rank(s) on 2 node(s)" in printed
    assert metric_values(tmp_path / "run") == pytest.approx(
        alone, rel=1e-5
    )  # fp32: the ranks' sums are added in another order


def test_srun_within_salloc(cluster: Cluster, alone: list[float], tmp_path: Path) -> None:
    run = (
        "srun",
        "--ntasks-per-node=1",
        "python",
        str(ROOT / "launch" / "run.py"),
        *FIT,
        "strategy=ddp",
        "run_dir=run",
    )
    ended = cluster.call("salloc", "--nodes=2", *run, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert metric_values(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


def test_a_requeued_run_goes_on_bit_by_bit(cluster: Cluster, tmp_path: Path) -> None:
    """Both by `scontrol requeue`, which says TERM to all, and by a signal; with data workers, which hear the
    signals, too.
    """
    args = ("steps=60", "workers=1")
    number = start_training(cluster, tmp_path, *args, "pause=0.1")
    cluster.ask("scontrol", "requeue", number)
    assert cluster.wait(number, "PENDING")["Restarts"] == "1"
    before = steps(tmp_path / "run")
    cluster.wait(number, "RUNNING")
    until(lambda: steps(tmp_path / "run") > before, "the run goes on")
    cluster.ask("scancel", "--signal=USR1", number)
    assert cluster.wait(number, "COMPLETED")["Restarts"] == "2"
    stops = cluster.messages(number)
    assert [line.partition(";")[0] for line in stops] == [
        "rankzero: stopped (SIGTERM)",
        "rankzero: stopped (SIGUSR1)",
    ]
    assert metric_values(tmp_path / "run") == uninterrupted_losses(
        tmp_path / "straight", *LONG, *args, ranks=2
    )


def test_a_cancelled_run_is_over(cluster: Cluster, tmp_path: Path) -> None:
    number = start_training(cluster, tmp_path, "steps=1000", "pause=0.1")
    cluster.ask("scancel", number)
    assert cluster.wait(number, "CANCELLED")["Restarts"] == "0"
    until(lambda: not cluster.tasks(), "nothing is left running")


def test_a_time_limit_is_met(cluster: Cluster, tmp_path: Path) -> None:
    """A minute, the shortest that SLURM knows: the run, which has not saved yet and leaves time for it, stops
    at a third. On a machine so slow that it does not train by then, SLURM's SIGTERM at the limit stops it.
    """
    args = (*LONG, "checkpoint.every=1000", "steps=180", "pause=0.1", "run_dir=run")
    number = cluster.submit(*args, cwd=tmp_path, options=f"{NODES} --time=1")
    cluster.wait(number, "RUNNING")
    running_since = time.monotonic()
    until(lambda: steps(tmp_path / "run") > 0, "the run trains")
    in_time = time.monotonic() < running_since + 15
    until((tmp_path / "run" / "stopped.json").exists, "the run stops")
    cluster.wait(number, "PENDING")
    cluster.ask("scontrol", "update", f"JobId={number}", "TimeLimit=60")  # one more attempt is enough
    job = cluster.wait(number, "COMPLETED")
    assert job["Restarts"] == "1"
    assert steps(tmp_path / "run") == 180
    (stopped,) = cluster.messages(number)
    assert stopped.startswith("rankzero: stopped (")
    if in_time:
        assert stopped.startswith("rankzero: stopped (its time is up)")
        assert "DUE TO TIME LIMIT" not in Path(job["StdOut"]).read_text()


def test_a_node_is_drained(cluster: Cluster, stub: Path, tmp_path: Path) -> None:
    """What runs on it ends there; what comes next waits until it is back."""
    number = start_training(cluster, tmp_path, "steps=40", "pause=0.1")
    cluster.ask("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    after = cluster.submit("launcher=srun", cwd=tmp_path, home=stub, options=NODES)
    cluster.done(number)
    assert steps(tmp_path / "run") == 40
    assert cluster.job(after)["JobState"] == "PENDING"
    cluster.ask("scontrol", "update", "NodeName=n2", "State=RESUME")
    cluster.done(after)


def test_the_script_is_short() -> None:
    """Short, and no count is written in it."""
    code = [line for line in SCRIPT.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) <= 50
