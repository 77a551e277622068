"""What only FSDP does: which blocks are units, meta-device initialization, collectives, refused options."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.debug import CommDebugMode

from launch.equivalence.whole_model import whole_model
from strategies.base import Strategy
from strategies.deferred_init import build_without_weights, initialize, materialize
from strategies.fsdp import FSDP, check_options, separate_blocks
from strategies.options import FSDPOptions, Options
from strategies.sharded_state import TensorSlice
from tests.ranks import CpuWorld, run_ranks
from tests.strategies import models
from tests.strategies.training import Case, assert_equal, set_up, train, train_step


def test_blocks_that_share_a_parameter_belong_to_the_root() -> None:
    tied = models.build("tied-blocks")
    assert separate_blocks(tied, models.blocks(tied)) == [models.blocks(tied)[1]]
    free = models.build("gpt")
    assert separate_blocks(free, [*models.blocks(free), free]) == models.blocks(free)[::-1]
    shared = models.build("gpt")
    first, _, last = models.blocks(shared)
    first.register_module("0", last.get_submodule("0"))
    assert separate_blocks(shared, models.blocks(shared)) == [models.blocks(shared)[1]]


def shapes(world: CpuWorld) -> tuple[int, list[tuple[str, int]]]:
    strategy = set_up(world, "fsdp", Case(model="scalar"))
    units = sum(isinstance(module, FSDPModule) for module in strategy.module.modules())
    return units, [
        (name, strategy._shard_of(p).values.numel()) for name, p in strategy.module.named_parameters()
    ]


def test_each_rank_holds_its_rows_only() -> None:
    answers = run_ranks(4, shapes)
    assert [units for units, _ in answers] == [3] * 4
    held = [dict(parts) for _, parts in answers]
    assert [rank["stem.weight"] for rank in held] == [24, 24, 24, 6]  # 13 rows of 6
    assert [rank["head.bias"] for rank in held] == [1, 1, 1, 0]  # 3 rows
    assert [rank["scale"] for rank in held] == [1, 1, 1, 1]


def initial(world: CpuWorld, strategy: str) -> tuple[dict[str, Tensor], int, Tensor]:
    made = set_up(world, strategy, Case(model="drawn", options=(("seed", 3),)))
    return (
        whole_model(made, world),
        sum(p.is_meta for p in made.module.parameters()),
        made.module.get_buffer("shift"),
    )


def test_drawn_weights_are_the_same_bit_by_bit() -> None:
    (expected, _, _), *_ = run_ranks(1, initial, "single")
    assert expected["embedding.weight"].std() > 0.1
    for strategy, ranks in (("ddp", 2), ("fsdp", 2), ("fsdp-grad", 4), ("fsdp-hybrid", 4)):
        answers = run_ranks(ranks, initial, strategy)
        assert answers[0][0].keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in answers[0][0].items())
        for _, on_meta, buffer in answers:
            assert on_meta == 0
            assert torch.equal(buffer, torch.linspace(-0.5, 0.5, 10))


def test_drawn_models_train_alike() -> None:
    case = Case(model="drawn", steps=4)
    assert_equal(run_ranks(2, train, "fsdp", case)[0], run_ranks(1, train, "single", case)[0], 1e-6, 1e-6)


def test_weights_depend_on_the_seed_and_leave_the_generator_alone() -> None:
    first, second, other = (models.DrawnGPT() for _ in range(3))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        initialize(model, seed)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    out = [first.get_parameter(f"blocks.{index}.0.out.weight") for index in range(2)]
    assert not torch.equal(*out)


def test_a_model_on_meta_keeps_its_buffers_and_ties() -> None:
    assert build_without_weights(models.GPT) is None  # has no init_weights
    empty = build_without_weights(models.DrawnGPT)
    assert empty is not None
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert torch.equal(empty.get_buffer("shift"), models.GPT().get_buffer("shift"))
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # torch is as it was
    initialize(empty, 0, materialize(empty))
    assert empty.get_parameter("head.weight") is empty.get_parameter("embedding.weight")
    whole = models.DrawnGPT()
    initialize(whole, 0)
    assert all(map(torch.equal, empty.parameters(), whole.parameters()))


def collectives_of_a_step(world: CpuWorld, strategy: str) -> tuple[dict[str, int], dict[str, int]]:
    """The collectives of a micro-batch that is not the last, and of the last with its step."""
    case = Case(model="mlp", micro_batches=2 * world.world_size)
    made = set_up(world, strategy, case)
    train_step(world, made, case, 0)
    return count_collectives(made, case, False), count_collectives(made, case, True)


def count_collectives(strategy: Strategy, case: Case, last: bool) -> dict[str, int]:
    with CommDebugMode() as collectives:  # type: ignore[no-untyped-call]
        with strategy.micro_batch(last=last):
            strategy.backward(models.loss_sum(strategy.model, models.batch(case.model, 0, 0)))
        if last:
            strategy.step()
    return dict(
        Counter({str(op).split(".")[-1]: count for op, count in collectives.get_comm_counts().items()})
    )


def test_accumulating_reduces_nothing() -> None:
    for strategy in ("fsdp", "fsdp-grad"):
        accumulating, last = run_ranks(2, collectives_of_a_step, strategy)[0]
        assert not [name for name in accumulating if "reduce" in name], (strategy, accumulating)
        assert sum(count for name, count in last.items() if "reduce_scatter" in name) == 3, (strategy, last)
        # under grad the weights are gathered once a step, and only then
        gathered = {"fsdp": 5, "fsdp-grad": 3}[strategy]
        assert sum(accumulating.values()) == gathered, (strategy, accumulating)
        assert sum(n for name, n in last.items() if "gather" in name) == (5 if strategy == "fsdp" else 0), (
            last
        )


def after_evaluation(world: CpuWorld) -> list[float]:
    """An evaluation leaves the root gathered: what is loaded or trained next must not see the old weights."""
    case = Case(model="mlp", steps=2)
    made = set_up(world, "fsdp", case)
    saved = OwnSlices(made.state())
    first = [train_step(world, made, case, step)[0] for step in range(2)]
    with torch.no_grad():
        made.model(models.batch("mlp", 0, 0)[0])
    made.load_state(saved)
    return first + [train_step(world, made, case, step)[0] for step in range(2)]


class OwnSlices:
    """A reader over this rank's own ranges."""

    def __init__(self, saved: dict[str, TensorSlice]) -> None:
        self.saved = {name: (piece.values.clone(), piece.start) for name, piece in saved.items()}
        self.shapes = {name: piece.shape for name, piece in saved.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if name == "loss_scale":  # written by the ranks together
            return torch.tensor([1.0, 0.0], dtype=torch.float64)
        values, offset = self.saved[name]
        return values[start - offset : stop - offset]


def test_loading_after_an_evaluation() -> None:
    losses = run_ranks(2, after_evaluation)[0]
    assert losses[:2] == losses[2:]


def fixed(world: CpuWorld) -> tuple[bool, list[int]]:
    strategy = FSDP(world, Options(strategy="fsdp"))
    strategy.setup(partial(models.build, "mlp"), None, models.blocks)
    x = torch.ones(2, 6, requires_grad=True)
    records = []
    for _ in range(3):
        with strategy.frozen():
            strategy.model(x).sum().backward()
            strategy.model(x.detach())
        context: Any = strategy._units[-1]._get_fsdp_state()._comm_ctx
        records.append(len(context.post_forward_order))
    return x.grad is not None and not strategy._gradients(), records


def test_a_fixed_model_is_sharded_passes_gradients_on_and_keeps_no_record_of_calls() -> None:
    assert run_ranks(2, fixed) == [(True, [0, 0, 0])] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (FSDPOptions(cpu_offload=True), "no effect without a GPU"),
        (FSDPOptions(shard_size=2), "set fsdp.shard=hybrid, or drop"),
        (FSDPOptions(shard="hybrid", shard_size=3), "one of 1, 2, 4"),
        (FSDPOptions(shard="hybrid", shard_size=8), "one of 1, 2, 4"),
        (FSDPOptions(shard="hybrid", shard_size=0), "one of 1, 2, 4"),
    ],
)
def test_options_without_effect_are_refused(options: FSDPOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(CpuWorld(0, 0, 4, 4), Options(fsdp=options))
