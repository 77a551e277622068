"""Which GPU each rank gets, and who is on it already. Asks `nvidia-smi`: making a CUDA context would itself
take up memory.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from launch.diagnostics.report import Finding, Report, Status, by_value, listed, nodes_of
from launch.runtime.world import World, find_device

SMI = 10.0
"""seconds that nvidia-smi gets; without the persistence daemon it wakes the driver first"""
BUSY = 0.1
"""part of a GPU's memory from which on its use by others fails: a run would end there by lack of memory"""


def facts(world: World, environment: Mapping[str, str]) -> dict[str, Any]:
    """The device of this rank, as a run would choose it, and what torch sees."""
    import torch

    device, problem = "cpu", ""
    try:
        device = find_device(world)
    except ValueError as error:
        problem = str(error)
    return {
        "device": device,
        "problem": problem,
        "count": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "visible": environment.get("CUDA_VISIBLE_DEVICES"),
        "cuda": torch.version.cuda,
    }


def ask(*words: str) -> list[list[str]]:
    """The lines of an nvidia-smi query, cut at the commas; none without nvidia-smi."""
    asked = ["nvidia-smi", *words, "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(asked, capture_output=True, text=True, timeout=SMI, check=True)
        return [
            [cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()
        ]
    return []


def present() -> list[dict[str, Any]]:
    """The GPUs of this node. Memory is in MiB; 0 where it is not told."""
    rows = ask("--query-gpu=index,uuid,name,memory.used,memory.total")
    return [
        {"index": index, "uuid": uuid, "name": name, "used": whole(used), "total": whole(total)}
        for index, uuid, name, used, total in rows
    ]


def whole(text: str) -> int:
    """A number of nvidia-smi's, which says [N/A] where it has none."""
    return int(text) if text.isdecimal() else 0


def visible(gpus: list[dict[str, Any]], said: str | None) -> list[dict[str, Any]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order."""
    if said is None:
        return gpus
    words = [word.strip() for word in said.split(",") if word.strip()]
    return [gpu for word in words for gpu in gpus if word == gpu["index"] or gpu["uuid"].startswith(word)]


def in_use(gpus: list[dict[str, Any]], said: str | None) -> Iterator[Finding]:
    """Processes of others on our GPUs, and memory that nobody seen from here explains."""
    ours = visible(gpus, said)
    if not ours:
        return
    apps = [
        (uuid, pid, name) for uuid, pid, name, *_ in ask("--query-compute-apps=gpu_uuid,pid,process_name")
    ]
    free = True
    for gpu in ours:
        others = [(pid, name) for uuid, pid, name in apps if uuid == gpu["uuid"] and not is_ours(pid)]
        part = gpu["used"] / max(gpu["total"], 1)
        if not others and part < BUSY:
            continue
        free = False
        who = (
            listed([f"{pid} ({name})" for pid, name in others], "processes")
            or "processes not seen from here (a container?)"
        )
        fix = (
            f"end them, if they are left-overs of yours: kill {' '.join(pid for pid, _ in others)}"
            if others
            else "ask who has it"
        )
        yield Finding(
            check="GPUs in use",
            status="fail" if part >= BUSY else "warn",
            found=f"GPU {gpu['index']}: {gpu['used']:,} of {gpu['total']:,} MiB, {who}",
            fix=f"{fix}; or take other GPUs (CUDA_VISIBLE_DEVICES)",
        )
    if free:
        yield Finding(check="GPUs in use", found="by nobody")


def is_ours(pid: str) -> bool:
    """Whether it is a rank of this very doctor: they have one parent."""
    with contextlib.suppress(psutil.Error, ValueError):
        return int(pid) == os.getpid() or psutil.Process(int(pid)).ppid() == os.getppid()
    return False


def mapped(reports: list[Report]) -> list[Finding]:
    """GPU to rank, on each node; and whether the nodes have the same GPUs."""
    values: dict[str, tuple[Status, str, str]] = {}
    kinds: dict[str, str] = {}
    for node, mine in nodes_of(reports).items():
        gpus, first = mine[0].facts["gpus"], mine[0].facts["gpu"]
        kinds[node] = kind(gpus, first)
        values[node] = of_node(mine, gpus, kinds[node])
    found = by_value("GPUs", values)
    if len(set(kinds.values())) > 1:
        none = [node for node, words in kinds.items() if words == "none"]
        words = "; ".join(f"{node} {words}" for node, words in list(kinds.items())[:8])
        fix = (
            f"leave out {listed(none)}"
            if none
            else "the slowest GPU sets the pace, the smallest the batch: nodes of one kind"
        )
        found = [finding for finding in found if finding.status != "pass"]
        found.append(
            Finding(
                check="GPUs",
                status="fail" if none else "warn",
                found=f"the nodes differ: {words}",
                fix=fix,
                nodes=tuple(kinds),
            )
        )
    return found


def kind(gpus: list[dict[str, Any]], first: Mapping[str, Any]) -> str:
    """The GPUs of a node in words, from what nvidia-smi says and, without it, from what torch says."""
    ours = visible(gpus, first["visible"])
    if not first["count"]:
        return "none"
    return f"{first['count']} x {ours[0]['name']}" if ours else f"{first['count']} GPU(s)"


def of_node(mine: list[Report], gpus: list[dict[str, Any]], kind: str) -> tuple[Status, str, str]:
    """Status, what was found, and the fix, for the ranks of one node."""
    first = mine[0].facts["gpu"]
    if not first["count"] and visible(gpus, first["visible"]):
        built = (
            f"built for CUDA {first['cuda']}: the driver is too old for it, or broken"
            if first["cuda"]
            else "built without CUDA"
        )
        return (
            "fail",
            f"nvidia-smi sees {len(gpus)} GPU(s), torch none",
            f"torch is {built}; install the torch that fits the driver",
        )
    if problems := [report.facts["gpu"]["problem"] for report in mine if report.facts["gpu"]["problem"]]:
        return "fail", *problems[0].partition("; ")[::2]
    if not first["count"]:
        return "pass", "none: ranks run on the CPU, by gloo", ""
    places: dict[str, list[str]] = {}
    for report in mine:
        fact = report.facts["gpu"]
        own, index = visible(gpus, fact["visible"]), int(fact["device"].partition(":")[2] or 0)
        places.setdefault(
            f"GPU {own[index]['index']}" if index < len(own) else f"{fact['device']}", []
        ).append(str(report.rank))
    words = ", ".join(f"rank {' and '.join(ranks)}: {place}" for place, ranks in places.items())
    if any(len(ranks) > 1 for ranks in places.values()):
        return (
            "fail",
            words,
            "one rank a GPU: NCCL refuses two (srun --gpus-per-task=1, or torchrun --nproc_per_node=GPUs)",
        )
    return "pass", f"{kind}; {words}", ""
