"""Prove on your own recipe and storage that a killed run goes on."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]
from launch.equivalence.resume_check import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process is left behind
    sys.exit(main(sys.argv[1:]))
