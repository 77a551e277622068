"""The README tells the truth: its recipe trains, its commands run, what it names is there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch.cli.config import Config
from launch.cli.keys import keys_of
from tests.launch.processes import COMMAND_TIMEOUT_S, ROOT, run_command
from tests.launch.runs import uninterrupted_losses

README = (ROOT / "README.md").read_text()
SHORT = {  # nothing is evaluated, and the largest model is small
    "resnet": ("data.val=0", "data.test=0", "batch_size=16", "micro_batch_size=4"),
    "mnist": ("data.val=0", "data.test=0"),
    "gpt": ("data.val=0", "data.test=0", "model.layers=1"),
    "./mine.py": (),
}


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Each line of the bash blocks, as words; `a && b` is two."""
    lines = [part for block in blocks("bash") for line in block.splitlines() for part in line.split("&&")]
    return [shlex.split(line) for line in lines]


def runs() -> list[list[str]]:
    """The commands that call launch/run.py."""
    return [words for words in commands() if "launch/run.py" in words]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the README's recipe."""
    (tmp_path / "mine.py").write_text(blocks("python")[0])
    return tmp_path


def test_the_recipe_has_about_forty_lines() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 45


def test_the_recipe_trains_alike_on_one_and_two_ranks(folder: Path) -> None:
    words = (f"recipe={folder / 'mine.py'}", "steps=20")
    one, two = (uninterrupted_losses(folder / str(ranks), *words, ranks=ranks) for ranks in (1, 2))
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_every_run_runs(folder: Path) -> None:
    """In the order of the page: one continues another."""
    known: set[str] = set()
    for words in runs():
        ranks = next(
            (int(word.partition("=")[2]) for word in words if word.startswith("--nproc_per_node")), 0
        )
        said = words[words.index("launch/run.py") + 1 :]
        recipe = next(word.partition("=")[2] for word in said if word.startswith("recipe="))
        run_dir = next((word for word in said if word.startswith("run_dir=")), "")
        steps = 2 if run_dir in known else 1
        known |= {run_dir} - {""}
        short = () if "--help" in said else (*SHORT[recipe], f"steps={steps}")
        ended = run_command(*said, *short, cwd=folder, ranks=ranks)
        assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stderr}"
        if short and recipe == "./mine.py":
            assert "test/accuracy" in ended.stdout
        if steps == 2:
            assert "continues" in ended.stdout


@pytest.mark.slow
def test_every_look_into_checkpoints_works(folder: Path) -> None:
    assert (
        run_command(
            "recipe=./mine.py", "steps=4", "checkpoint.every=2", "run_dir=runs/a", cwd=folder
        ).returncode
        == 0
    )
    shutil.copytree(folder / "runs" / "a", folder / "runs" / "b")
    looks = [words for words in commands() if "launch/commands/ckpt.py" in words]
    said = {words[words.index("launch/commands/ckpt.py") + 1] for words in looks}
    assert said == {"list", "inspect", "verify", "export", "diff", "prune"}
    for words in looks:
        program = [
            sys.executable,
            str(ROOT / "launch" / "commands" / "ckpt.py"),
            *words[words.index("launch/commands/ckpt.py") + 1 :],
        ]
        ended = subprocess.run(
            program, cwd=folder, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
        assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stderr}"
    assert (folder / "weights.pt").is_file()


@pytest.mark.slow
def test_the_recipe_passes_parity(folder: Path) -> None:
    parity = [
        sys.executable,
        str(ROOT / "launch" / "commands" / "parity.py"),
        "recipe=./mine.py",
        "strategies=ddp",
        "compare=2",
    ]
    ended = subprocess.run(
        parity, cwd=folder, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    assert len(runs()) > 5
    for words in commands():
        tested = {"run.py", "parity.py", "ckpt.py", "resume_check.py", "doctor.py", "profile.py"}
        tested |= {"train.sbatch", "submit.py", "pip", "pytest"}
        tested &= {Path(word).name for word in words}
        assert tested, f"no test runs: {shlex.join(words)}"


def test_the_extras_that_pip_is_asked_for_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r'pip install -e "\.\[(\w+)\]"', README)
    assert {"test", "tested"} <= set(asked) <= set(extras) == {"test", "tested", "peers"}


def test_the_batch_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "slurm" / "train.sbatch")], check=True)


def test_the_mistake_reads_as_shown(folder: Path) -> None:
    shown = re.search(r"^\$ python launch/run\.py (.*)\n(rankzero: .*)$", README, re.MULTILINE)
    assert shown is not None
    ended = run_command(*shlex.split(shown[1]), cwd=folder)
    assert (ended.returncode, ended.stderr) == (2, shown[2] + "\n")


@pytest.mark.slow
def test_the_weights_load_in_three_lines(folder: Path) -> None:
    words = ("batch_size=2", "micro_batch_size=2", "steps=1", "run_dir=run")
    ended = run_command("recipe=resnet", *SHORT["resnet"][:2], *words, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    code = re.sub(r'"runs/.*?/model\.safetensors"', f'"{folder}/run/model.safetensors"', blocks("python")[1])
    assert str(folder) in code
    exec(compile(code, "README.md", "exec"), {})


def test_the_keys_of_the_table_exist() -> None:
    table = README[README.index("| key |") : README.index("## What is promised")]
    named = {
        name
        for row in re.findall(r"^\| .*", table, re.M)
        for name in re.findall(r"`([\w.*]+)`", row.split("|")[1])
    }
    keys = {key.name for key in keys_of(Config)}
    recipes = {"model.*", "data.*", "optim.*", "schedule.*"}
    assert len(named) > 15
    assert not {
        n for n in named - recipes if n not in keys and not any(key.startswith(n.rstrip("*")) for key in keys)
    }


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    assert links
    assert not [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]
