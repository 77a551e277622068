"""See where the time of a step goes."""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]
from launch.profiling.profile_run import main

if __name__ == "__main__":
    main(sys.argv[1:])
