"""The keys of other frameworks are answered with ours."""

from __future__ import annotations

import pytest

from launch.cli.config import Config
from launch.cli.keys import build, check_known, keys_of, parse_value
from launch.cli.resolve import find_recipe
from launch.cli.synonyms import ELSEWHERE, NOTES, SYNONYMS, THEIR_NAMES, VALUES, explain, keys_named_in
from recipes import RECIPES

RUN = {key.name: key for key in keys_of(Config)}
KNOWN = {name: RUN | {key.name: key for key in keys_of(find_recipe(name))} for name in RECIPES}
ANYWHERE = {name: key for known in KNOWN.values() for name, key in known.items()}


def refusal(recipe: str, argument: str) -> str:
    """The line for one argument that is no key of a recipe."""
    name, _, value = argument.partition("=")
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is looked at by the caller
        check_known({name: value}, KNOWN[recipe], f"recipe {recipe}")
    return str(error.value)


def test_each_answer_names_keys_that_exist() -> None:
    assert len(SYNONYMS) > 40
    assert set(THEIR_NAMES) | set(NOTES) <= set(ANYWHERE)
    assert not {key for text in ELSEWHERE.values() for key in keys_named_in(text)} - set(ANYWHERE)


def test_no_key_of_ours_is_taken_for_one_of_theirs() -> None:
    assert not set(SYNONYMS) & set(RUN)
    assert sum(len(names.split()) for names in THEIR_NAMES.values()) + len(ELSEWHERE) == len(SYNONYMS)


@pytest.mark.parametrize("theirs", VALUES)
def test_their_values_become_values_of_ours(theirs: str) -> None:
    key = ANYWHERE[SYNONYMS[theirs]]
    for value in VALUES[theirs].values():
        if key.name in RUN:
            build(Config, {key.name: parse_value(value, key)})
        else:
            assert value in key.type_name.split("|")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("learning_rate=1e-3", "learning_rate is optim.lr here: optim.lr=1e-3"),
        ("lr=0.1", "lr is optim.lr here: optim.lr=0.1"),
        ("optimizer.lr=0.1", "optimizer.lr is optim.lr here: optim.lr=0.1"),
        ("max_grad_norm=1.0", "max_grad_norm is clip_norm here: clip_norm=1.0"),
        ("bf16=true", "bf16 is precision here: precision=bf16"),
        ("mixed_precision=no", "precision=fp32"),
        ("gradient_checkpointing=true", "activation_checkpointing=full"),
        ("zero_stage=2", "strategy=zero2"),
        ("warmup_ratio=0.1", "schedule.warmup=0.1 (steps or, below 1, a fraction of the run)"),
        ("resume_from_checkpoint=runs/a", "resume=runs/a"),
        ("gradient_accumulation_steps=4", "give batch_size and micro_batch_size"),
        ("devices=8", "rankzero train nproc=8 on this machine, or torchrun --nproc_per_node=8"),
        ("num_nodes=auto", "torchrun --nnodes=N"),
        ("n_layer=12", "n_layer is model.layers here: model.layers=12"),
        ("block_size=1024", "block_size is data.block here: data.block=1024"),
        ("beta2=0.95", "optim.betas="),
    ],
)
def test_a_key_of_another_framework(argument: str, message: str) -> None:
    assert message in refusal("gpt", argument)


@pytest.mark.parametrize("theirs", ["block_size", "n_layer", "n_head"])
def test_a_key_that_this_recipe_lacks_is_not_answered(theirs: str) -> None:
    assert explain(theirs, "1", KNOWN["resnet"]) == ""
    line = refusal("resnet", f"{theirs}=1")
    assert line == (
        f"{theirs} is not a key of recipe resnet; nothing here is like it; `--help` lists the keys"
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("grad_acum=4", "did you mean grad_accum? grad_accum is derived here"),
        ("learnin_rate=1", "did you mean learning_rate? learning_rate is optim.lr here: optim.lr=1"),
        ("max_grad_nrom=1", "did you mean max_grad_norm? max_grad_norm is clip_norm here: clip_norm=1"),
        ("bacth_size=8", "did you mean batch_size or"),
        ("lrr=0.1", "did you mean optim.lr?"),
        ("optim.lrr=0.1", "did you mean optim.lr"),
        ("trian_file=x", "did you mean train_file? train_file is data.path here: data.path=x"),
    ],
)
def test_a_misspelt_key_is_found_among_theirs_too(argument: str, message: str) -> None:
    assert message in refusal("gpt", argument)
