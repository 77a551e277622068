"""One node by itself: shared memory, limits, processors, disk, compiled extensions. Imports no torch."""

from __future__ import annotations

import math
import os
import re
import resource
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from rich.filesize import decimal

from launch.diagnostics.report import Finding, Report, by_value, nodes_of, number
from launch.diagnostics.temp_files import scratch
from launch.runtime.cpus import cpu_quota
from launch.runtime.files import sync

SHARED = Path("/dev/shm")
SHARED_LEAST = 10**9
FILES_LEAST, FILES_GOOD = 1024, 65536
LOCKED_LEAST = 2**30
DISK_LEAST, DISK_GOOD = 10**9, 20 * 10**9
DISK_SLOW = 50e6
"""bytes a second; a checkpoint of 10 GB takes minutes then"""
PROBE = 16 * 2**20
"""bytes that are written to try a disk"""
STALE = 600.0
"""seconds after which the lock of a compilation is taken for a left-over: DeepSpeed's largest take some
minutes
"""


def shared_memory() -> Iterator[Finding]:
    """Workers of a DataLoader, NCCL and gloo all pass data through it."""
    if not SHARED.is_dir():
        return
    usage = shutil.disk_usage(SHARED)
    found = f"{decimal(usage.total)}, {decimal(usage.free)} free"
    if usage.total < SHARED_LEAST:
        fix = "in a container: docker run --ipc=host, or --shm-size=8g; else mount -o remount,size=8G /dev/shm; or workers=0"
        yield Finding(check="shared memory", status="warn", found=found, fix=fix)
    elif usage.free < SHARED_LEAST:
        fix = "`ls -l /dev/shm`: remove what runs that were killed have left there (nccl-*, torch_*)"
        yield Finding(check="shared memory", status="warn", found=found, fix=fix)
    else:
        yield Finding(
            check="shared memory", found=f"{decimal(usage.total)}, at least {decimal(SHARED_LEAST)} free"
        )


def open_files() -> Iterator[Finding]:
    """A rank opens a file or socket for each peer, worker and tensor that travels."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if n == resource.RLIM_INFINITY else n for n in (soft, hard))  # type: ignore[assignment]
    if soft >= FILES_GOOD:
        yield Finding(check="open files", found=f"{soft:,} a process" if soft < math.inf else "no limit")
        return
    there = f"`ulimit -n {FILES_GOOD}` before the launcher (in the batch script)"
    above = f"the hard limit is {hard:,}: raise it in /etc/security/limits.conf or, for SLURM, by LimitNOFILE= of slurmd"
    yield Finding(
        check="open files",
        status="fail" if soft < FILES_LEAST else "warn",
        found=f"{soft:,} a process; {FILES_GOOD:,} are good for many ranks and workers",
        fix=there if hard >= FILES_GOOD else above,
    )


def locked_memory(devices: Path = Path("/sys/class/infiniband")) -> Iterator[Finding]:
    """InfiniBand registers memory under this limit. CUDA's own pinned memory does not count: without
    InfiniBand no row.
    """
    if not devices.is_dir() or not any(devices.iterdir()):
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= LOCKED_LEAST:
        yield Finding(
            check="locked memory", found="no limit" if soft == resource.RLIM_INFINITY else decimal(soft)
        )
        return
    fix = "`ulimit -l unlimited`; in docker --ulimit memlock=-1; for SLURM LimitMEMLOCK=infinity of slurmd; NCCL fails otherwise"
    yield Finding(
        check="locked memory", status="fail", found=f"{decimal(soft)} may be locked for InfiniBand", fix=fix
    )


# processors -------------------------------------------------------------------------------------------------


def cpu_facts(environment: Mapping[str, str]) -> dict[str, Any]:
    """The CPUs that this rank may use, and how many threads it starts."""
    return {
        "cpus": sorted(os.sched_getaffinity(0)),
        "quota": cpu_quota(),
        "machine_cpus": psutil.cpu_count(),
        "threads": number(environment, "OMP_NUM_THREADS"),
    }


def cpus(reports: list[Report], ranks_a_node: int) -> list[Finding]:
    """Whether the ranks of a node have processors enough; `ranks_a_node` are those that will train there."""
    values = {}
    for node, mine in nodes_of(reports).items():
        usable: float = len({cpu for report in mine for cpu in report.facts["cpu"]["cpus"]})
        facts = mine[0].facts["cpu"]
        usable = min(usable, facts["quota"] or math.inf)
        ranks = max(len(mine), ranks_a_node)
        threads = facts["threads"]
        found = f"{usable:g} for {ranks} rank(s)" + (f" of {threads} thread(s)" if threads else "")
        if usable < ranks:
            fix = "ask for more CPUs (SLURM: --cpus-per-task; srun --cpu-bind=none), or start fewer ranks"
            values[node] = ("warn", found, fix)
        elif len(mine) == 1 == usable and facts["machine_cpus"] > 1:
            fix = "the launcher binds the task to one CPU: srun --cpu-bind=none, or --cpus-per-task"
            values[node] = ("warn", f"{found}; the node has {facts['machine_cpus']}", fix)
        elif threads and threads * ranks > usable:
            fix = f"they wait for each other: export OMP_NUM_THREADS={max(int(usable // ranks), 1)}"
            values[node] = ("warn", found, fix)
        else:
            values[node] = ("pass", found, "")
    return by_value("cpus", values)  # type: ignore[arg-type]  # mypy takes the first element for str


# disk -------------------------------------------------------------------------------------------------------


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def file_system(folder: Path) -> str:
    """The type of the file system: nfs4, lustre, ext4."""
    # realpath does not fail where a part is not readable; nfs mounts are only listed with all=True
    inside = Path(os.path.realpath(folder))
    mounts = [part for part in psutil.disk_partitions(all=True) if inside.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def disk(folder: Path) -> Iterator[Finding]:
    """Write, force to disk, rename and read back, as a checkpoint does; and what is free."""
    place = existing(folder)
    first = place / f".doctor-{secrets.token_hex(6)}.partial"
    second = first.with_suffix(".whole")
    content = secrets.token_bytes(2**20) * (PROBE // 2**20)
    other = "choose another run_dir=, or have it repaired"
    try:
        with scratch(first, second):
            start = time.perf_counter()
            first.write_bytes(content)
            sync(first)
            first.rename(second)
            sync(place)
            speed = PROBE / (time.perf_counter() - start)
            same = second.read_bytes() == content
    except OSError as error:
        fix = f"{place} must be writable by you: {other}"
        yield Finding(check="disk", status="fail", found=f"{place}: {error.strerror or error}", fix=fix)
        return
    entries, usage = os.statvfs(place), shutil.disk_usage(place)
    kind = f"{place} ({file_system(place)})"
    figures = f"{decimal(usage.free)} free, {decimal(int(speed))}/s"
    if not same:
        yield Finding(
            check="disk", status="fail", found=f"{kind}: what was read is not what was written", fix=other
        )
    elif usage.free < DISK_LEAST or (entries.f_files > 0 and entries.f_favail < 1000):
        found = f"{kind}: {decimal(usage.free)} and {entries.f_favail:,} files are free"
        yield Finding(check="disk", status="fail", found=found, fix="make room, or choose another run_dir=")
    elif usage.free < DISK_GOOD:
        fix = "a checkpoint takes about 12 bytes a parameter (AdamW), twice that while it is replaced: make room"
        yield Finding(check="disk", status="warn", found=f"{kind}: {figures}", fix=fix)
    elif speed < DISK_SLOW:
        fix = "checkpoints are written behind the training, but will take long: a faster run_dir=, or checkpoint.every larger"
        yield Finding(check="disk", status="warn", found=f"{kind}: {figures}", fix=fix)
    else:
        yield Finding(check="disk", found=f"{kind}: {figures}")


# compiled extensions ----------------------------------------------------------------------------------------


def extensions(folder: Path, ours: str) -> Iterator[Finding]:
    """DeepSpeed's compiled operators: a cache shared by two environments, or a lock left behind, makes the
    next run hang.

    `folder` is the cache, `ours` the folder of this environment's packages.
    """
    builds, locks = list(folder.glob("*/build.ninja")), list(folder.glob("*/lock"))
    if waits_for_ever(ours) and (
        old := [lock for lock in locks if time.time() - lock.lstat().st_mtime > STALE]
    ):
        found = f"a compilation that did not end has left {old[0]}: the next one waits for it for ever"
        yield Finding(check="extensions", status="fail", found=found, fix=f"rm {' '.join(map(str, old))}")
    elif foreign := sorted({other for path in builds for other in packages_in(path) if other != ours}):
        found = f"{folder} was compiled against {foreign[0]}, this Python has {ours}"
        fix = f"one cache an environment: export TORCH_EXTENSIONS_DIR={folder}-{Path(sys.prefix).name}"
        yield Finding(check="extensions", status="warn", found=found, fix=fix)
    elif builds:
        yield Finding(check="extensions", found=f"{folder} is of this environment")


def waits_for_ever(packages: str) -> bool:
    """Whether this torch takes the mere existence of a lock for a lock; from 2.14 on the kernel releases it
    with its holder.
    """
    try:
        return "FileBaton(" in Path(packages, "torch", "utils", "cpp_extension.py").read_text()
    except OSError:
        return False


def extension_folder(environment: Mapping[str, str], cuda: str | None) -> Path:
    """Where torch keeps what it compiles: by version of Python and CUDA, unless it is told a folder."""
    if said := environment.get("TORCH_EXTENSIONS_DIR"):
        return Path(said)
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}_{'cu' + cuda.replace('.', '') if cuda else 'cpu'}"
    return cache / "torch_extensions" / kind


def packages_in(build: Path) -> set[str]:
    """The package folders (…/site-packages) whose torch a build names; none if that is unreadable."""
    try:
        text = build.read_text(errors="replace")
    except OSError:
        return set()
    return set(re.findall(r"(/\S*?)/torch/include\b", text))
