"""Versions, code and environment: what a node runs, and whether all run the same."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.diagnostics.report import Finding, Report, Status, leaders_of, listed
from launch.runtime.versions import code_digest, versions

MUST = ("code", "rankzero", "torch", "nccl", "cuda", "deepspeed")
"""what must be equal; where others differ (driver, torchvision) a run may work, but not promise the same
numbers
"""
SHOWN = ("python", "torch", "nccl", "driver", "deepspeed", "code")
MATTERS = re.compile(
    r"(NCCL|GLOO|TORCH|PYTORCH|TP|MKL|CUBLAS|FI|UCX)_|(OMP_NUM_THREADS|PYTHONPATH|CUDA_DEVICE_ORDER|LD_PRELOAD)$"
)
BY_PLACE = re.compile(r"TORCHELASTIC_|TORCH_NCCL_ASYNC|.*(_IFNAME|_HCA)$")
"""set by torchrun, or rightly different where interfaces are named differently"""


def facts(environment: Mapping[str, str]) -> dict[str, Any]:
    """What this rank runs, and the variables that libraries read."""
    import torch

    built = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if built else None  # type: ignore[no-untyped-call]
    found = {
        **versions(),
        "code": code_digest(),
        "nccl": nccl,
        "cuda": torch.version.cuda,
        "driver": driver(),
    }
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return {
        "versions": {name: version for name, version in found.items() if version},
        "executable": sys.executable,
        "packages": str(Path(torch.__file__).parents[1]),
        "environment": {
            **{
                name: value
                for name, value in environment.items()
                if MATTERS.match(name) and not BY_PLACE.match(name)
            },
            # not the numbers: a launcher may give each task its own
            **(
                {"CUDA_VISIBLE_DEVICES": f"{len([part for part in visible.split(',') if part])} device(s)"}
                if visible
                else {}
            ),
        },
    }


def driver() -> str | None:
    """The version of the NVIDIA driver; None without one."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def same_versions(reports: list[Report]) -> list[Finding]:
    """Each package of which the nodes have different versions, or one row that says what all have."""
    leaders = leaders_of(reports)
    have = {node: report.facts["software"]["versions"] for node, report in leaders.items()}
    names = sorted({name for versions in have.values() for name in versions})
    apart = [
        different(name, {node: versions.get(name, "none") for node, versions in have.items()})
        for name in names
    ]
    found = [finding for finding in apart if finding]
    executables = {node: report.facts["software"]["executable"] for node, report in leaders.items()}
    if len(set(executables.values())) > 1 and not found:
        fix = "equal for now; one environment, at one path on all nodes, stays so"
        found.append(
            Finding(
                check="versions",
                status="warn",
                found=f"python is {said(executables)}",
                fix=fix,
                nodes=tuple(have),
            )
        )
    if not found:
        first = next(iter(have.values()))
        equal = ", ".join(f"{name} {first[name]}" for name in SHOWN if name in first)
        found.append(Finding(check="versions", found=equal, nodes=tuple(have)))
    return found


def different(name: str, values: Mapping[str, str]) -> Finding | None:
    """The finding for one package; None if all nodes have the same."""
    if len(set(values.values())) == 1:
        return None
    # most nodes are right, and where that is undecided the first one
    right = max(values.values(), key=lambda value: list(values.values()).count(value))
    wrong = [node for node, value in values.items() if value != right]
    install = f"pip install {name}=={right.partition('+')[0]}" if right != "none" else f"pip uninstall {name}"
    if name == "code":
        install = "the same checkout of rankzero (git status; git rev-parse HEAD), best on a shared disk,"
    elif name in ("python", "cuda", "nccl", "driver"):
        install = {"driver": f"the driver {right}"}.get(
            name, "the same Python environment (nccl and cuda come with torch)"
        )
    status: Status = "fail" if name in MUST else "warn"
    return Finding(
        check="versions",
        status=status,
        found=f"{name} is {said(values)}",
        fix=f"{install} on {listed(wrong)}",
        nodes=tuple(wrong),
    )


def said(values: Mapping[str, str]) -> str:
    """Different values, and which nodes have each."""
    nodes: dict[str, list[str]] = {}
    for node, value in values.items():
        nodes.setdefault(value, []).append(node)
    return "; ".join(f"{value} on {listed(names)}" for value, names in nodes.items())


def same_environment(reports: list[Report]) -> list[Finding]:
    """The variables that differ among the ranks' nodes."""
    leaders = leaders_of(reports)
    have = {node: report.facts["software"]["environment"] for node, report in leaders.items()}
    names = sorted({name for variables in have.values() for name in variables})
    values = {
        name: {node: variables.get(name, "not set") for node, variables in have.items()} for name in names
    }
    apart = {name: each for name, each in values.items() if len(set(each.values())) > 1}
    if not apart:
        alike = (
            f"{listed(names, 'variables')}{', alike' if len(have) > 1 else ''}"
            if names
            else "no NCCL_*, GLOO_*, ... is set"
        )
        return [Finding(check="environment", found=alike, nodes=tuple(have))]
    fix = "export it before the launcher, not in one node's profile; srun passes the variables of the shell on (--export=ALL)"
    return [
        Finding(check="environment", status="warn", found=f"{name}: {said(each)}", fix=fix, nodes=tuple(have))
        for name, each in apart.items()
    ]
