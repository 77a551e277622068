"""The versions that a run is made with: packages, and the state of the code. No torch."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rankzero", "torch", "torchvision", "deepspeed", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter to a run."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def code_digest() -> str:
    """A digest of our own code as it stands on the disk, changed or not."""
    digest = hashlib.sha256()
    for folder in ("launch", "recipes", "slurm", "strategies"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def git_revision() -> str | None:
    """The commit of the working folder, with `-dirty` if it was changed since; None outside a repository."""
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", str(Path.cwd()), *describe]
    try:
        git = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return git.stdout.strip()
