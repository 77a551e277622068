"""Look into the checkpoints of a run."""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]
from launch.checkpoint.inspection import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
