"""The scripts under `tests/benchmarks`: each says what it measures and which options it has."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.launch.processes import COMMAND_TIMEOUT_S, ROOT

NAMES = sorted(
    path.name
    for path in (ROOT / "tests" / "benchmarks").glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
ASK_ALL = """
import contextlib, io, json, runpy, sys
answers = {}
for name in sys.argv[1:]:
    sys.argv, printed = [f"tests/benchmarks/{name}", "--help"], io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            code = runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    answers[name] = (code, printed.getvalue())
print(json.dumps(answers))
"""
"""one process for all of them: each imports torch"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str]]:
    """Exit code and output of `--help`, by script."""
    command = [sys.executable, "-c", ASK_ALL, *NAMES]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, tuple[int, str]] = json.loads(ended.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_help_tells_what_is_measured_and_each_option(answers: dict[str, tuple[int, str]], name: str) -> None:
    code, printed = answers[name]
    assert code == 0
    assert f"tests/benchmarks/{name}" in printed, "how it is called"
    assert "Options (key=value)" in printed
