"""The house plan: where things stand, and which way imports flow."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "strategies", "recipes")
MAY_IMPORT = {
    "launch": {"launch", "strategies", "recipes"},
    "strategies": {"strategies"},
    "recipes": {"recipes"},
    "slurm": {"slurm", "launch"},
}
TOP_LEVEL = {
    *("launch", "strategies", "recipes", "slurm", "tests"),
    *("pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", ".ci", ".gitignore"),
}
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LINES, RECIPE_LINES, ENTRIES = 300, 150, 16
STOREYS = (
    {"runtime"},
    {"cli"},
    {"data"},
    {"state"},
    {"checkpoint"},
    {"watchdog"},
    {"reporting"},
    {"training"},
    {"profiling", "equivalence", "diagnostics"},
    {"commands"},
)
"""the folders of launch/ from the ground up: a file imports from its own folder and from storeys below"""


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it, relative ones as absolute."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_flow_one_way(folder: str) -> None:
    ours = {*MAY_IMPORT, "tests"}
    wrong = {
        f"{name_of(path)} imports {module}"
        for path in files(folder)
        for module in imported(path)
        if module.partition(".")[0] in ours - MAY_IMPORT[folder]
    }
    assert not wrong


def test_imports_inside_launch_flow_down() -> None:
    height = {folder: level for level, storey in enumerate(STOREYS) for folder in storey}
    folders = {path.name for path in (ROOT / "launch").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(height)
    wrong = set()
    for path in files("launch"):
        folder = path.relative_to(ROOT / "launch").parts[0]
        if folder not in height:  # run.py and __main__.py stand on top of the house
            continue
        for module in imported(path):
            package, _, rest = module.partition(".")
            other = rest.partition(".")[0]
            if package != "launch" or other == folder or (other in height and height[other] < height[folder]):
                continue
            if other:  # `from launch import x` is read as launch and launch.x
                wrong.add(f"{name_of(path)} imports {module}")
    assert not wrong


def test_no_file_imports_itself_by_a_detour() -> None:
    """A reader must hold a cycle in mind at once; imports inside functions count too."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files(*MAY_IMPORT)}
    graph = {
        name: {module for module in imported(path) if module in modules and module != name}
        for name, path in modules.items()
    }
    order = TopologicalSorter(graph)
    order.prepare()  # raises CycleError with the modules of a cycle


def test_the_top_of_launch_is_seen_at_a_glance() -> None:
    entries = {
        path.name
        for path in (ROOT / "launch").iterdir()
        if path.is_file() or (path / "__init__.py").is_file()
    }
    assert len(entries) <= ENTRIES, entries


def test_nothing_is_pickled() -> None:
    """A torch file is read without its pickles (weights_only), and none is written."""
    wrong = {
        f"{name_of(path)} imports {m}"
        for path in files(*PACKAGES)
        for m in imported(path)
        if m.partition(".")[0] in PICKLERS
    }
    for path in files(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                asked = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if asked.get("weights_only") != "True":
                    wrong.add(f"{name_of(path)}:{node.lineno} torch.load without weights_only=True")
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.save":
                wrong.add(f"{name_of(path)}:{node.lineno} torch.save")
        wrong |= {
            f"{name_of(path)} imports {module}"
            for module in imported(path)
            if module in ("torch.save", "torch.load")
        }
    assert not wrong


def test_the_top_level_holds_what_was_agreed() -> None:
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a git repository")
    assert {line.partition("/")[0] for line in found.stdout.splitlines()} <= TOP_LEVEL


def test_files_are_short() -> None:
    lengths = {
        name_of(path): len(path.read_text().splitlines()) for path in files(*PACKAGES, "slurm", "tests")
    }
    recipes = {name: lines for name, lines in lengths.items() if Path(name).parent == Path("recipes")}
    assert recipes, "the test sees nothing"
    assert not {name: lines for name, lines in recipes.items() if lines > RECIPE_LINES}
    assert not {name: lines for name, lines in lengths.items() if lines > LINES}


def test_start_up_imports_nothing_heavy() -> None:
    """What `run.py` and the recipes import as modules, and so on, is read before a wrong key is answered."""
    heavy = {
        "torch",
        "torchvision",
        "torchmetrics",
        "deepspeed",
        "accelerate",
        "numpy",
        "sklearn",
        "safetensors",
        "pydantic",
    }
    commands = (ROOT / "launch" / "commands").glob("*.py")  # imported by name, when asked for
    waiting = [ROOT / "launch" / "run.py", *commands, *(ROOT / "recipes").glob("*.py")]
    seen, wrong = set(waiting), set()
    while waiting:
        path = waiting.pop()
        for module in at_once(ast.parse(path.read_text()).body):
            if module.partition(".")[0] in heavy:
                wrong.add(f"{name_of(path)} imports {module}")
            inside = ROOT.joinpath(*module.split("."))
            found = {
                file for file in (inside.with_suffix(".py"), inside / "__init__.py") if file.is_file()
            } - seen
            waiting += found
            seen |= found
    assert ROOT / "launch" / "cli" / "resolve.py" in seen, "the test sees nothing"
    assert not wrong


def at_once(body: list[ast.stmt]) -> Iterator[str]:
    """What is imported when a module is: not under `if TYPE_CHECKING`, not in functions."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Try):
            yield from at_once(node.body)
