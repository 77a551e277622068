"""Versions, code and environment variables: what a node runs, and whether all run the same."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from launch.diagnostics.findings import Finding, first_names
from launch.diagnostics.rank_report import RankReport, group_by_node
from launch.diagnostics.system_info import SoftwareInfo
from launch.runtime.versions import code_digest, versions

MUST_BE_EQUAL = ("code", "rankzero", "torch", "nccl", "cuda", "deepspeed")
"""where others differ (driver, torchvision) a run may work, but not give the same numbers"""
PRINTED = ("python", "torch", "nccl", "driver", "deepspeed", "code")
RELEVANT = re.compile(
    r"(NCCL|GLOO|TORCH|PYTORCH|TP|MKL|CUBLAS|FI|UCX)_|(OMP_NUM_THREADS|PYTHONPATH|CUDA_DEVICE_ORDER|LD_PRELOAD)$"
)
"""variables that libraries read"""
MAY_DIFFER = re.compile(r"TORCHELASTIC_|TORCH_NCCL_ASYNC|.*(_IFNAME|_HCA)$")
"""set by torchrun, or rightly different where interfaces are named differently"""


def software_info(environment: Mapping[str, str]) -> SoftwareInfo:
    """What this rank runs, and the variables that libraries read."""
    import torch

    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None  # type: ignore[no-untyped-call]
    installed = {
        **versions(),
        "code": code_digest(),
        "nccl": nccl,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }
    variables = {
        name: value
        for name, value in environment.items()
        if RELEVANT.match(name) and not MAY_DIFFER.match(name)
    }
    if visible := environment.get("CUDA_VISIBLE_DEVICES"):
        # how many, not which: a launcher may give each task its own
        count = len([device for device in visible.split(",") if device])
        variables["CUDA_VISIBLE_DEVICES"] = f"{count} device(s)"
    return SoftwareInfo(
        versions={name: version for name, version in installed.items() if version},
        executable=sys.executable,
        site_packages=str(Path(torch.__file__).parents[1]),
        environment=variables,
    )


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None without one."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def software_by_node(reports: list[RankReport]) -> dict[str, SoftwareInfo]:
    """What each node runs, from its first rank that could report it."""
    return {
        node: infos[0]
        for node, members in group_by_node(reports).items()
        if (infos := [member.software for member in members if member.software])
    }


def version_findings(reports: list[RankReport]) -> list[Finding]:
    """Each package of which the nodes have different versions, or one finding with what all have."""
    software = software_by_node(reports)
    if not software:
        return []
    names = sorted({name for info in software.values() for name in info.versions})
    by_package = {
        name: {node: info.versions.get(name, "none") for node, info in software.items()} for name in names
    }
    differing = {name: values for name, values in by_package.items() if len(set(values.values())) > 1}
    if differing:
        return [differing_versions(name, values) for name, values in differing.items()]
    executables = {node: info.executable for node, info in software.items()}
    if len(set(executables.values())) > 1:
        return [
            Finding(
                check="versions",
                status="warn",
                message=f"python is {nodes_by_value(executables)}",
                fix="equal for now; one environment, at one path on all nodes, stays so",
                nodes=tuple(software),
            )
        ]
    first = next(iter(software.values())).versions
    message = ", ".join(f"{name} {first[name]}" for name in PRINTED if name in first)
    return [Finding(check="versions", message=message, nodes=tuple(software))]


def differing_versions(name: str, values: Mapping[str, str]) -> Finding:
    """The finding for one package; `values` are the versions by node."""
    # the most frequent one is taken for right; among equally frequent ones, that of the first node
    right = Counter(values.values()).most_common(1)[0][0]
    wrong = [node for node, value in values.items() if value != right]
    install = f"pip install {name}=={right.partition('+')[0]}" if right != "none" else f"pip uninstall {name}"
    if name == "code":
        install = "the same checkout of rankzero (git status; git rev-parse HEAD), best on a shared disk,"
    elif name == "driver":
        install = f"the driver {right}"
    elif name in ("python", "cuda", "nccl"):
        install = "the same Python environment (nccl and cuda come with torch)"
    return Finding(
        check="versions",
        status="fail" if name in MUST_BE_EQUAL else "warn",
        message=f"{name} is {nodes_by_value(values)}",
        fix=f"{install} on {first_names(wrong)}",
        nodes=tuple(wrong),
    )


def nodes_by_value(values: Mapping[str, str]) -> str:
    """The different values, and which nodes have each; `values` are by node."""
    nodes: dict[str, list[str]] = {}
    for node, value in values.items():
        nodes.setdefault(value, []).append(node)
    return "; ".join(f"{value} on {first_names(names)}" for value, names in nodes.items())


def environment_findings(reports: list[RankReport]) -> list[Finding]:
    """The environment variables that differ among the nodes, or one finding with those that are set."""
    software = software_by_node(reports)
    if not software:
        return []
    names = sorted({name for info in software.values() for name in info.environment})
    by_variable = {
        name: {node: info.environment.get(name, "not set") for node, info in software.items()}
        for name in names
    }
    differing = {name: values for name, values in by_variable.items() if len(set(values.values())) > 1}
    if differing:
        fix = (
            "export it before the launcher, not in one node's profile; srun passes on the variables of "
            "the shell (--export=ALL)"
        )
        return [
            Finding(
                check="environment",
                status="warn",
                message=f"{name}: {nodes_by_value(values)}",
                fix=fix,
                nodes=tuple(software),
            )
            for name, values in differing.items()
        ]
    equal = ", equal on all nodes" if len(software) > 1 else ""
    message = f"set: {first_names(names, 'variables')}{equal}" if names else "no NCCL_*, GLOO_*, ... is set"
    return [Finding(check="environment", message=message, nodes=tuple(software))]
