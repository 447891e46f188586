"""Reach a recorded run: its etcd, its keys."""

from __future__ import annotations

from dataclasses import replace

from gms_launch.control import terms
from gms_launch.control.gateway import Gateway
from gms_launch.control.keys import Keys
from gms_launch.control.mirror import Mirror
from gms_launch.errors import NoContactError
from gms_launch.observe import snapshot
from gms_launch.run.rundir import RunDir, RunFile

#: A leader's agent that renews its lease several times a second or two and has not for so long stands still (seconds).
SILENT = 3


def gateway(directory: RunDir, run: RunFile, timeout: float = 3.0) -> Gateway:
    """The run's etcd. Raises `NoContactError` when the run has ended or has none yet."""
    if not run.live:
        ended = "ended" if run.ended is not None else "died: its agent is gone"
        raise NoContactError(
            f"run {directory.run} has {ended}; its logs are in {directory.logs}"
            + ("" if run.ended is not None else f". `gms-launch down --run {directory.run}` cleans up")
        )
    if not run.etcd_endpoints:
        raise NoContactError(f"run {directory.run} is still starting its etcd; its agent's log: {directory.agent_log}")
    if not run.etcd_auth:
        return Gateway(run.etcd_endpoints, timeout=timeout)
    return Gateway(run.etcd_endpoints, "root", directory.credentials().admin_password, timeout)


def read(directory: RunDir, door: Gateway) -> tuple[Mirror, snapshot.Snapshot]:
    """The run's keys and what they amount to. Raises `NoContactError`."""
    mirror = Mirror(directory.run)
    events = Keys(directory.run).events
    found = door.get_prefix(mirror.keys.prefix)
    mirror.replace({k: v for k, v in found.items() if not k.startswith(events)})
    if mirror.run is None:
        raise NoContactError(
            f"run {directory.run} has not written anything yet; its agent's log: {directory.agent_log}"
        )
    return mirror, snapshot.build(mirror)


def look(directory: RunDir, run: RunFile, door: Gateway) -> snapshot.Snapshot:
    """The run at this moment, and whether its leader's agent still reports. Raises `NoContactError`."""
    mirror, shot = read(directory, door)
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
