"""The run's events on disk: one JSON object a line in the run directory, put there by the leader's agent.

They outlive etcd and the run, so that the timeline can be read afterwards.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from gms_launch.cohort.records import EventRecord, RecordError


class Tail:
    """What is added to a journal from now on, each event once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0
        with contextlib.suppress(OSError):
            self._at = path.stat().st_size

    def new(self) -> list[EventRecord]:
        """The events whose lines were completed since the last call."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at)
                whole = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._at += len(whole[0]) + len(whole[1])
        return _decode(whole[0])


def read(path: Path) -> list[EventRecord]:
    """Every event in the journal, in the order written. A half-written last line is left out."""
    try:
        return _decode(path.read_bytes())
    except OSError:
        return []


def _decode(text: bytes) -> list[EventRecord]:
    events = []
    for line in text.splitlines():
        try:
            events.append(EventRecord.decode(line))
        except RecordError:
            continue
    return events
