"""In place of launch/run.py: writes down what it was given, and stops as a run does. No torch.

`stay=true` waits for a signal, then saves and stops on purpose; where something is saved, the next attempt is
the last one. `fail=true` fails. `end=RANK:CODE` ends that rank so in the first attempt (negative: by that
signal), and the other ranks wait for a signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from launch.runtime.agent import die_with_agent

NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "TORCHELASTIC_RESTART_COUNT",
)
SAVE_S = 0.5
"""seconds that rank zero takes to save; the others need none"""


def main(argv: list[str]) -> int:
    """Be a rank; returns its exit code."""
    die_with_agent(os.environ)
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    values = dict(argument.split("=", 1) for argument in argv)
    rank = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    run_dir = Path(values["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    attempt = "second" if (run_dir / "saved").exists() or restarts else "first"
    environment = {
        name: value for name, value in os.environ.items() if name in NAMES or name.startswith("SLURM_")
    }
    record = {"argv": argv, "attempt": attempt, "environment": environment, "pid": os.getpid()}
    write(run_dir / f"rank{rank}.json", record)
    if "fail" in values:
        return 1
    last, _, code = values.get("end", "").partition(":")
    if last and attempt == "first" and int(last) == rank:
        wait_for_all(run_dir)
        if int(code) < 0:
            os.kill(os.getpid(), -int(code))
        return int(code)
    while ("stay" in values or last) and attempt == "first":
        if received:
            time.sleep(SAVE_S if rank == 0 else 0)
            write(run_dir / f"rank{rank}.json", {**record, "received": received})
            if rank == 0:
                (run_dir / "saved").touch()
                (run_dir / "stopped.json").write_text("{}")
            return 75
        time.sleep(0.05)
    return 0


def write(path: Path, content: dict[str, object]) -> None:
    """Write a file that others wait for: they find it whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.rename(path)


def wait_for_all(run_dir: Path) -> None:
    """Until all ranks have come as far as this one."""
    while len(list(run_dir.glob("rank*.json"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
