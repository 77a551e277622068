"""Values that are each right but cannot work together are refused, with the fix."""

from __future__ import annotations

import pytest

from launch.cli.check_config import accumulation_steps
from launch.cli.resolve import resolve
from launch.runtime.world import World
from tests.launch.cli.test_resolve import FOUR, resnet, said
from tests.launch.processes import TINY


@pytest.mark.parametrize(
    ("words", "ranks", "result"),
    [(["batch_size=64"], 1, 4), (["batch_size=64"], 4, 1), (["batch_size=64", "micro_batch_size=8"], 4, 2)],
)
def test_accumulation_is_derived(words: list[str], ranks: int, result: int) -> None:
    world = World(world_size=ranks, local_world_size=ranks)
    assert accumulation_steps(resnet(*words, world=world).config, world) == result
    alone = resolve([f"recipe={TINY}:Sort", "steps=1", "batch_size=64"], world).config
    assert accumulation_steps(alone, world) == 1, "without a micro-batch the batch is cut once a rank"


@pytest.mark.parametrize(
    ("words", "world", "nearest"),
    [
        (
            ["batch_size=10", "micro_batch_size=4"],
            World(),
            ["batch_size=8", "batch_size=12", "micro_batch_size=5"],
        ),
        (
            ["batch_size=64", "micro_batch_size=7"],
            World(),
            ["batch_size=63", "batch_size=70", "micro_batch_size=8"],
        ),
        (["batch_size=30", "micro_batch_size=null"], FOUR, ["batch_size=28", "batch_size=32"]),
        (["batch_size=2", "micro_batch_size=null"], FOUR, ["batch_size=4"]),
        (["batch_size=64", "micro_batch_size=128"], FOUR, ["batch_size=512", "micro_batch_size=16"]),
    ],
)
def test_an_impossible_split_names_possible_ones(words: list[str], world: World, nearest: list[str]) -> None:
    for message in nearest:
        said(message, *words, world=world)
        possible = [word for word in words if word.partition("=")[0] != message.partition("=")[0]]
        accumulation_steps(resnet(*possible, message, world=world).config, world)  # what is named works
    with pytest.raises(ValueError, match="cannot be cut") as error:
        resnet(*words, world=world)
    assert "batch_size=0" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ddp.bucket_mb=1", "strategy=fsdp"], "ddp.bucket_mb has no effect under strategy=fsdp"),
        (
            ["fsdp.shard=grad"],
            "fsdp.shard has no effect under strategy=single; drop it, or use strategy=fsdp",
        ),
        (["zero.cpu_offload=true", "strategy=ddp"], "use strategy=zero1|zero2|zero3"),
        (["clip_norm=1", "clip_value=1"], "clip_norm and clip_value are both set"),
        (["optim.betas=0.5,0.6"], "optim.betas"),
    ],
)
def test_what_has_no_effect_is_refused(words: list[str], message: str) -> None:
    said(message, *words)
