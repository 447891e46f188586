"""The run's events on disk: one JSON object a line in the run directory, written by the leader's agent.

It outlives etcd and the run, so that the timeline can be read afterwards.
"""

from __future__ import annotations

from pathlib import Path

from gms_launch.control.records import EventRecord, RecordError


class Journal:
    """Appends events."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the agent lives

    def add(self, event: EventRecord) -> None:
        self._file.write(event.encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[EventRecord]:
    """Every event in the journal, in the order written. A half-written last line is left out."""
    events = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            events.append(EventRecord.decode(line))
        except RecordError:
            continue
    return events
