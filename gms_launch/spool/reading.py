"""Read from a home that may hang, without hanging with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: What an answer of the shared home may take (seconds).
PATIENCE = 3.0


def within(seconds: float, read: Callable[[], T], instead: T) -> T:
    """What `read` returns, or `instead` when it takes longer or fails with `OSError`.

    A read that hangs is left to itself: nothing can end it but the disk.
    """
    found = [instead]

    def go() -> None:
        try:
            found[0] = read()
        except OSError:
            pass

    reader = threading.Thread(target=go, name="reader", daemon=True)
    reader.start()
    reader.join(seconds)
    return found[0]
