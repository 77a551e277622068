"""`python -m launch` is `rankzero`."""

from __future__ import annotations

import sys

from launch.commands import main

if __name__ == "__main__":
    sys.exit(main())
