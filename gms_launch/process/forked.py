"""A child that goes on with this program, for what this process had better not do itself."""

from __future__ import annotations

import gc
import os


def fork() -> int:
    """As `os.fork`, and the child ends nothing that its parent has thrown away and not yet collected.

    A channel of gRPC's needs for that the threads that it was made with; without them it takes the child with it.
    Raises `OSError`.
    """
    collects = gc.isenabled()
    gc.disable()
    pid = -1
    try:
        pid = os.fork()
        if pid == 0:
            gc.freeze()
    finally:
        if collects or pid == 0:
            gc.enable()
    return pid
