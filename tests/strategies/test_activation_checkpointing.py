"""Activation checkpointing, which must not show in the numbers: losses, gradients, the running statistics of
BatchNorm.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from strategies.activation_checkpointing import select_blocks
from strategies.options import Options
from tests.ranks import CpuWorld, run_ranks
from tests.strategies import models
from tests.strategies.training import QUICK, STRATEGIES, Case, Outcome, each, set_up, train

MODES = ("full", "every:2", "selective")
# what is recomputed is a rank's own business: one of each kind of hooks, and neither a second dimension of
# the mesh nor ZeRO-2
KINDS = [name for name in STRATEGIES if name not in ("fsdp-hybrid", "zero2")]


def by_mode(world: CpuWorld, strategy: str, case: Case) -> dict[str, Outcome]:
    cases = {
        mode: replace(case, options=(*case.options, ("activation_checkpointing", mode)))
        for mode in ("none", *MODES)
    }
    return {mode: train(world, strategy, case) for mode, case in cases.items()}


@pytest.mark.parametrize("model", ["cnn", "gpt"])
@pytest.mark.parametrize("strategy", each(KINDS))
def test_recomputation_changes_no_number(strategy: str, model: str) -> None:
    """The CNN has dropout, to be drawn again alike, and BatchNorm, to be updated once."""
    ranks = 1 if strategy == "single" else 2
    compare(run_ranks(ranks, by_mode, strategy, Case(model=model, micro_batches=ranks, steps=2))[0])


@pytest.mark.parametrize("strategy", each(QUICK, quick=["single"]))
def test_recomputation_changes_no_number_in_half_precision(strategy: str) -> None:
    ranks = 1 if strategy == "single" else 2
    compare(
        run_ranks(
            ranks,
            by_mode,
            strategy,
            Case(model="gpt", micro_batches=ranks, steps=2, options=(("precision", "bf16"),)),
        )[0]
    )


def compare(outcomes: dict[str, Outcome]) -> None:
    kept = outcomes.pop("none")
    for mode, outcome in outcomes.items():
        assert outcome.losses == kept.losses, mode
        assert outcome.norms == kept.norms, mode
        assert outcome.weights.keys() == kept.weights.keys()
        for name, tensor in kept.weights.items():
            assert torch.equal(outcome.weights[name], tensor), (mode, name)


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func).removeprefix("aten.").partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def operations(world: CpuWorld, model: str) -> dict[str, Counter[str]]:
    """How often each operation runs in a forward and a backward pass, by mode."""
    found = {}
    for mode in ("none", *MODES):
        strategy = set_up(world, "single", Case(model=model, options=(("activation_checkpointing", mode),)))
        with OperationCounter() as counter, strategy.micro_batch(last=True):
            strategy.backward(models.loss_sum(strategy.model, models.batch(model, 0, 0)))
        found[mode] = counter.calls
    return found


def test_only_cheap_operations_are_recomputed_selectively() -> None:
    """Four modes of three blocks, each with attention and a residual layer."""
    calls = run_ranks(1, operations, "gpt")[0]
    attention = [
        name for name in calls["none"] if name.startswith("_scaled_dot_product") and "backward" not in name
    ]
    assert [calls[mode][attention[0]] for mode in ("none", *MODES)] == [3, 6, 4, 3]
    assert [calls[mode]["native_layer_norm"] for mode in ("none", *MODES)] == [4, 7, 5, 7]
    assert calls["none"]["mm"] == calls["selective"]["mm"] < calls["full"]["mm"]

    calls = run_ranks(1, operations, "cnn")[0]
    assert [calls[mode]["convolution"] for mode in ("none", *MODES)] == [3, 5, 4, 3]
    assert [calls[mode]["relu"] for mode in ("none", *MODES)] == [2, 4, 3, 4]


def test_each_nth_block_is_chosen() -> None:
    blocks: list[nn.Module] = [nn.Identity() for _ in range(5)]
    assert select_blocks(blocks, "none") == []
    assert (
        select_blocks(blocks, "full")
        == select_blocks(blocks, "selective")
        == select_blocks(blocks, "every:1")
        == blocks
    )
    assert select_blocks(blocks, "every:2") == [blocks[1], blocks[3]]
    assert select_blocks(blocks, "every:5") == [blocks[4]]
    with pytest.raises(ValueError, match="every:6 has no effect on 5 blocks: give every:N with N up to 5"):
        select_blocks(blocks, "every:6")
    with pytest.raises(
        ValueError, match="activation_checkpointing=full has no effect: the recipe names no blocks"
    ):
        select_blocks([], "full")


@pytest.mark.parametrize(
    "word", ["every:0", "every:x", "every:-1", "every:", "every", "every:1.5", "some", ""]
)
def test_a_malformed_mode_is_refused(word: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not none\|full\|every:N\|selective; give one of them"
    ) as refused:
        Options(activation_checkpointing=word)
    assert "\n" not in str(refused.value)


def test_true_and_false_are_read_as_before() -> None:
    values: dict[str | bool, str] = {
        True: "full",
        False: "none",
        "true": "full",
        "False": "none",
        "every:2": "every:2",
    }
    assert [Options(activation_checkpointing=word).activation_checkpointing for word in values] == list(
        values.values()
    )
