"""A look at a run: what its keys in etcd amount to now."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from gms_launch.control import terms
from gms_launch.control.door import Door
from gms_launch.control.keys import Keys
from gms_launch.control.mirror import Mirror
from gms_launch.errors import NoContactError, UsageError
from gms_launch.observe import snapshot
from gms_launch.run.rundir import RunDir, RunFile

#: A leader's agent that renews its lease several times a second or two and has not for so long stands still (seconds).
SILENT = 3


def read(directory: RunDir, door: Door) -> tuple[Mirror, snapshot.Snapshot]:
    """The run's keys and what they amount to. Raises `NoContactError`."""
    mirror = Mirror(directory.run)
    events = Keys(directory.run).events
    found = door.get_prefix(mirror.keys.prefix)
    found = {k: v for k, v in found.items() if not k.startswith(events)}
    mirror.replace(found)
    if mirror.run is None:
        raise NoContactError(
            f"run {directory.run} has not written anything yet; its agent's log: {directory.agent_log}"
        )
    shot = snapshot.build(mirror)
    groups = tuple(_group(directory.run, name, found) for name in sorted(mirror.groups, key=_natural))
    return mirror, snapshot.with_groups(shot, groups) if groups else shot


def _group(run: str, name: str, found: dict[str, bytes]) -> snapshot.Snapshot:
    mirror = Mirror(run, name)
    mirror.replace(found)
    return snapshot.build(mirror)


def _natural(name: str) -> tuple[str, int]:
    """g2 comes before g10."""
    front = name.rstrip("0123456789")
    return front, int(name[len(front) :] or 0)


def the_group(shot: snapshot.Snapshot, name: str | None) -> str:
    """The group that is meant: empty in a run without any. Raises `UsageError`."""
    names = [g.group for g in shot.groups]
    if name is None and len(names) < 2:
        return "".join(names)
    if name not in names:
        there = f"the run has groups {', '.join(names)}" if names else "the run has no groups"
        raise UsageError(f"--group {name}: {there}" if name is not None else f"say which with --group: {there}")
    return name


def now(directory: RunDir, run: RunFile, door: Door) -> snapshot.Snapshot:
    """The run at this moment, and whether its leader's agent still reports. Raises `NoContactError`."""
    mirror, shot = read(directory, door)
    with contextlib.suppress(NoContactError):  # who may not ask that of an etcd of their own is told of the rest
        # Asked for itself: while there is an alarm no agent can write down that there is.
        shot = replace(shot, alarms=door.alarms())
    if shot.stopping:
        return shot
    heard = door.silence(mirror.keys.node(0))
    if heard is None:
        ago, silent = terms.granted(float(run.settings.get("lease_ttl", 5.0))), True
    else:
        ago, granted = heard
        silent = ago >= max(SILENT, granted / 2)
    who = f"the leader's agent (pid {run.agent_pid}, {run.leader_host})"
    told = f"{who} has not reported for {'more than ' if heard is None else ''}{ago} s" if silent else ""
    return replace(shot, reported_ago=ago, leader_silent=told)
