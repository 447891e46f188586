"""The run's events on disk: one JSON object a line in the run directory, put there by the leader's agent.

They outlive etcd and the run, so that the timeline can be read afterwards.
"""

from __future__ import annotations

from pathlib import Path

from gms_launch.control.records import EventRecord, RecordError


def read(path: Path) -> list[EventRecord]:
    """Every event in the journal, in the order written. A half-written line is left out."""
    events = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            events.append(EventRecord.decode(line))
        except RecordError:
            continue
    return events
