"""One node by itself: shared memory, limits, CPUs, disk, compiled extensions. Imports no torch."""

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

import psutil
from rich.filesize import decimal

from launch.diagnostics.findings import Finding, Outcome, merge_equal
from launch.diagnostics.rank_report import RankReport, group_by_node
from launch.diagnostics.system_info import CPUInfo
from launch.diagnostics.temp_files import removed_afterwards
from launch.runtime.cpus import cpu_quota
from launch.runtime.files import sync

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_MIN = 10**9
OPEN_FILES_MIN, OPEN_FILES_GOOD = 1024, 65536
LOCKED_MEMORY_MIN = 2**30
DISK_FREE_MIN, DISK_FREE_GOOD = 10**9, 20 * 10**9
FREE_INODES_MIN = 1000
DISK_SPEED_MIN = 50e6
"""bytes a second; a checkpoint of 10 GB takes minutes then"""
PROBE_BYTES = 16 * 2**20
"""that are written to try a disk"""
STALE_LOCK_S = 600.0
"""after which the lock of a compilation is taken for a left-over: DeepSpeed's largest take some minutes"""
KERNEL_LOCK_SINCE = (2, 14)
"""the version of torch from which on a compilation is locked by the kernel, which releases it with its
holder; up to then the mere existence of a file was the lock (torch.utils.file_baton), and one left behind was
waited for without end
"""


def check_shared_memory() -> Iterator[Finding]:
    """Workers of a DataLoader, NCCL and gloo all pass data through it."""
    if not SHARED_MEMORY.is_dir():
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    message = f"{decimal(usage.total)}, {decimal(usage.free)} free"
    if usage.total < SHARED_MEMORY_MIN:
        fix = (
            "in a container: docker run --ipc=host, or --shm-size=8g; else mount -o remount,size=8G "
            "/dev/shm; or workers=0"
        )
        yield Finding(check="shared memory", status="warn", message=message, fix=fix)
    elif usage.free < SHARED_MEMORY_MIN:
        fix = "`ls -l /dev/shm`: remove what killed runs have left there (nccl-*, torch_*)"
        yield Finding(check="shared memory", status="warn", message=message, fix=fix)
    else:
        message = f"{decimal(usage.total)}, at least {decimal(SHARED_MEMORY_MIN)} free"
        yield Finding(check="shared memory", message=message)


def check_open_files() -> Iterator[Finding]:
    """A rank opens a file or socket for each peer, worker and tensor in transit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if n == resource.RLIM_INFINITY else n for n in (soft, hard))  # type: ignore[assignment]
    if soft >= OPEN_FILES_GOOD:
        message = f"{soft:,} per process" if soft < math.inf else "no limit"
        yield Finding(check="open files", message=message)
        return
    raise_soft = f"`ulimit -n {OPEN_FILES_GOOD}` before the launcher (in the batch script)"
    raise_hard = (
        f"the hard limit is {hard:,}: raise it in /etc/security/limits.conf or, for SLURM, by LimitNOFILE= "
        "of slurmd"
    )
    yield Finding(
        check="open files",
        status="fail" if soft < OPEN_FILES_MIN else "warn",
        message=f"{soft:,} per process; {OPEN_FILES_GOOD:,} are enough for many ranks and workers",
        fix=raise_soft if hard >= OPEN_FILES_GOOD else raise_hard,
    )


def check_locked_memory(devices: Path = Path("/sys/class/infiniband")) -> Iterator[Finding]:
    """InfiniBand registers memory under this limit; CUDA's own pinned memory does not count. No finding
    without InfiniBand.
    """
    if not devices.is_dir() or not any(devices.iterdir()):
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= LOCKED_MEMORY_MIN:
        message = "no limit" if soft == resource.RLIM_INFINITY else decimal(soft)
        yield Finding(check="locked memory", message=message)
        return
    fix = (
        "`ulimit -l unlimited`; in docker --ulimit memlock=-1; for SLURM LimitMEMLOCK=infinity of "
        "slurmd; NCCL fails otherwise"
    )
    message = f"{decimal(soft)} may be locked for InfiniBand"
    yield Finding(check="locked memory", status="fail", message=message, fix=fix)


# CPUs -------------------------------------------------------------------------------------------------------


def cpu_info(environment: Mapping[str, str]) -> CPUInfo:
    """The CPUs that this rank may use, and how many threads it starts."""
    threads = environment.get("OMP_NUM_THREADS", "")
    return CPUInfo(
        affinity=sorted(os.sched_getaffinity(0)),
        quota=cpu_quota(),
        machine_cpus=psutil.cpu_count() or 1,
        omp_threads=int(threads) if threads.isdecimal() else None,
    )


def cpu_findings(reports: list[RankReport], ranks_per_node: int) -> list[Finding]:
    """Whether the ranks of a node have enough CPUs; `ranks_per_node` are those that will train there."""
    outcomes = {}
    for node, members in group_by_node(reports).items():
        infos = [member.cpu for member in members if member.cpu]
        if infos:
            outcomes[node] = cpu_outcome(infos, max(len(members), ranks_per_node))
    return merge_equal("CPUs", outcomes)


def cpu_outcome(infos: list[CPUInfo], ranks: int) -> Outcome:
    """The outcome for a node on which so many `ranks` will train; `infos` are those of the ranks that run
    now.
    """
    usable: float = len({cpu for info in infos for cpu in info.affinity})
    usable = min(usable, infos[0].quota or math.inf)
    threads, machine_cpus = infos[0].omp_threads, infos[0].machine_cpus
    message = f"{usable:g} for {ranks} rank(s)" + (f" of {threads} thread(s)" if threads else "")
    if usable < ranks:
        fix = "ask for more CPUs (SLURM: --cpus-per-task; srun --cpu-bind=none), or start fewer ranks"
        return Outcome("warn", message, fix)
    if len(infos) == 1 == usable and machine_cpus > 1:
        fix = "the launcher binds the task to one CPU: srun --cpu-bind=none, or --cpus-per-task"
        return Outcome("warn", f"{message}; the node has {machine_cpus}", fix)
    if threads and threads * ranks > usable:
        fix = f"threads wait for each other: export OMP_NUM_THREADS={max(int(usable // ranks), 1)}"
        return Outcome("warn", message, fix)
    return Outcome("pass", message)


# disk -------------------------------------------------------------------------------------------------------


def nearest_existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that exists."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.is_dir())


def file_system(directory: Path) -> str:
    """The type of the file system: nfs4, lustre, ext4."""
    # realpath does not fail where a part is not readable; nfs mounts are only listed with all=True
    path = Path(os.path.realpath(directory))
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def check_disk(directory: Path) -> Iterator[Finding]:
    """Write, fsync, rename and read back, as a checkpoint does; and what is free."""
    directory = nearest_existing(directory)
    try:
        bytes_per_s, intact = probe_disk(directory)
    except OSError as error:
        fix = f"{directory} must be writable by you: choose another run_dir=, or have it repaired"
        message = f"{directory}: {error.strerror or error}"
        yield Finding(check="disk", status="fail", message=message, fix=fix)
        return
    inodes, usage = os.statvfs(directory), shutil.disk_usage(directory)
    where = f"{directory} ({file_system(directory)})"
    message = f"{where}: {decimal(usage.free)} free, {decimal(int(bytes_per_s))}/s"
    if not intact:
        message, fix = (
            f"{where}: what was read is not what was written",
            "choose another run_dir=, or have it repaired",
        )
        yield Finding(check="disk", status="fail", message=message, fix=fix)
    elif usage.free < DISK_FREE_MIN or (inodes.f_files > 0 and inodes.f_favail < FREE_INODES_MIN):
        message = f"{where}: {decimal(usage.free)} and {inodes.f_favail:,} files are free"
        yield Finding(
            check="disk", status="fail", message=message, fix="free some, or choose another run_dir="
        )
    elif usage.free < DISK_FREE_GOOD:
        fix = (
            "a checkpoint takes about 12 bytes per parameter (AdamW), and twice that while it is replaced: "
            "free some space"
        )
        yield Finding(check="disk", status="warn", message=message, fix=fix)
    elif bytes_per_s < DISK_SPEED_MIN:
        fix = (
            "checkpoints are written in the background, but will take long: a faster run_dir=, or a larger "
            "checkpoint.every"
        )
        yield Finding(check="disk", status="warn", message=message, fix=fix)
    else:
        yield Finding(check="disk", message=message)


def probe_disk(directory: Path) -> tuple[float, bool]:
    """Bytes a second of a durable write, and whether the same bytes are read back. Raises OSError."""
    partial = directory / f".doctor-{secrets.token_hex(6)}.partial"
    final = partial.with_suffix(".complete")
    content = secrets.token_bytes(2**20) * (PROBE_BYTES // 2**20)
    with removed_afterwards(partial, final):
        start = time.perf_counter()
        partial.write_bytes(content)
        sync(partial)
        partial.rename(final)
        sync(directory)
        seconds = time.perf_counter() - start
        return PROBE_BYTES / seconds, final.read_bytes() == content


# compiled extensions ----------------------------------------------------------------------------------------


def check_extensions(cache: Path, site_packages: str, torch_version: str) -> Iterator[Finding]:
    """DeepSpeed's compiled operators: a cache shared by two environments breaks the next run, and a lock left
    behind makes it hang.

    `cache` is where torch keeps them, `site_packages` the directory of this environment's packages.
    """
    builds = list(cache.glob("*/build.ninja"))
    stale = [lock for lock in cache.glob("*/lock") if time.time() - lock.lstat().st_mtime > STALE_LOCK_S]
    if stale and lock_is_a_file(torch_version):
        message = f"a compilation that did not end has left {stale[0]}: the next one waits for it without end"
        fix = f"rm {' '.join(map(str, stale))}"
        yield Finding(check="extensions", status="fail", message=message, fix=fix)
    elif others := sorted({p for path in builds for p in site_packages_in(path)} - {site_packages}):
        message = f"{cache} was compiled against {others[0]}, this Python has {site_packages}"
        fix = f"one cache per environment: export TORCH_EXTENSIONS_DIR={cache}-{Path(sys.prefix).name}"
        yield Finding(check="extensions", status="warn", message=message, fix=fix)
    elif builds:
        yield Finding(check="extensions", message=f"{cache} belongs to this environment")


def lock_is_a_file(torch_version: str) -> bool:
    """Whether this torch takes the mere existence of a lock file for a lock (see KERNEL_LOCK_SINCE)."""
    numbers = re.findall(r"\d+", torch_version)[:2]
    return tuple(map(int, numbers)) < KERNEL_LOCK_SINCE


def extensions_cache(environment: Mapping[str, str], cuda_version: str | None) -> Path:
    """Where torch keeps what it compiles: TORCH_EXTENSIONS_DIR, else by version of Python and CUDA."""
    if directory := environment.get("TORCH_EXTENSIONS_DIR"):
        return Path(directory)
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    accelerator = f"cu{cuda_version.replace('.', '')}" if cuda_version else "cpu"
    return cache / "torch_extensions" / f"{python}_{accelerator}"


def site_packages_in(build_file: Path) -> set[str]:
    """The package directories whose torch a build names; none if the file is unreadable."""
    try:
        text = build_file.read_text(errors="replace")
    except OSError:
        return set()
    return set(re.findall(r"(/\S*?)/torch/include\b", text))
