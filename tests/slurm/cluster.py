"""A real SLURM of two nodes on this machine: its own munge, controller, node daemons, ports and folder.

The nodes n1 and n2 have 4 processors and 2 GPUs each, on paper. The daemons see an /etc/hosts of their own (a
mount namespace) in which the two names are this machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.launch.processes import LAUNCHER_VARIABLES, PATIENCE, ROOT

CPUS = 4
DEVICES = ("/dev/null", "/dev/zero")
"""the GPUs of a node: any character device will do"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
CONFIGURATION = """
ClusterName=rankzero
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
FirstJobId={first_job}
AuthInfo=socket={folder}/munge.socket
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=1000,sched_interval=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait={kill_wait}
InactiveLimit=0
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs={cpus} Gres=gpu:{gpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs={cpus} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
SCRIPT = ROOT / "slurm" / "train.sbatch"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
TIMEOUT_S = PATIENCE * 60.0
"""until a job, a daemon or a command counts as hanging: on an idle machine a training ends within a minute"""
KILL_WAIT = 60
"""seconds between SLURM's SIGTERM and its SIGKILL: sites have 30; nothing waits for it that ends by itself"""
NOT_OURS = ("Traceback", "ChildFailedError", "torch.distributed.elastic", "OMP_NUM_THREADS")
"""what no log of a job may hold: the reports of torchrun"""


def missing() -> str:
    """Why no SLURM can be started here; empty if it can."""
    if os.geteuid() != 0:
        return "a SLURM of our own needs root"
    gone = [name for name in PROGRAMS if which(name) is None]
    return f"{', '.join(gone)} not found: apt-get install slurmctld slurmd slurm-client munge" if gone else ""


def which(program: str) -> str | None:
    """The path of a program; daemons are in sbin, which is not on everybody's PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass(frozen=True)
class Cluster:
    """A running SLURM."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """Of a user who has logged in: this Python first on PATH, no trace of other launchers."""
        others = tuple({*LAUNCHER_VARIABLES, "SBATCH_", "SQUEUE_"} - {"RANK"})
        clean = {n: v for n, v in os.environ.items() if not n.startswith(others) and n != "RANK"}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        return clean | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": path,
            "CUDA_VISIBLE_DEVICES": "",
        }

    def call(
        self, *args: str, cwd: Path, home: Path = ROOT, timeout: float = TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end as a user of this SLURM, launch/ being in `home`."""
        env = {**self.env, "RANKZERO_HOME": str(home)}
        return subprocess.run(
            args, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
        )

    def ask(self, *args: str, cwd: Path = ROOT, home: Path = ROOT) -> str:
        """What a command prints; it must succeed."""
        ended = self.call(*args, cwd=cwd, home=home)
        assert ended.returncode == 0, f"{args}\n{ended.stdout}{ended.stderr}"
        return ended.stdout.strip()

    def submit(self, *args: str, cwd: Path, home: Path = ROOT, options: str = "") -> str:
        """`sbatch OPTIONS slurm/train.sbatch ARGS`: the job's number."""
        return self.ask("sbatch", "--parsable", *options.split(), str(SCRIPT), *args, cwd=cwd, home=home)

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, ExitCode, Restarts, ..."""
        shown = self.ask("scontrol", "show", "job", "--oneliner", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, number: str, *states: str, timeout: float = TIMEOUT_S) -> dict[str, str]:
        """Wait until a job is in one of `states`; requeued, it waits for 2 seconds, not minutes."""
        end, hurried = time.monotonic() + timeout, {"0"}
        while (job := self.job(number))["JobState"] not in states:
            if time.monotonic() > end or job["JobState"] in ENDED:
                out = Path(job["StdOut"])
                printed = out.read_text() if out.exists() else ""
                wanted = " or ".join(states)
                raise AssertionError(
                    f"job {number} is {job['JobState']}, {job['Reason']}, not {wanted}\n{printed}"
                )
            if job["Reason"] == "BeginTime" and job["Restarts"] not in hurried:
                # at once is too early: slurmd would refuse it ("credential revoked")
                hurried.add(job["Restarts"])
                self.call("scontrol", "update", f"JobId={number}", "StartTime=now+2", cwd=ROOT)
            time.sleep(0.2)
        return job

    def done(self, number: str, timeout: float = TIMEOUT_S) -> str:
        """What a job has printed, once it has succeeded."""
        return Path(self.wait(number, "COMPLETED", timeout=timeout)["StdOut"]).read_text()

    def messages(self, number: str) -> list[str]:
        """What rankzero has said in the log of a job, in which torchrun says nothing."""
        log = Path(self.job(number)["StdOut"]).read_text()
        assert not [name for name in NOT_OURS if name in log], log
        return [line for line in log.splitlines() if line.startswith("rankzero: ")]

    def idle(self) -> bool:
        """Whether nothing runs and all could."""
        return (
            self.call("sinfo", "--noheader", "--states=idle", "--format=%D", cwd=ROOT).stdout.strip() == "2"
        )

    def clear(self) -> None:
        """End all jobs, and make both nodes ready again."""
        self.ask("scancel", "--user=root")
        self.call(
            "scontrol", "update", "NodeName=n[1-2]", "State=RESUME", cwd=ROOT
        )  # an error where nothing is to be resumed
        until(
            lambda: self.idle() and not self.tasks(),
            "all jobs have ended",
            self.folder,
            seconds=TIMEOUT_S,
        )

    def processes(self) -> list[psutil.Process]:
        """All that lives because of this SLURM."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # gone, or not ours
                continue
        return found

    def tasks(self) -> list[psutil.Process]:
        """What jobs have started: neither the daemons nor the commands of a user outside a job."""
        return [process for process in self.processes() if "SLURM_JOB_ID" in environment(process)]


def environment(process: psutil.Process) -> dict[str, str]:
    """The environment that a process was started with; empty if it is gone."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


def ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextmanager
def running() -> Iterator[Cluster]:
    """A SLURM for as long as the context lasts; nothing of it is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a socket may have 107 characters
    folder.chmod(0o755)
    cluster = Cluster(folder)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        write_files(folder)
        munge = [
            f"--key-file={folder}/munge.key",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munge.pid",
        ]
        munge += [
            f"--log-file={folder}/munge.log",
            f"--seed-file={folder}/munge.seed",
            "--force",
            "--foreground",
        ]
        daemons.append(start(cluster, "munged", *munge))
        until(lambda: (folder / "munge.socket").exists(), "munged answers", folder)
        daemons.append(start(cluster, "slurmctld", "-D"))
        daemons += [start(cluster, "slurmd", "-D", "-N", node) for node in ("n1", "n2")]
        until(cluster.idle, "both nodes are idle", folder)
        yield cluster
        cluster.clear()
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for process in (left := cluster.processes()):
            process.kill()
        psutil.wait_procs(left, timeout=5 * PATIENCE)
        assert not cluster.processes()
        shutil.rmtree(folder)


def write_files(folder: Path) -> None:
    """Configuration, devices, key and host names."""
    host = socket.gethostname().split(".")[0]
    # the port of a job follows from its number: two SLURMs may run on this machine
    first_job = 1 + secrets.randbelow(15000)
    controller, first, second = ports(3)
    places = {"host": host, "folder": folder, "controller": controller, "first": first, "second": second}
    text = CONFIGURATION.format(
        **places, first_job=first_job, cpus=CPUS, gpus=len(DEVICES), kill_wait=KILL_WAIT
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(
        "".join(f"NodeName=n[1-2] Name=gpu File={device}\n" for device in DEVICES)
    )
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "hosts").write_text(f"127.0.0.1 localhost {host} n1 n2\n")


def start(cluster: Cluster, program: str, *args: str) -> subprocess.Popen[bytes]:
    """Start a daemon that finds the nodes' names, and that does not outlive this process, however it ends."""
    inside = 'mount --bind "$0" /etc/hosts && exec "$@"'
    command = [
        "setpriv",
        "--pdeathsig=TERM",
        "unshare",
        "--mount",
        "sh",
        "-c",
        inside,
        str(cluster.folder / "hosts"),
        str(which(program)),
        *args,
    ]
    with (cluster.folder / f"{program}.out").open("ab") as out:
        return subprocess.Popen(command, env=cluster.env, stdout=out, stderr=out, start_new_session=True)


def until(
    true: Callable[[], bool], what: str, folder: Path | None = None, seconds: float = TIMEOUT_S
) -> None:
    """Wait for `true()`, or fail with the logs that are in `folder`."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            logs = [*folder.glob("*.log"), *folder.glob("*.out")] if folder is not None else []
            said = "".join(f"\n{path.name}\n{path.read_text()[-2000:]}" for path in logs)
            raise AssertionError(f"not in {seconds:g} s: {what}{said}")
        time.sleep(0.1)
