"""The elastic agent of `rankzero train nproc=N`: what its ranks get, how it ends, and what it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.commands import train
from launch.runtime.agent import check_topology
from launch.runtime.rank_exits import exit_code_of, unexplained
from tests.launch.processes import LAUNCHER_VARIABLES, ROOT, TINY, free_port
from tests.launch.runs import metric_values, uninterrupted_losses
from tests.launch.stub_home import make_stub_home

AGENT = """
import json, sys
from launch.runtime.agent import run_agent
options, *argv = sys.argv[1:]
sys.exit(run_agent(argv, **json.loads(options)))
"""
PATIENCE_S = 300.0
"""an agent imports torch: two or three seconds on an idle machine"""


def start_agent(home: Path, *argv: str, **options: object) -> subprocess.Popen[str]:
    """An agent in a process of its own, whose ranks run stub_run.py in `home`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    path = os.pathsep.join([str(home), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-c", AGENT, json.dumps(options), f"run_dir={home / 'run'}", *argv],
        cwd=home,
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_to_end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """The exit code of an agent, and the lines that it printed."""
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return process.returncode, (out + err).splitlines()


def ranks_of(home: Path) -> list[dict[str, Any]]:
    """What each rank wrote down."""
    return [json.loads(path.read_text()) for path in sorted((home / "run").glob("rank*.json"))]


def until(condition: Callable[[], bool]) -> None:
    """Wait for an event."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def listens(agent: subprocess.Popen[str]) -> bool:
    """Whether the agent has installed its signal handlers, which it does when it has started its ranks."""
    status = Path(f"/proc/{agent.pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def is_zombie(pid: int) -> bool:
    """Whether a process has ended, and its parent has not asked how."""
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A stub home; no rank is left running afterwards."""
    yield make_stub_home(tmp_path / "home")
    until(lambda: not any(psutil.pid_exists(rank["pid"]) for rank in ranks_of(tmp_path / "home")))


# without processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "forwarded", "code"),
    [
        ([], [], 0),
        ([0, 0], [], 0),
        ([2, 2], [], 2),
        ([75, 75], [15], 75),
        ([75, 1], [10], 1),
        ([130, 1], [2], 130),
        ([-9], [], 1),
        ([-15], [15], 143),
        ([-15], [], 1),
        ([0, 3], [], 3),
    ],
)
def test_the_exit_code_is_that_of_the_ranks(codes: list[int], forwarded: list[int], code: int) -> None:
    assert exit_code_of(codes, forwarded) == code


def test_only_what_nobody_has_explained_is_reported() -> None:
    assert unexplained({0: 1, 1: 2, 2: 75, 3: 130, 4: 0}, "n1") == []
    assert unexplained({0: -15}, "n1", [15]) == []
    assert unexplained({3: -9, 1: -11, 2: 7}, "n1") == [
        "rank 1 on n1 was killed by signal 11 (SIGSEGV)",
        "rank 2 on n1 ended with exit code 7",
        "rank 3 on n1 was killed by signal 9 (SIGKILL); out of memory? `dmesg` tells",
    ]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ((0, 1, 0, None), "nproc=0 must be at least 1"),
        ((1, 0, 0, None), "nnodes=0 must be at least 1"),
        ((1, 2, 2, "n1:1"), "node_rank=2 must be 0 to 1"),
        ((1, 2, 0, None), "nnodes=2 needs rendezvous=HOST:PORT"),
        ((1, 2, 0, "n1"), "rendezvous=n1 is not HOST:PORT"),
        ((1, 2, 0, "n1:99999"), "is not HOST:PORT"),
    ],
)
def test_a_topology_that_cannot_be_is_a_mistake(
    topology: tuple[int, int, int, str | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_topology(*topology)
    assert check_topology(2, 2, 1, "[::1]:29500") == ("::1", 29500)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nproc=3", "recipe=gpt"), "batch_size=32 cannot be cut into micro-batches of 8 over 3 rank(s)"),
        (("nproc=0", "recipe=gpt"), "nproc=0 must be 1 or more"),
        (("nproc=2", "nnodes=2", "recipe=gpt"), "nnodes=2 needs rendezvous=HOST:PORT"),
        (("nproc=2", "recipe=gpt", "launcher=srun"), "nproc=2 starts torchrun's agent, not launcher=srun"),
        (("nproc=2", "recipe=gpt", "debug=true"), "debug=true is one process, not 2"),
    ],
)
def test_a_mistake_is_reported_before_any_rank_is_started(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main([*args])
    assert message in capsys.readouterr().err


# with stub ranks --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_are_given_the_environment_of_torchrun(home: Path) -> None:
    nasty = ("a=${local_rank} $$ $x", "b=two  words\n")
    assert run_to_end(start_agent(home, *nasty, nproc=2)) == (0, [])
    for index, rank in enumerate(ranks_of(home)):
        assert rank["argv"] == [f"run_dir={home / 'run'}", *nasty]
        environment = rank["environment"]
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(index), str(index))
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert environment["TORCHELASTIC_RESTART_COUNT"] == "0"


@pytest.mark.slow
@pytest.mark.parametrize("code", [1, 2, 75])
def test_a_rank_that_explained_itself_ends_the_others_without_a_word(home: Path, code: int) -> None:
    process = start_agent(home, f"end=1:{code}", nproc=2)
    if code == 75:  # nobody is terminated: the other still saves, as far as the agent knows
        until(lambda: len(ranks_of(home)) == 2 and listens(process) and is_zombie(ranks_of(home)[1]["pid"]))
        process.send_signal(signal.SIGUSR1)
    assert run_to_end(process) == (code, [])


@pytest.mark.slow
def test_a_killed_rank_is_reported(home: Path) -> None:
    code, lines = run_to_end(start_agent(home, "end=1:-9", nproc=2))
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("rankzero: rank 1 on ")
    assert "was killed by signal 9 (SIGKILL)" in lines[0]


@pytest.mark.slow
def test_failed_ranks_are_restarted(home: Path) -> None:
    code, lines = run_to_end(start_agent(home, "end=1:1", nproc=2, max_restarts=2))
    assert (code, lines) == (0, ["rankzero: starting the ranks again, from the newest checkpoint"])
    assert [rank["environment"]["TORCHELASTIC_RESTART_COUNT"] for rank in ranks_of(home)] == ["1", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("code", [2, 75])
def test_a_mistake_or_a_stop_is_not_restarted(home: Path, code: int) -> None:
    assert run_to_end(start_agent(home, f"end=0:{code}", nproc=1, max_restarts=2)) == (code, [])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda it: it.name)
def test_a_signal_reaches_all_ranks_which_have_time_to_save(home: Path, number: signal.Signals) -> None:
    process = start_agent(home, "stay=true", nproc=2, max_restarts=1)
    until(lambda: len(ranks_of(home)) == 2 and listens(process))
    process.send_signal(number)
    assert run_to_end(process) == (75, [])
    assert (home / "run" / "saved").exists()
    assert [rank["received"] for rank in ranks_of(home)] == [[number], [number]]


@pytest.mark.slow
def test_ranks_end_with_an_agent_that_was_killed(home: Path) -> None:
    process = start_agent(home, "stay=true", nproc=2)
    until(lambda: len(ranks_of(home)) == 2)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    until(lambda: not any(psutil.pid_exists(rank["pid"]) for rank in ranks_of(home)))


@pytest.mark.slow
def test_agents_of_two_nodes_meet(home: Path) -> None:
    """Rank zero saves for longer than the other: the second agent waits for the first."""
    shared = {"nproc": 1, "nnodes": 2, "rendezvous": f"localhost:{free_port()}"}
    agents = [start_agent(home, "stay=true", node_rank=node, **shared) for node in (1, 0)]
    until(lambda: len(ranks_of(home)) == 2 and all(map(listens, agents)))
    for agent in agents:
        agent.send_signal(signal.SIGUSR1)
    assert [run_to_end(agent) for agent in agents] == [(75, []), (75, [])]
    assert [rank["environment"]["WORLD_SIZE"] for rank in ranks_of(home)] == ["2", "2"]


@pytest.mark.slow
def test_a_rendezvous_that_cannot_be_is_one_line(home: Path) -> None:
    shared = {"nproc": 1, "nnodes": 2, "rendezvous": f"192.0.2.1:{free_port()}"}
    code, lines = run_to_end(start_agent(home, node_rank=0, **shared))
    assert code == 1
    assert len(lines) == 1
    assert "did not meet the others: MASTER_ADDR=192.0.2.1" in lines[0]


# with real ranks --------------------------------------------------------------------------------------------


def train_command(cwd: Path, *args: str) -> tuple[int, str]:
    """The exit code of `rankzero train nproc=2`, and what it prints on stderr."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    ended = subprocess.run(
        [sys.executable, "-m", "launch", "train", "nproc=2", "size=64", "run_dir=run", "workers=0", *args],
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return ended.returncode, ended.stderr


@pytest.mark.slow
def test_two_ranks_train(tmp_path: Path) -> None:
    args = (f"recipe={TINY}:Fit", "size=64", "steps=4", "batch_size=32")
    assert train_command(tmp_path, *args) == (0, "")
    assert metric_values(tmp_path / "run") == uninterrupted_losses(tmp_path / "alone", *args, ranks=2)


@pytest.mark.slow
def test_a_failure_in_the_recipe_is_reported_once(tmp_path: Path) -> None:
    code, err = train_command(
        tmp_path, f"recipe={TINY}:Broken", "steps=4", "batch_size=32", "fail=raise", "fail_step=2"
    )
    assert code == 1
    assert "Traceback" not in err
    assert "torch.distributed.elastic" not in err
    (message,) = [line for line in err.splitlines() if line.startswith("rankzero: ")]
    assert message.endswith("step 2, forward: LookupError: the shelf is empty")
