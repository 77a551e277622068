"""What the diff of two checkpoints says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.checkpoint.compare import compare_checkpoints
from launch.checkpoint.directory import checkpoint_dir
from launch.checkpoint.reader import Checkpoint
from tests.launch.checkpoints import CONFIG, GROUPS, WEIGHTS, call, state, write_checkpoint, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run."""
    return write_run(tmp_path / "run", state("model", WEIGHTS), steps=(10, 30), optimizers={"model": GROUPS})


def other(run: Path, **changed: torch.Tensor) -> Path:
    """Another run, of other ranks, with `changed` weights (a double underscore is a dot)."""
    weights = {**WEIGHTS, **{name.replace("__", "."): tensor for name, tensor in changed.items()}}
    return write_run(
        run.with_name("other"),
        state("model", weights),
        steps=(30,),
        ranks=5,
        config={**CONFIG, "optim": {"lr": 0.2}},
        optimizers={"model": GROUPS},
    )


def test_diff_of_equal_states(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "0 differ" in call(capsys, "diff", run, checkpoint_dir(run, 10))
    output = call(capsys, "diff", run, other(run))  # other ranks, and the configuration does not count
    assert "optim.lr  0.1 -> 0.2" in output


def test_diff_of_values(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = WEIGHTS["layer.weight"].clone()
    weight[2, 3] += 0.5
    output = call(capsys, "diff", run, other(run, layer__weight=weight, count=torch.tensor(10)), expect=1)
    rows = [" ".join(line.split()) for line in output.splitlines() if "model/model/" in line]
    assert rows == ["3 0.3 1 of 1 model/model/count", "0.5 0.017 1 of 30 model/model/layer.weight"]
    assert "8 tensors equal, 2 differ" in output


def test_diff_shows_the_first_unless_asked_for_all(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run_dir, shift in (("a", 0.0), ("b", 1.0)):
        tensors = {f"net/model/{n:02d}": torch.ones(2) + n * shift for n in range(40)}
        write_run(run / run_dir, tensors, config={f"key{n}": shift for n in range(30)}, steps=(1,))
    output = call(capsys, "diff", run / "a", run / "b", expect=1)
    assert output.count("net/model/") == 20
    assert output.index("net/model/39") < output.index("net/model/38")
    assert "and 19 more; all=true shows them" in output
    assert "and 10 more; all=true shows them" in output
    output = call(capsys, "diff", run / "a", run / "b", "all=true", expect=1)
    assert output.count("net/model/") == 39
    assert output.count("  key") == 30


def pair(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> list[Checkpoint]:
    tensors = ({name: torch.as_tensor(value) for name, value in values.items()} for values in (first, second))
    return [
        Checkpoint(write_checkpoint(folder / str(n), held, ranks=n + 1)) for n, held in enumerate(tensors)
    ]


def test_what_differs(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    first, second = pair(
        tmp_path,
        {
            "nan": [nan, 1.0],
            "one nan": [nan, 4.0],
            "inf": [inf, -inf],
            "signs": [inf],
            "zero": [0.0],
            "bool": [True, False],
        }
        | {"large": [2**60], "gone": [1], "shape": [1, 2], "type": [1]},
        {
            "nan": [nan, 1.0],
            "one nan": [2.0, 4.0],
            "inf": [inf, -inf],
            "signs": [-inf],
            "zero": [-0.0],
            "bool": [True, True],
        }
        | {"large": [2**60 + 1], "new": [1], "shape": [[1, 2]], "type": [1.0]},
    )
    found = compare_checkpoints(first, second)
    assert {values.name: values.max_abs for values in found.values} == {
        "one nan": inf,
        "signs": inf,
        "bool": 1.0,
        "large": 0.0,
    }
    assert found.equal_count == 3
    assert {name for name, _, _ in found.specs} == {"gone", "new", "shape", "type"}
    assert not found.same_state
    first.close()
    second.close()


def test_diff_of_optimizers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = [
        {**GROUPS[0], "parameters": ["weight"], "settings": {**GROUPS[0]["settings"], "weight_decay": 0.0}}
    ]
    write_run(run / "other", state("model", WEIGHTS), optimizers={"model": groups})
    output = call(capsys, "diff", run, run / "other", expect=1)
    assert "model, group 0: parameters.bias  in it -> (none)" in output
    assert "model, group 0: settings.weight_decay  0.1 -> 0.0" in output
