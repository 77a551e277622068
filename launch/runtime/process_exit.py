"""How a process of a run ends: with its exit handlers after success, at once after a failure. No torch.

After a failure `os._exit` is right: a clean exit would wait for collectives that never end.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

EXIT_TIMEOUT_S = 30.0
"""seconds that `atexit` handlers and threads may take"""


def exit_normally(code: int) -> NoReturn:
    """End the process as Python does: `atexit` handlers (trackers, coverage) run, threads are waited for.

    If they take longer than EXIT_TIMEOUT_S the process ends all the same, with the same code. Ctrl-C ends it
    at once; other signals are left as they are: torchrun sends SIGTERM to the ranks that are still busy when
    the first has ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.freeze()  # else Python looks for garbage in all of torch once more: 2 s of processor time for nothing
    threading.Thread(target=_exit_late, args=(code,), name="exit timeout", daemon=True).start()
    sys.exit(code)


def _exit_late(code: int) -> None:
    time.sleep(EXIT_TIMEOUT_S)
    print(f"rankzero: exit handlers have not ended within {EXIT_TIMEOUT_S:g} s", file=sys.stderr, flush=True)
    exit_at_once(code)


def exit_at_once(code: int) -> NoReturn:
    """End the process without its exit handlers, from any thread; what has been printed is written."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
