"""A folder for PYTHONPATH in which `launch` is the real package, but for launch/run.py and its __main__."""

from __future__ import annotations

from pathlib import Path

from tests.launch.processes import ROOT

HERE = Path(__file__).parent


def make_stub_home(home: Path) -> Path:
    """Fill the folder `home`; returns it."""
    package = home / "launch"
    package.mkdir(parents=True)
    real = str(ROOT / "launch")
    (package / "__init__.py").write_text(f"__path__.append({real!r})\n")
    (package / "run.py").symlink_to(HERE / "stub_run.py")
    (package / "__main__.py").symlink_to(HERE / "stub_main.py")
    return home
