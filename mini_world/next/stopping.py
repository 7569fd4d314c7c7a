"""The time at which the stages of one run save their states and end, given to their processes in the environment.

The loops of `mini_world.next.loop` end at it, and at SIGTERM, by `Unfinished`; domains are trained by the library, whose loop
takes a `StopRequest`.
"""

from __future__ import annotations

import os
import time

STOP_AT = "MINI_STOP_AT"  # environment variable: seconds since the epoch


def seconds_left() -> float:
    """Seconds until the run ends, infinity without a limit."""
    return float(os.environ.get(STOP_AT) or "inf") - time.time()
