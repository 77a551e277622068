"""Which GPU each rank gets, and who already uses it. Asks `nvidia-smi`: creating a CUDA context would itself
take memory.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping

import psutil

from launch.diagnostics.findings import Finding, Outcome, first_names, merge_equal
from launch.diagnostics.rank_report import RankReport, group_by_node
from launch.diagnostics.system_info import GPU, DeviceInfo
from launch.runtime.world import World, find_device

NVIDIA_SMI_TIMEOUT_S = 10.0
"""without the persistence daemon nvidia-smi wakes the driver first"""
BUSY_FRACTION = 0.1
"""of a GPU's memory, from which on its use by others fails: a run would end there with out-of-memory"""
MAX_KINDS = 8
"""nodes that are named where their GPUs differ"""


def device_info(world: World, environment: Mapping[str, str]) -> DeviceInfo:
    """The device of this rank, as a run would choose it, and what torch sees."""
    import torch

    device, error = "cpu", ""
    try:
        device = find_device(world)
    except ValueError as mistake:
        error = str(mistake)
    return DeviceInfo(
        device=device,
        error=error,
        gpu_count=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        visible_devices=environment.get("CUDA_VISIBLE_DEVICES"),
        cuda_version=torch.version.cuda,
    )


# nvidia-smi -------------------------------------------------------------------------------------------------


def query_nvidia_smi(query: str) -> list[list[str]]:
    """The lines of an nvidia-smi query, split at the commas; none without nvidia-smi."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True
        )
        lines = [line for line in process.stdout.splitlines() if line.strip()]
        return [[cell.strip() for cell in line.split(",")] for line in lines]
    return []


def list_gpus() -> list[GPU]:
    """The GPUs of this node."""
    return [
        GPU(index=index, uuid=uuid, name=name, used_mib=parse_mib(used), total_mib=parse_mib(total))
        for index, uuid, name, used, total in query_nvidia_smi(
            "--query-gpu=index,uuid,name,memory.used,memory.total"
        )
    ]


def parse_mib(text: str) -> int:
    """A number of nvidia-smi's; 0 where it prints [N/A]."""
    return int(text) if text.isdecimal() else 0


def visible_gpus(gpus: list[GPU], visible_devices: str | None) -> list[GPU]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order."""
    if visible_devices is None:
        return gpus
    entries = [entry.strip() for entry in visible_devices.split(",") if entry.strip()]
    return [gpu for entry in entries for gpu in gpus if entry == gpu.index or gpu.uuid.startswith(entry)]


# use by others ----------------------------------------------------------------------------------------------


def check_gpus_in_use(gpus: list[GPU], visible_devices: str | None) -> Iterator[Finding]:
    """Other processes on this node's visible GPUs, and memory that no process seen from here explains."""
    visible = visible_gpus(gpus, visible_devices)
    if not visible:
        return
    processes = query_nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name")
    free = True
    for gpu in visible:
        others = {pid: name for uuid, pid, name, *_ in processes if uuid == gpu.uuid and not is_own_rank(pid)}
        used_fraction = gpu.used_mib / max(gpu.total_mib, 1)
        if not others and used_fraction < BUSY_FRACTION:
            continue
        free = False
        users = first_names([f"{pid} ({name})" for pid, name in others.items()], "processes")
        users = users or "processes not seen from here (a container?)"
        fix = (
            f"end them, if they are left-overs of yours: kill {' '.join(others)}"
            if others
            else "ask who has it"
        )
        yield Finding(
            check="GPUs in use",
            status="fail" if used_fraction >= BUSY_FRACTION else "warn",
            message=f"GPU {gpu.index}: {gpu.used_mib:,} of {gpu.total_mib:,} MiB, {users}",
            fix=f"{fix}; or take other GPUs (CUDA_VISIBLE_DEVICES)",
        )
    if free:
        yield Finding(check="GPUs in use", message="by nobody")


def is_own_rank(pid: str) -> bool:
    """Whether the process is a rank of this very doctor: they have the same parent."""
    with contextlib.suppress(psutil.Error, ValueError):
        return int(pid) == os.getpid() or psutil.Process(int(pid)).ppid() == os.getppid()
    return False


# GPU to rank ------------------------------------------------------------------------------------------------


def gpu_findings(reports: list[RankReport]) -> list[Finding]:
    """GPU to rank, on each node; and whether the nodes have the same GPUs.

    Uses the ranks that know their device, on the nodes whose first rank also listed the GPUs.
    """
    outcomes: dict[str, Outcome] = {}
    kinds: dict[str, str] = {}
    for node, members in group_by_node(reports).items():
        gpus, devices = members[0].gpus, {m.rank: m.device for m in members if m.device}
        if gpus is None or not devices:
            continue
        kinds[node] = describe_gpus(gpus, next(iter(devices.values())))
        outcomes[node] = gpu_outcome(devices, gpus, kinds[node])
    findings = merge_equal("GPUs", outcomes)
    if len(set(kinds.values())) <= 1:
        return findings
    return [finding for finding in findings if finding.status != "pass"] + [differing_gpus(kinds)]


def differing_gpus(kinds: Mapping[str, str]) -> Finding:
    """The finding for nodes with different GPUs; `kinds` describes those of each node."""
    without = [node for node, kind in kinds.items() if kind == "none"]
    fix = "the slowest GPU sets the pace, the smallest the batch: nodes of one kind"
    return Finding(
        check="GPUs",
        status="fail" if without else "warn",
        message="the nodes differ: "
        + "; ".join(f"{node} {kind}" for node, kind in list(kinds.items())[:MAX_KINDS]),
        fix=f"leave out {first_names(without)}" if without else fix,
        nodes=tuple(kinds),
    )


def describe_gpus(gpus: list[GPU], device: DeviceInfo) -> str:
    """The GPUs of a node for a message, from nvidia-smi and, without it, from torch."""
    if not device.gpu_count:
        return "none"
    visible = visible_gpus(gpus, device.visible_devices)
    return f"{device.gpu_count} x {visible[0].name}" if visible else f"{device.gpu_count} GPU(s)"


def gpu_outcome(devices: Mapping[int, DeviceInfo], gpus: list[GPU], kind: str) -> Outcome:
    """The outcome for the ranks of one node; `devices` are by rank."""
    first = next(iter(devices.values()))
    if not first.gpu_count and visible_gpus(gpus, first.visible_devices):
        built = "built without CUDA"
        if first.cuda_version:
            built = f"built for CUDA {first.cuda_version}: the driver is too old for it, or broken"
        fix = f"torch is {built}; install the torch that fits the driver"
        return Outcome("fail", f"nvidia-smi sees {len(gpus)} GPU(s), torch none", fix)
    if errors := [device.error for device in devices.values() if device.error]:
        message, _, fix = errors[0].partition("; ")
        return Outcome("fail", message, fix)
    if not first.gpu_count:
        return Outcome("pass", "none: ranks run on the CPU, by gloo")
    ranks_of: dict[str, list[str]] = {}
    for rank, device in devices.items():
        ranks_of.setdefault(gpu_of(device, gpus), []).append(str(rank))
    mapping = ", ".join(f"rank {' and '.join(ranks)}: {gpu}" for gpu, ranks in ranks_of.items())
    if any(len(ranks) > 1 for ranks in ranks_of.values()):
        fix = "one rank per GPU: NCCL refuses two (srun --gpus-per-task=1, or torchrun --nproc_per_node=GPUs)"
        return Outcome("fail", mapping, fix)
    return Outcome("pass", f"{kind}; {mapping}")


def gpu_of(device: DeviceInfo, gpus: list[GPU]) -> str:
    """The GPU of a rank by its number on the node, or as torch names it where nvidia-smi does not show it."""
    visible, index = visible_gpus(gpus, device.visible_devices), int(device.device.partition(":")[2] or 0)
    return f"GPU {visible[index].index}" if index < len(visible) else device.device
