"""What a run was made with: package versions and the state of the code."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rankzero", "torch", "torchvision", "deepspeed", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter to a run."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """A digest of our own code as it stands on the disk, changed or not."""
    digest = hashlib.sha256()
    for folder in ("launch", "recipes", "slurm", "strategies"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def git_revision() -> str | None:
    """The commit of the working folder, with `-dirty` if it was changed since; None outside a repository."""
    try:
        asked = [
            "git",
            "-C",
            str(Path.cwd()),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
            "--exclude=*",
        ]
        return subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
