"""The one door to the clock. Deadlines and durations go by `time.monotonic`, here and everywhere; this is for moments.

A moment is what the clock on the wall said when this process began, and what has passed since then by the monotonic
clock: so the moments of one agent keep their distances and their order when somebody sets the clock, and differ from it
from then on. Two nodes' moments differ by what their clocks did when their agents began (`membership` bounds that).
"""

from __future__ import annotations

import time

#: Unix time minus monotonic time, when this process began (seconds).
OFFSET = time.time() - time.monotonic()


def now() -> float:
    """This moment (Unix seconds), for people and records; two of one process may be subtracted."""
    return time.monotonic() + OFFSET
