"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model
from torch import nn

from launch.checkpoint.directory import list_checkpoints
from launch.checkpoint.manifest import Manifest
from launch.checkpoint.reader import Checkpoint
from launch.checkpoint.resume import resume
from tests.launch.processes import TINY, CommandResult, run_command, start_command, wait_for_command
from tests.launch.runs import make_run, metric_values, read_metrics, single_rank, train_run
from tests.launch.tiny import FEATURES
from tests.ranks import CpuWorld, run_ranks

COMMAND = (
    f"recipe={TINY}:Broken",
    "held_out=7",
    "batch_size=16",
    "steps=12",
    "checkpoint.every=5",
    "eval.every=3",
    "workers=0",
)
"""its own `run_dir=` comes on top; with KILL_AT=9 in the environment it ends in step 9 by SIGKILL, once
KILL_AFTER is there
"""


@pytest.fixture(scope="module")
def lives(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, CommandResult, CommandResult, CommandResult]:
    """A run without interruption in `whole`, one killed in step 9 and started again in `killed`; the killed,
    the second.
    """
    folder = tmp_path_factory.mktemp("lives")
    kill = {"KILL_AT": "9", "KILL_AFTER": "killed/checkpoints/step-00000005"}
    both = (
        start_command(*COMMAND, "run_dir=whole", cwd=folder),
        start_command(*COMMAND, "run_dir=killed", cwd=folder, env=kill),
    )
    whole, killed = (wait_for_command(process) for process in both)
    # what a save that was cut off leaves: newer than the last whole checkpoint, and never to be taken
    (folder / "killed" / "checkpoints" / ".step-00000008.partial").mkdir()
    (folder / "killed" / "checkpoints" / ".step-00000008.partial" / "rank-00000.safetensors").write_bytes(
        b"cut o"
    )
    (folder / "killed" / "checkpoints" / "step-00000007").mkdir()  # renamed by nobody of ours: no manifest
    with (folder / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    return folder, whole, killed, run_command(*COMMAND, "run_dir=killed", cwd=folder)


def test_the_killed_run_goes_on_bit_by_bit(
    lives: tuple[Path, CommandResult, CommandResult, CommandResult],
) -> None:
    folder, whole, killed, again = lives
    assert (whole.returncode, killed.returncode, again.returncode) == (0, -signal.SIGKILL, 0), again.stderr
    assert "at step 5" in again.stdout, "from the newest whole checkpoint"
    changing = ("samples_per_second", "time")  # and how long saves took
    expected, found = (
        [
            {name: value for name, value in line.items() if name not in changing}
            for line in read_metrics(folder / run)
            if "checkpoint/write" not in line
        ]
        for run in ("whole", "killed")
    )
    assert [line["step"] for line in expected if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in expected if "eval/loss" in line] == [3, 6, 9, 12]
    assert found == expected
    weights = [(folder / run / "model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_finished_run_has_nothing_to_go_on_with(
    lives: tuple[Path, CommandResult, CommandResult, CommandResult],
) -> None:
    folder, *_ = lives
    before = (folder / "whole" / "metrics.jsonl").read_text()
    ended = run_command(*COMMAND, "run_dir=whole", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    assert "at step 12" in ended.stdout
    assert (folder / "whole" / "metrics.jsonl").read_text() == before


def test_the_weights_load_into_the_plain_model(
    lives: tuple[Path, CommandResult, CommandResult, CommandResult],
) -> None:
    folder, *_ = lives
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    missing, unexpected = load_model(model, folder / "whole" / "model.safetensors")
    assert not [*missing, *unexpected]
    assert not any(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_nothing_in_a_run_directory_is_pickled(
    lives: tuple[Path, CommandResult, CommandResult, CommandResult],
) -> None:
    folder, *_ = lives
    files = [path for path in (folder / "whole").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".yaml", ".jsonl", ".json", ".safetensors"}
    for path in files:
        head = path.read_bytes()[:64]
        assert not head.startswith((b"\x80", b"PK")), path
        assert path.suffix != ".safetensors" or head[8:9] == b"{"
    assert sorted(path.name for path in (folder / "whole" / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000012",
    ]
    assert sorted(path.name for path in (folder / "whole").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model.safetensors",
    ]


@pytest.mark.slow
def test_resume_path_starts_another_run_from_a_checkpoint(
    lives: tuple[Path, CommandResult, CommandResult, CommandResult],
) -> None:
    folder, *_ = lives
    checkpointed = folder / "whole" / "checkpoints" / "step-00000010"
    ended = run_command(*COMMAND, "run_dir=branch", f"resume={checkpointed}", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    assert metric_values(folder / "branch") == metric_values(folder / "whole")[10:]


WORDS = (
    "batch_size=16",
    "micro_batch_size=4",
    "steps=10",
    "checkpoint.every=4",
    "batchnorm=true",
    "held_out=6",
    "eval.every=2",
)


BATCHNORM, ADAM = ("optimizer=sgd",), ("batchnorm=false",)
"""not both: the bias before BatchNorm has a gradient of zero, whose rounding noise Adam turns into steps"""


def life(world: CpuWorld, folder: Path, words: tuple[str, ...], stop_at: int | None) -> str:
    """A life of the run in `folder`, to its end or to `stop_at`; says where it started."""
    run = make_run(world, "Fit", *WORDS, *words)
    found = resume(run, folder)
    run.stop_at = stop_at
    train_run(run, folder)
    return "new" if found is None else found.name


def progress(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint says."""
    return Manifest.read(list_checkpoints(folder)[-1]).progress


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (2, 1, BATCHNORM),
        (1, 2, ADAM),
        pytest.param(4, 2, BATCHNORM, marks=pytest.mark.slow),
        pytest.param(4, 1, ADAM, marks=pytest.mark.slow),
    ],
)
def test_the_next_life_may_have_another_number_of_ranks(
    tmp_path: Path, before: int, after: int, words: tuple[str, ...]
) -> None:
    run_ranks(1, life, tmp_path / "whole", words, None)
    assert run_ranks(before, life, tmp_path / "run", words, 6)[0] == "new"
    assert run_ranks(after, life, tmp_path / "run", words, None)[0] == "step-00000006"
    for name in ("loss", "grad_norm", "eval/loss"):
        assert metric_values(tmp_path / "run", name) == pytest.approx(
            metric_values(tmp_path / "whole", name), rel=1e-5
        ), name
    assert len(metric_values(tmp_path / "whole")) == 10
    found, expected = progress(tmp_path / "run"), progress(tmp_path / "whole")
    assert found["best"] == pytest.approx(expected["best"], rel=1e-5)
    assert (found["step"], found["best_step"]) == (expected["step"], expected["best_step"])


def test_a_checkpoint_holds_the_running_statistics_of_all_ranks(tmp_path: Path) -> None:
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        run_ranks(
            ranks, life, folder, ("optimizer=sgd", "held_out=0"), 6
        )  # no evaluation: it would synchronise them too
        with Checkpoint(folder / "checkpoints" / "step-00000006") as saved:
            found[ranks] = [saved.read(f"model/model/1.running_{name}", 0, 8) for name in ("mean", "var")]
    torch.testing.assert_close(found[2], found[1], rtol=1e-5, atol=1e-6)


def test_the_optimizer_comes_along(tmp_path: Path) -> None:
    run = train_run(make_run(single_rank(), "Fit", *WORDS), tmp_path)
    again = make_run(single_rank(), "Fit", *WORDS)
    resume(again, tmp_path)
    for mine, theirs in zip(
        again.models["model"].parameters(), run.models["model"].parameters(), strict=True
    ):
        states = [run.strategies["model"].optimizer.state[p] for run, p in ((again, mine), (run, theirs))]
        assert states[0].keys() == states[1].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert again.progress.state() == run.progress.state()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("batch_size=8",), "batch_size=16, now 8"),
        (("seed=3",), "seed=0, now 3"),
        (("size=30",), "50 training samples, now 30"),
    ],
)
def test_a_run_that_would_not_continue_the_curve_is_refused(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    train_run(make_run(single_rank(), "Fit", *WORDS), tmp_path)
    with pytest.raises(ValueError, match=message):
        resume(make_run(single_rank(), "Fit", *WORDS, *words), tmp_path)


def test_the_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train_run(make_run(single_rank(), "Fit", *WORDS), tmp_path)
    with pytest.raises(ValueError, match=r"belongs to recipe=tests.launch.tiny:Fit, not tests"):
        resume(make_run(single_rank(), "Sort", "steps=1", f"resume={tmp_path}"), tmp_path / "other")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        resume(
            make_run(single_rank(), "Fit", "steps=1", f"resume={tmp_path / 'nowhere'}"), tmp_path / "other"
        )


def test_only_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    train_run(
        make_run(single_rank(), "Fit", *WORDS, "checkpoint.every=1", "checkpoint.keep=2"), tmp_path / "newest"
    )
    assert [path.name for path in list_checkpoints(tmp_path / "newest")] == ["step-00000009", "step-00000010"]
    words = (
        "eval.every=2",
        "lr=1e-12",
        "checkpoint.every=2",
        "checkpoint.keep=1",
        "checkpoint.best=true",
        "batchnorm=false",
    )
    train_run(
        make_run(single_rank(), "Fit", *WORDS, *words), tmp_path / "best"
    )  # no evaluation is better than the first
    assert [path.name for path in list_checkpoints(tmp_path / "best")] == ["step-00000002", "step-00000010"]
