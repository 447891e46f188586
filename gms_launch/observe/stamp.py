"""Moments as people read them, the same everywhere: date, milliseconds and UTC, as Dynamo writes them in its logs."""

from __future__ import annotations

import logging
import re
import time
from datetime import datetime, timezone

from gms_launch.urls import public


def stamp(moment: float) -> str:
    """A moment (Unix seconds) as 2026-11-25T01:29:06.621Z."""
    millis = int(moment * 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(millis // 1000)) + f".{millis % 1000:03d}Z"


def moment(text: str, now: float) -> float:
    """What a person means by `text`: so long before `now` (30s, 10m, 2h, 1d), or a date with or without a time of day.

    In UTC, as moments are printed, unless it says another zone. Raises `ValueError`.
    """
    if ago := re.fullmatch(r"(\d{1,9})([smhd])", text):
        return now - int(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[ago[2]]
    try:
        found = datetime.fromisoformat(re.sub(r"Z\Z", "+00:00", text))
    except ValueError:
        raise ValueError("give 30s, 10m, 2h or 1d ago, or a moment like 2026-11-25T01:29:06Z") from None
    return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()


class Formatter(logging.Formatter):
    """Lines of an agent's log: when, how bad, what; a URL stands without its login."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return stamp(record.created)

    def format(self, record: logging.LogRecord) -> str:
        return public(super().format(record))
