"""The documentation tells the truth: its recipe trains, its commands run, what it names is there."""

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
from tests.launch.processes import COMMAND_TIMEOUT_S, ROOT
from tests.launch.runs import uninterrupted_losses

README, LAUNCH = (ROOT / "README.md").read_text(), (ROOT / "launch" / "README.md").read_text()
FOLDERS = ("launch", "strategies", "recipes", "slurm", "tests")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")))
)
ELSEWHERE = ("pip", "pytest", ".ci/run", "ruff", "mypy", "sbatch", "git")
"""programs whose lines are not run here: CI does that, or tests/slurm over real daemons"""
SMALL = {  # nothing is evaluated, and the largest model is small
    "resnet": ("data.val=0", "data.test=0", "batch_size=16", "micro_batch_size=4"),
    "mnist": ("data.val=0", "data.test=0"),
    "gpt": ("data.val=0", "data.test=0", "model.layers=1"),
    "gan": ("data.val=0", "data.test=0"),
    "./mine.py": (),
}
SHORT = {
    "parity": ("strategies=ddp", "compare=2"),
    "resume_check": ("strategies=single", "compare=4"),
    "profile": ("profile_steps=1",),
    "doctor": (),
    "submit": ("dry_run=true",),
}
"""what keeps a documented command short; the last of a repeated key counts"""


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """Each line of the bash blocks of a page as arguments, without comments; `a && b` is two."""
    lines = [
        part for block in blocks(page, "bash") for line in block.splitlines() for part in line.split("&&")
    ]
    return [argv for line in lines if (argv := shlex.split(line, comments=True))]


def documented(*names: str) -> list[list[str]]:
    """[ranks, command, *arguments] of each documented command of these names, once."""
    found = {tuple(parsed): None for page in PAGES for argv in commands(page) if (parsed := parse(argv))}
    return [list(parsed) for parsed in found if parsed[1] in names]


def parse(argv: list[str]) -> list[str] | None:
    """[ranks, command, *arguments] of a line that starts one of ours; None for another program."""
    program = next((index for index, word in enumerate(argv) if is_ours(argv, index)), None)
    if program is None:
        return None
    torchrun = argv[0] == "torchrun"
    ranks = next(
        (word.partition("=")[2] for word in argv if torchrun and word.startswith("--nproc_per_node=")), "0"
    )
    if argv[program] == "launch/run.py":
        return [ranks, "run.py", *argv[program + 1 :]]
    return [ranks, *(argv[program + 1 :] or ["--help"])]


def is_ours(argv: list[str], index: int) -> bool:
    """Whether that word of a line is our program: `rankzero`, `-m launch` or `launch/run.py`."""
    return argv[index] in ("rankzero", "launch/run.py") or argv[index - 1 : index + 1] == ["-m", "launch"]


def run(ranks: str, command: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A documented command, as a user starts it; fails the test unless it ends well."""
    ours = [str(ROOT / "launch" / "run.py")] if command == "run.py" else ["-m", "launch", command]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    argv = [sys.executable, *(torchrun if ranks != "0" else []), *ours, *arguments]
    ended = subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    assert ended.returncode == 0, f"{shlex.join(argv)}\n{ended.stdout}{ended.stderr}"
    return ended


def small(arguments: list[str]) -> tuple[str, ...]:
    """Keys that keep the recipe of a command small."""
    recipe = next((word.partition("=")[2] for word in arguments if word.startswith("recipe=")), "")
    return SMALL[recipe] if recipe else ()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the README's recipe."""
    (tmp_path / "mine.py").write_text(blocks("README.md", "python")[0])
    return tmp_path


def test_the_recipe_has_about_forty_lines() -> None:
    assert len([line for line in blocks("README.md", "python")[0].splitlines() if line.strip()]) <= 45


def test_the_first_page_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_recipe_trains_alike_on_one_and_two_ranks(folder: Path) -> None:
    words = (f"recipe={folder / 'mine.py'}", "steps=20")
    one, two = (uninterrupted_losses(folder / str(ranks), *words, ranks=ranks) for ranks in (1, 2))
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_every_run_runs(folder: Path) -> None:
    """In the order of the pages: one continues another."""
    steps: dict[str, int] = {}
    trains = documented("run.py", "train")
    assert len(trains) > 8
    for ranks, command, *arguments in trains:
        run_dir = next((word for word in arguments if word.startswith("run_dir=")), "")
        steps[run_dir] = steps.get(run_dir, 0) + 1 if run_dir else 1
        short = () if "--help" in arguments else (*small(arguments), f"steps={steps[run_dir]}")
        ended = run(ranks, command, *arguments, *short, cwd=folder)
        if short and "recipe=./mine.py" in arguments and "debug=true" not in arguments:
            assert "test/loss" in ended.stdout
        if steps[run_dir] > 1 and run_dir:
            assert "continues" in ended.stdout


@pytest.mark.slow
def test_every_look_into_checkpoints_works(folder: Path) -> None:
    run("0", "train", "recipe=./mine.py", "steps=4", "checkpoint.every=2", "run_dir=runs/a", cwd=folder)
    shutil.copytree(folder / "runs" / "a", folder / "runs" / "b")
    looks = documented("ckpt")
    assert {arguments[0] for _, _, *arguments in looks} >= {
        "list",
        "inspect",
        "verify",
        "export",
        "diff",
        "prune",
    }
    for ranks, command, *arguments in looks:
        run(ranks, command, *arguments, cwd=folder)
    assert (folder / "weights.safetensors").is_file()


@pytest.mark.slow
def test_every_other_command_runs(folder: Path) -> None:
    others = documented(*SHORT)
    assert {command for _, command, *_ in others} == set(SHORT)
    for ranks, command, *arguments in others:
        if arguments[:1] in (["status"], ["cancel"]):
            continue  # of a job that is queued: tests/slurm asks for them
        short = () if "--help" in arguments else SHORT[command]
        size = small(arguments) if command in ("profile", "resume_check") else ()
        run(ranks, command, *arguments, *size, *short, cwd=folder)


def test_every_command_is_one_that_a_test_runs() -> None:
    for page in PAGES:
        for argv in commands(page):
            ours = parse(argv)
            known = {"run.py", "train", "ckpt", "--help", *SHORT}
            assert ours[1] in known if ours else argv[0] in ELSEWHERE, (
                f"{page}: no test runs {shlex.join(argv)}"
            )


def test_the_extras_that_pip_is_asked_for_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {
        name
        for page in PAGES
        for name in re.findall(r'pip install -e "\.\[(\w+)\]"', (ROOT / page).read_text())
    }
    assert {"test", "tested"} <= asked <= set(extras) == {"test", "tested", "peers"}


def test_the_batch_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "slurm" / "train.sbatch")], check=True)


def test_the_mistake_reads_as_shown(folder: Path) -> None:
    shown = re.search(r"^\$ rankzero (.*)\n(rankzero: .*)$", README, re.MULTILINE)
    assert shown is not None
    argv = [sys.executable, "-m", "launch", *shlex.split(shown[1])]
    ended = subprocess.run(
        argv, cwd=folder, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    assert (ended.returncode, ended.stderr) == (2, shown[2] + "\n")


@pytest.mark.slow
def test_the_weights_load_in_three_lines(folder: Path) -> None:
    short = ("batch_size=2", "micro_batch_size=2", "steps=1", "run_dir=run")
    run("0", "train", "recipe=resnet", *SMALL["resnet"][:2], *short, cwd=folder)
    block = blocks("launch/checkpoint/README.md", "python")[0]
    code = re.sub(r'"runs/.*?/model\.safetensors"', f'"{folder}/run/model.safetensors"', block)
    assert str(folder) in code
    exec(compile(code, "README.md", "exec"), {})


def test_the_keys_of_the_table_exist() -> None:
    table = LAUNCH[LAUNCH.index("| key |") : LAUNCH.index("## Debug mode")]
    rows = re.findall(r"^\| .*", table, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([\w.*]+)`", row.split("|")[1])}
    keys = {key.name for key in keys_of(Config)}
    recipes = {"model.*", "data.*", "optim.*", "schedule.*"}
    assert len(named) > 15
    assert not {
        n for n in named - recipes if n not in keys and not any(key.startswith(n.rstrip("*")) for key in keys)
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    assert not [
        link
        for link in links
        if not link.startswith("https://") and not (ROOT / page).parent.joinpath(link).exists()
    ]


def test_each_folder_that_users_enter_has_a_page() -> None:
    assert {"README.md", "launch/README.md", "launch/checkpoint/README.md", "recipes/README.md"} < set(PAGES)
    assert {"slurm/README.md", "strategies/README.md", "tests/benchmarks/README.md"} < set(PAGES)
