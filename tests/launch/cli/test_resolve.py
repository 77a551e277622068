"""From words to a checked configuration, and what is said to the user when they make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli.resolve import Settings, find_recipe, resolve
from launch.runtime.world import World
from launch.training.run_dir import find_run_dir, start_run_dir
from recipes.parts.optim import Optim
from tests.launch.processes import TINY

FOUR = World(rank=0, world_size=4, local_world_size=4)


def resnet(*words: str, world: World | None = None) -> Settings:
    return resolve(["recipe=resnet", *words], world or World())


def said(message: str, *words: str, world: World | None = None) -> None:
    """The words are refused, in a message that holds `message`."""
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is looked at here, as plain text
        resolve(
            list(words) if any(word.startswith("recipe=") for word in words) else ["recipe=resnet", *words],
            world or World(),
        )
    assert message in str(error.value)


# values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=3", 3.0),
        ("optim.nesterov=false", False),
        ("optim.name=adamw", "adamw"),
        ("optim.betas=0.8,0.9", (0.8, 0.9)),
        ("optim.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("optim.betas=(0.8, 0.9)", (0.8, 0.9)),
        ("schedule.milestones=0.5,0.8", (0.5, 0.8)),
        ("schedule.milestones=[10]", (10,)),
        ("schedule.milestones=10", (10,)),
        ("run_dir=1e-3", "1e-3"),
        ("run_dir=a=b", "a=b"),
        ("run_dir=null", None),
        ("data.image_size=null", None),
        ("data.image_size=16", 16),
        ("seed=-3", -3),
        ("seed=0x10", 16),
        ("clip_norm=1", 1.0),
        ("clip_norm=null", None),
        ("workers=0", 0),
        ("compile=true", True),
        ("compile=reduce-overhead", "reduce-overhead"),
        ("activation_checkpointing=true", "full"),
        ("activation_checkpointing=none", "none"),
        ("activation_checkpointing=every:2", "every:2"),
        ("checkpoint.every=7", 7),
        ("--batch_size=128", 128),
    ],
)
def test_values(word: str, value: Any) -> None:
    name = word.removeprefix("--").partition("=")[0]
    needed = {"schedule.milestones": ["schedule.name=multistep"], "optim.betas": ["optim.name=adamw"]}
    settings = resnet(*needed.get(name, []), word)
    owner: Any = settings.config if name.partition(".")[0] in vars(settings.config) else settings.recipe
    for part in name.split("."):
        owner = getattr(owner, part)
    assert owner == value
    assert type(owner) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("batch_size=many", "batch_size=many is not int (default: 64)"),
        ("batch_size=1.5", "batch_size=1.5 is not int"),
        ("optim.lr=fast", "optim.lr=fast is not float (default: 0.02)"),
        (
            "compile=perhaps",
            "compile=perhaps is not false|true|default|reduce-overhead|max-autotune (default: false)",
        ),
        (
            "activation_checkpointing=every:0",
            "activation_checkpointing=every:0 is not none|full|every:N|selective; give one",
        ),
        ("precision=fp8", "precision=fp8 is not fp32|tf32|bf16|fp16"),
        ("strategy=dpp", "strategy=dpp is not single|ddp|fsdp|zero1|zero2|zero3|auto"),
        ("model.depth=19", "model.depth=19 is not 18|34|50|101|152"),
        ("optim.betas=0.9", "optim.betas="),
        ("batch_size=null", "is not int"),
        ("batch_size=[", "batch_size=[ is not int"),
        ("batch_size", "'batch_size' is not key=value"),
        ("=3", "'=3' is not key=value"),
    ],
)
def test_a_bad_value(word: str, message: str) -> None:
    said(message, word)


@pytest.mark.parametrize(
    ("name", "range"),
    [
        ("epochs", "1 or more (default: null)"),
        ("steps", "1 or more (default: null)"),
        ("batch_size", "1 or more (default: 64)"),
        ("micro_batch_size", "1 or more, or auto (default: null)"),
        ("clip_norm", "greater than 0 (default: null)"),
        ("clip_value", "greater than 0 (default: null)"),
        ("start_timeout", "greater than 0 (default: 60.0)"),
        ("hang_timeout", "greater than 0 (default: 600.0)"),
        ("checkpoint.every_minutes", "greater than 0 (default: 30.0)"),
        ("eval.every", "1 or more (default: null)"),
    ],
)
@pytest.mark.parametrize("value", [0, -4])
def test_numbers_that_must_be_positive(name: str, range: str, value: int) -> None:
    said(f"{name}={value} must be {range}", f"{name}={value}")


@pytest.mark.parametrize("value", ["yes", "no", "on", "off", "Y", "t"])
@pytest.mark.parametrize(
    ("name", "types"),
    [("debug", "true|false|int"), ("init_partial", "true|false"), ("compile", "false|true|")],
)
def test_only_true_and_false_are_true_and_false(name: str, types: str, value: str) -> None:
    said(f"{name}={value} is not {types}", f"{name}={value}")


@pytest.mark.parametrize(
    "word", ["checkpoint.every=0", "checkpoint.keep=0", "log.every=0", "workers=-1", "eval.patience=0"]
)
def test_numbers_that_would_fail_later(word: str) -> None:
    said(word, word)
    said("must be", word)


# keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lrr=1", "optim.lrr is not a key of recipe resnet; did you mean optim.lr"),
        ("lr=0.1", "lr is optim.lr here: optim.lr=0.1"),
        ("model.lr=0.1", "optim.lr"),
        ("bacth_size=3", "did you mean batch_size"),
        ("optim=sgd", "it is a group: optim.name, optim.lr"),
        ("zzz=1", "`--help` lists the keys"),
    ],
)
def test_an_unknown_key_names_the_nearest(word: str, message: str) -> None:
    said(message, word)


def test_a_group_said_in_part_keeps_the_recipe_s_defaults() -> None:
    recipe: Any = resnet("optim.lr=0.5").recipe
    assert recipe.optim == Optim(lr=0.5, weight_decay=5e-4, nesterov=True)
    assert recipe.schedule.name == "cosine"
    assert resnet("schedule.warmup=3").recipe.schedule.name == "cosine"


def test_the_last_of_a_repeated_key_counts() -> None:
    assert resnet("seed=1", "seed=2").config.seed == 2


# files ------------------------------------------------------------------------------------------------------


def test_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: resnet\nbatch_size: 32\nseed: 5\noptim: {lr: 1e-3}\nmodel.depth: 34\n")
    settings = resolve([f"config={file}", "seed=6"], World())
    recipe: Any = settings.recipe
    assert (settings.config.batch_size, settings.config.micro_batch_size, settings.config.seed) == (32, 16, 6)
    assert (recipe.optim.lr, recipe.model.depth) == (1e-3, 34), "PyYAML reads 1e-3 as text"
    assert find_recipe("resnet").defaults["batch_size"] == 64 == resnet().config.batch_size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: resnet\nlrr: 1\n", "lrr is not a key of recipe resnet, in "),
        ("- 1\n", "must hold `key: value` lines, not a list"),
        ("a: [\n", "is not YAML"),
        ("recipe: resnet\nbatch_size: x\n", "batch_size=x is not int"),
    ],
)
def test_a_bad_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    said(message, "recipe=resnet", f"config={tmp_path / 'bad.yaml'}")


def test_an_absent_file() -> None:
    said("config=absent.yaml: there is no such file", "config=absent.yaml")


def test_config_yaml_starts_the_same_run_again(tmp_path: Path) -> None:
    words = [
        "recipe=resnet",
        "optim.lr=3e-4",
        "optim.nesterov=false",
        "schedule.name=multistep",
        "schedule.milestones=0.5,0.8",
    ]
    first = resolve([*words, "steps=70", "clip_norm=0.5", f"run_dir={tmp_path / 'run'}"], World())
    start_run_dir(tmp_path / "run", first, World())
    content = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert content["made_with"]["versions"]["torch"]
    assert {"git", "launcher", "world_size", "device"} <= content["made_with"].keys()
    again = resolve([f"config={tmp_path / 'run' / 'config.yaml'}"], World())
    assert again.recipe == first.recipe
    assert again.config.run_dir is None
    again.config.run_dir, again.config.config = first.config.run_dir, None
    assert again.config == first.config


# length, batches, combinations ------------------------------------------------------------------------------


def test_steps_and_epochs_replace_each_other(tmp_path: Path) -> None:
    assert (resnet().config.epochs, resnet().config.steps) == (10, None)
    assert (resnet("steps=7").config.epochs, resnet("steps=7").config.steps) == (None, 7)
    gpt = resolve(["recipe=gpt", "epochs=2"], World()).config
    assert (gpt.epochs, gpt.steps) == (2, None)
    said("epochs=2 and steps=7 are both set", "steps=7", "epochs=2")
    file = tmp_path / "steps.yaml"
    file.write_text("steps: 7\n")
    assert (resnet(f"config={file}").config.epochs, resnet(f"config={file}").config.steps) == (None, 7)
    assert (
        resnet(f"config={file}", "epochs=3").config.epochs,
        resnet(f"config={file}", "epochs=3").config.steps,
    ) == (3, None)
    said("say how long to train", f"recipe={TINY}:Sort")


def test_the_world_decides_what_auto_means() -> None:
    assert resnet().config.strategy == "single"
    assert resnet(world=FOUR).config.strategy == "ddp"
    said("strategy=single on 4 ranks", "strategy=single", world=FOUR)
    said("debug=true is one process", "debug=true", world=FOUR)


# recipes ----------------------------------------------------------------------------------------------------


# the run directory ------------------------------------------------------------------------------------------


def test_run_directories(tmp_path: Path) -> None:
    assert find_run_dir(resnet()).parts[:2] == ("runs", "resnet")
    settings = resnet(f"run_dir={tmp_path / 'run'}")
    assert find_run_dir(settings) == tmp_path / "run"
    start_run_dir(tmp_path / "run", settings, World())
    assert find_run_dir(settings) == tmp_path / "run", "the same command continues it"
    for word, message in (
        ("recipe=gpt", "belongs to recipe=resnet, not gpt"),
        ("resume=none", "would overwrite it"),
    ):
        with pytest.raises(ValueError, match=message):
            find_run_dir(resnet(f"run_dir={tmp_path / 'run'}", word))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        find_run_dir(resnet(f"run_dir={tmp_path / 'file'}"))
