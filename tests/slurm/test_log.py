"""What the log of a job holds: our lines, and none of torchrun's reports. Real trainings under a real SLURM.

The log of a run that met its time limit, or was requeued, is read by test_train.py.
"""

from __future__ import annotations

from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.test_train import FIT, LONG, NODES, start_training, steps


def test_a_mistake_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    number = cluster.submit(*FIT, "optm.lr=1", "run_dir=run", cwd=tmp_path, options=NODES)
    # 143: the other node, if it was not as far as that when SLURM's SIGTERM came
    assert cluster.wait(number, "FAILED")["ExitCode"] in ("2:0", "143:0")
    (message,) = cluster.messages(number)
    assert message.startswith("rankzero: optm.lr is not a key of recipe ")
    assert not (tmp_path / "run").exists()


def test_a_failure_in_the_recipe_is_reported_once(cluster: Cluster, tmp_path: Path) -> None:
    number = cluster.submit(*LONG, "steps=9", "fail=raise", "run_dir=run", cwd=tmp_path, options=NODES)
    # 143: the other rank, if SLURM's SIGTERM for all of them comes first
    assert cluster.wait(number, "FAILED")["ExitCode"] in ("1:0", "143:0")
    (message,) = cluster.messages(number)
    assert message.startswith("rankzero: rank 1 on ")
    assert message.endswith("step 3, forward: LookupError: the shelf is empty")
    assert (tmp_path / "run" / "failure.json").exists()


def test_a_preempted_job_says_that_it_stopped(cluster: Cluster, stub: Path, tmp_path: Path) -> None:
    number = start_training(cluster, tmp_path, "steps=60", "pause=0.1")
    urgent = "--partition=urgent --nodes=2 --exclusive"
    cluster.done(cluster.submit("launcher=srun", cwd=tmp_path, home=stub, options=urgent))
    assert cluster.wait(number, "COMPLETED")["Restarts"] == "1"
    assert steps(tmp_path / "run") == 60
    (message,) = cluster.messages(number)
    assert message.startswith("rankzero: stopped (SIGTERM)")
