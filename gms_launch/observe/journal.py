"""The run's events on disk: one JSON object a line in the run directory, put there by the leader's agent.

They outlive etcd and the run, so that the timeline can be read afterwards.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

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


class Follower:
    """A journal from its beginning, each event once, also when another file comes in its place: a run that begins again
    puts the old one aside. What was still written to that is read first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._half = b""

    def new(self) -> list[EventRecord]:
        """The events whose lines were completed since the last call. Blocks as the disk does."""
        found = self._rest()
        try:
            there = os.stat(self._path)
            if self._file is not None:
                here = os.fstat(self._file.fileno())
                if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino) and there.st_size >= self._file.tell():
                    return found
                self._file.close()
            self._file, self._half = open(self._path, "rb"), b""  # noqa: SIM115 - kept: its name may go
        except OSError:
            return found
        return found + self._rest()

    def _rest(self) -> list[EventRecord]:
        if self._file is None:
            return []
        try:
            whole, end, self._half = (self._half + self._file.read()).rpartition(b"\n")
        except OSError:
            return []
        return _decode(whole + end)


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
