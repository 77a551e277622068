"""`debug=true`: what it shows, that it changes no number of the run, and where its debugger stands."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.cli.resolve import resolve
from launch.runtime.world import World
from launch.state.build import prepare
from launch.state.run import Run
from launch.training.overfit import overfit
from tests.launch.processes import COMMAND_TIMEOUT_S, TINY, command_line, run_command

RECIPE = """
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from recipes.base import Recipe
from recipes.parts.data import Splits


class Net(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(12))
        self.last = nn.Linear(inputs, 1)

    def forward(self, x):
        hidden = self.first(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(hidden)


@dataclass(kw_only=True)
class Small(Recipe):
    defaults: ClassVar[dict[str, Any]] = {"batch_size": 8, "micro_batch_size": 4, "epochs": 5}
    inputs: int = 8
    lr: float = 0.01
    fail: str = "no"

    def build_data(self):
        points = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
        data = [(point, point.sum(0, keepdim=True)) for point in points]
        return Splits(train=data, val=data[:30])

    def build_model(self):
        return Net(self.inputs)

    def build_optimizer(self, model):
        return torch.optim.Adam(model.parameters(), lr=self.lr)

    def loss(self, model, batch):
        x, y = batch
        if self.fail == "ignores":
            return (y - x.sum(1, keepdim=True) + 1 + 0 * model(x)).square().sum()
        if self.fail == "backward":
            return (model(x) * 0).sqrt().sum() + 1  # the gradient of the root is infinite, times 0
        return (model(x) - y).square().sum()
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file of a user, who has no idea of debug mode."""
    path = tmp_path_factory.mktemp("recipe") / "small.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def plain(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without debug mode, with a checkpoint after step 10."""
    folder = tmp_path_factory.mktemp("plain")
    ended = run_command(
        f"recipe={recipe}", "run_dir=plain", "checkpoint.every=10", "checkpoint.keep=9", cwd=folder
    )
    assert ended.returncode == 0, ended.stderr
    return folder / "plain"


def losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_it_makes_the_first_steps_of_the_run_and_no_others(recipe: Path, plain: Path, tmp_path: Path) -> None:
    ended = run_command(f"recipe={recipe}", "debug=true", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "one batch: loss" in ended.stdout
    assert "it can be overfitted" in ended.stdout
    # bit by bit, though the models were built twice and one was trained in between
    assert losses(tmp_path / "runs" / "debug" / "small") == losses(plain)[:8]
    assert [line.split()[1] for line in ended.stdout.splitlines() if line.startswith("step ")][:8] == [
        f"{n}/8" for n in range(1, 9)
    ]


@pytest.mark.slow
def test_a_number_says_how_many_steps_and_the_last_run_is_replaced(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "debug" / "small"
    folder.mkdir(parents=True)
    (folder / "old").write_text("")
    ended = run_command(f"recipe={recipe}", "debug=3", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(losses(folder)) == 3
    assert not (folder / "old").exists()
    assert "workers: 0\n" in (folder / "config.yaml").read_text()


@pytest.mark.slow
def test_it_continues_a_run_from_its_checkpoint(recipe: Path, plain: Path, tmp_path: Path) -> None:
    ended = run_command(
        f"recipe={recipe}", "debug=2", f"resume={plain}/checkpoints/step-00000010", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "runs" / "debug" / "small") == losses(plain)[10:12]


@pytest.mark.slow
def test_two_ranks_and_a_wrong_number_are_refused(recipe: Path, tmp_path: Path) -> None:
    wrong = run_command(f"recipe={recipe}", "debug=-1", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "rankzero: debug=-1 must be 0 or more (default: false)\n",
    )
    two = run_command(f"recipe={recipe}", "debug=true", cwd=tmp_path, env={"RANK": "0", "WORLD_SIZE": "2"})
    assert two.returncode == 2
    assert "debug=true is one process" in two.stderr


# the table --------------------------------------------------------------------------------------------------


def make_run(*args: str) -> Run:
    return prepare(resolve(["epochs=1", "debug=true", *args], World()), World())


# overfitting one batch --------------------------------------------------------------------------------------


def tried(run: Run) -> str:
    return "\n".join(overfit(run, next(iter(run.train_loader()))))


def test_a_loss_that_ignores_the_parameters_is_reported(recipe: Path) -> None:
    output = tried(make_run(f"recipe={recipe}", "fail=ignores"))
    assert "it can NOT be overfitted, no gradient reaches the parameters" in output
    assert "look at the loss" in output


def test_a_learning_rate_too_high_is_reported(recipe: Path) -> None:
    output = tried(make_run(f"recipe={recipe}", "lr=100"))
    assert "it can NOT be overfitted, the loss grows" in output
    assert "learning rate (100)" in output


def test_a_learning_rate_too_low_is_reported(recipe: Path) -> None:
    output = tried(make_run(f"recipe={recipe}", "lr=1e-9"))
    assert "in 100 steps: it can NOT be overfitted\n  look at the learning rate (1e-09)" in output


def test_parameters_without_gradient_are_named(recipe: Path) -> None:
    run = make_run(f"recipe={recipe}")
    run.strategies["model"].module.register_parameter("extra", nn.Parameter(torch.ones(1)))
    assert "  no gradient reaches extra: is it used?" in tried(run)


def test_several_losses_are_not_tried() -> None:
    assert "does not apply: judge and student" in tried(make_run(f"recipe={TINY}:Pair", "batch_size=10"))


# exceptions -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_a_terminal_the_traceback_is_printed_once(recipe: Path, tmp_path: Path) -> None:
    ended = run_command(f"recipe={recipe}", "debug=true", "inputs=9", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.count("rankzero: rank 0 on ") == 1
    assert "(Pdb)" not in ended.stdout
    assert (
        json.loads((tmp_path / "runs" / "debug" / "small" / "failure.json").read_text())["error"]
        == "RuntimeError"
    )


@pytest.mark.slow
def test_a_nan_of_the_backward_pass_is_traced_to_its_line(recipe: Path, tmp_path: Path) -> None:
    ended = run_command(f"recipe={recipe}", "debug=true", "fail=backward", cwd=tmp_path)
    assert ended.returncode == 1
    assert "MulBackward0' returned nan values" in ended.stderr
    assert "(model(x) * 0).sqrt()" in ended.stderr


@pytest.mark.slow
def test_pdb_stands_in_the_users_frame(recipe: Path, tmp_path: Path) -> None:
    output, code = at_a_terminal(
        command_line(f"recipe={recipe}", "debug=true", "inputs=9"), tmp_path, ["p hidden.shape", "q"]
    )
    assert "small.py(23)forward()" in output
    assert "torch.Size([4, 8])" in output
    assert output.count("rankzero: rank 0 on ") == 1
    assert code == 1


def at_a_terminal(
    args: list[str], cwd: Path, answers: list[str], timeout: float = COMMAND_TIMEOUT_S
) -> tuple[str, int]:
    """Run a command under a pseudo-terminal and answer its debugger's prompts. Returns all that was shown,
    and the exit code.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        args,
        cwd=cwd,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TERM": "dumb"},
    )
    os.close(theirs)
    output, read, deadline = b"", 0, time.monotonic() + timeout
    try:
        while (
            time.monotonic() < deadline
            and select.select([ours], [], [], max(deadline - time.monotonic(), 0))[0]
        ):
            try:
                output += os.read(ours, 65536)
            except OSError:  # the other end is closed: the process has ended
                break
            if answers and b"(Pdb) " in output[read:]:
                read = len(output)
                os.write(ours, answers.pop(0).encode() + b"\n")
        return output.decode(), process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(ours)
