"""Moments as people read them, the same everywhere: date, milliseconds and UTC, as Dynamo writes them in its logs."""

from __future__ import annotations

import logging
import time


def stamp(moment: float) -> str:
    """A moment (Unix seconds) as 2026-11-25T01:29:06.621Z."""
    millis = int(moment * 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(millis // 1000)) + f".{millis % 1000:03d}Z"


class Formatter(logging.Formatter):
    """Lines of an agent's log: when, how bad, what."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return stamp(record.created)
