"""A folder for PYTHONPATH in which `launch` is the real package, except that launch/run.py is stub_run.py."""

from __future__ import annotations

from pathlib import Path

from tests.launch.processes import ROOT

STUB = Path(__file__).with_name("stub_run.py")


def make_stub_home(home: Path) -> Path:
    """Fill the folder `home`; returns it."""
    package = home / "launch"
    package.mkdir(parents=True)
    real = str(ROOT / "launch")
    (package / "__init__.py").write_text(f"__path__.append({real!r})\n")
    (package / "run.py").symlink_to(STUB)
    return home
