"""In place of launch/run.py: says what it was given, and stops as a run does. No torch: it starts at once.

`stay=true` waits for a signal, then saves and stops on purpose; where something is saved, the next life is
the last one.
`fail=true` fails.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
)
SAVE = 0.5
"""seconds that it takes to save"""

heard: list[int] = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: heard.append(number))
said = dict(word.split("=", 1) for word in sys.argv[1:])
rank = int(os.environ.get("RANK", os.environ["SLURM_PROCID"]))
run_dir = Path(said["run_dir"])
run_dir.mkdir(parents=True, exist_ok=True)
life = "second" if (run_dir / "saved").exists() else "first"
given = {name: value for name, value in os.environ.items() if name in NAMES or name.startswith("SLURM_")}
beside = run_dir / f".rank{rank}"
beside.write_text(json.dumps({"words": sys.argv[1:], "life": life, "environment": given}))
beside.rename(run_dir / f"rank{rank}.json")  # who waits for the file finds it whole
if "fail" in said:
    sys.exit(1)
while "stay" in said and life == "first":
    if heard:
        time.sleep(SAVE)
        if rank == 0:
            (run_dir / "saved").touch()
            (run_dir / "stopped.json").write_text("{}")
        sys.exit(75)
    time.sleep(0.05)
