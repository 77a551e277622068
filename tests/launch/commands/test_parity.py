"""The parity command on recipes of ours and of others, and its bad news."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from launch.cli.command import read_arguments
from launch.cli.resolve import resolve
from launch.commands.parity import ParityOptions, comparison_of
from launch.equivalence.parity_cases import plan_cases
from launch.equivalence.parity_result import ParityResult, compare_case
from launch.equivalence.trajectory import follow
from launch.runtime.world import World
from strategies.precision import contract
from tests import ranks
from tests.launch.processes import rankzero
from tests.launch.runs import world_of

THEIRS = """
import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from recipes.base import Recipe
from recipes.parts.data import Splits


class Points:
    def __len__(self):
        return 300

    def __getitem__(self, index):
        point = torch.randn(12, generator=torch.Generator().manual_seed(index))
        return point, int(point[0] > 0) + int(point[1] > 0)


@dataclass(kw_only=True)
class Theirs(Recipe):
    defaults = {"micro_batch_size": 4, "epochs": 1}
    lie: bool = False

    def build_data(self):
        return Splits(train=Points())

    def build_model(self):
        first, last = nn.Linear(12, 16), nn.Linear(16, 3)
        return nn.Sequential(first, nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), last)

    def build_optimizer(self, model):
        rest = [*model[1].parameters(), *model[4].parameters()]
        return torch.optim.AdamW([{"params": model[0].parameters(), "lr": 3e-3}, {"params": rest}], lr=1e-2)

    def loss(self, model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
        return loss * 1.01 if self.lie and os.environ.get("RANK") == "1" else loss

    def blocks(self, model):
        return [model[0]]
"""


def parity(*words: str, expect: int) -> str:
    """What `rankzero parity` prints."""
    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(
        rankzero("parity", *words),
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(printed: str, strategy: str) -> list[str]:
    return [line for line in printed.splitlines() if line.strip().startswith(f"{strategy} ")]


@pytest.fixture
def theirs(tmp_path: Path) -> str:
    (tmp_path / "theirs.py").write_text(THEIRS)
    return f"recipe={tmp_path / 'theirs.py'}"


@pytest.mark.slow
def test_a_foreign_recipe_passes_and_a_bias_without_gradient_is_named(theirs: str) -> None:
    printed = parity(theirs, "strategies=ddp,fsdp", expect=0)
    for strategy in ("ddp", "fsdp"):
        assert len(rows(printed, strategy)) == 4
        assert all("pass" in row for row in rows(printed, strategy))
    assert "left out, its true gradient being zero: model.0.bias" in printed
    assert "compute fp32" in printed


@pytest.mark.slow
def test_a_recipe_that_depends_on_the_rank_fails_with_step_and_parameter(theirs: str) -> None:
    printed = parity(theirs, "strategies=ddp", "lie=true", expect=1)
    assert all("FAIL" in row for row in rows(printed, "ddp"))
    assert "from step 1 on; the first parameter to deviate is model." in " ".join(printed.split())


def test_a_mistake_is_one_line(theirs: str) -> None:
    printed = parity(theirs, "strategies=ddp,zeroo", expect=2)
    assert printed.strip().count("\n") == 0
    assert "'zeroo' is none of" in printed


EACH_KIND = ("ddp", "fsdp", "zero3")
ALL = (*EACH_KIND, "zero1", "zero2")
THROUGHOUT = ("clip_norm=0.1", "activation_checkpointing=full")
"""in all rows, so that there are two in place of four of each strategy"""


# the same in the processes of the tests ---------------------------------------------------------------------


def traced(place: ranks.CpuWorld, cases: dict[str, list[str]], steps: int) -> dict[str, dict[str, Tensor]]:
    return {name: follow(words, steps, world_of(place)) for name, words in cases.items()}


def compared(strategies: Sequence[str], *words: str) -> list[ParityResult]:
    """The rows of the table that the command would print with these words."""
    argv = [*words, "workers=0", "compare=2", f"strategies={','.join(strategies)}"]
    own, others = comparison_of(read_arguments(argv, ParityOptions, takes_run=True))
    settings = resolve([*others, "strategy=single"], World())
    cases = plan_cases(settings, others, own)
    trajectories: dict[str, dict[str, Tensor]] = {}
    for many, alone in ((1, True), (own.ranks, False)):
        mine = {case.name: list(case.argv) for case in cases if (case.strategy == "single") == alone}
        trajectories |= ranks.run_ranks(many, traced, mine, own.steps, timeout=600.0)[0]
    return [
        compare_case(case, trajectories, settings.config.precision)
        for case in cases
        if case.strategy != "single"
    ]


def assert_alike(found: list[ParityResult], strategies: Sequence[str], each: int) -> None:
    """All rows pass, and there are `each` of each strategy."""
    assert not [row for row in found if row.problem]
    assert Counter(row.case.strategy for row in found) == dict.fromkeys(strategies, each)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "strategies", "words"),
    [
        ("gpt", EACH_KIND, ("model.layers=2", "micro_batch_size=2")),
        ("mnist", ALL, THROUGHOUT),
        # at 8 pixels its last stage is BatchNorm over a single pixel of few samples: that blows rounding up
        # 90-fold a step
        ("resnet", EACH_KIND, (*THROUGHOUT, "data.image_size=16", "micro_batch_size=4", "optim.lr=0.005")),
        ("gan", EACH_KIND, THROUGHOUT),
    ],
)
def test_every_strategy_trains_our_recipes_alike(
    recipe: str, strategies: tuple[str, ...], words: tuple[str, ...]
) -> None:
    # the second step shows what the first has made of the weights, the weights in the end what the second has
    # made of the moments
    assert_alike(
        compared(strategies, f"recipe={recipe}", *words), strategies, 2 if "clip_norm=0.1" in words else 4
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "strategies"), [("bf16", ("ddp", "zero1", "zero3")), ("fp16", ("fsdp", "zero2"))]
)
def test_low_precision(theirs: str, precision: str, strategies: tuple[str, ...]) -> None:
    """Each strategy in one of the two: both in each are in tests/strategies/test_precision.py."""
    assert "autocast" in str(contract(precision))
    assert_alike(compared(strategies, theirs, f"precision={precision}"), strategies, 4)
