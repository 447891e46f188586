"""What has happened in a run: its journal, and what of it only etcd has when the run directory takes no writes."""

from __future__ import annotations

from functools import partial

from gms_launch.cohort.records import EventRecord, RecordError
from gms_launch.control.keys import Keys
from gms_launch.errors import NoContactError
from gms_launch.observe import journal
from gms_launch.run import contact
from gms_launch.run.rundir import RunDir, RunFile
from gms_launch.spool.reading import PATIENCE, within


def written(directory: RunDir) -> list[EventRecord]:
    """The journal; empty when it is not there, or the home does not answer."""
    return within(PATIENCE, partial(journal.read, directory.events), [])


def events(directory: RunDir, run: RunFile) -> list[EventRecord]:
    """Everything that is known to have happened. Etcd has the newest of every node, for as long as the run lives."""
    known = written(directory)
    if not run.live:
        return known
    try:
        door = contact.door(directory, run)
        found = door.get_prefix(Keys(directory.run).events)
        door.close()
    except NoContactError:
        return known
    seen = {event.encode() for event in known}
    missing = []
    for value in found.values():
        try:
            event = EventRecord.decode(value)
        except RecordError:
            continue
        if event.encode() not in seen:
            missing.append(event)
    return sorted([*known, *missing], key=lambda e: e.time) if missing else known
