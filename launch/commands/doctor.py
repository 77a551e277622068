"""Look at the machines before a run does."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]
from launch.diagnostics.check_ranks import end, main

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    ended = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)  # a thread that hangs (a dead file server, a collective) must not keep the command
