"""A look at a run: what its keys in etcd amount to now."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gms_launch.cohort.model import Redundancy
from gms_launch.control import terms
from gms_launch.control.door import Door
from gms_launch.control.keys import Keys
from gms_launch.control.mirror import Mirror
from gms_launch.errors import NoContactError
from gms_launch.observe import snapshot
from gms_launch.run.rundir import RunDir, RunFile

#: A leader's agent that renews its lease several times a second or two and has not for so long stands still (seconds).
SILENT = 3


def read(
    directory: RunDir, door: Door, groups: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Mirror, snapshot.Snapshot]:
    """The run's keys and what they amount to. `groups` is what run.json says of them. Raises `NoContactError`."""
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
    if mirror.run.etcd and mirror.groups:  # with several members another node may lead a run of groups
        shot = replace(shot, lead=mirror.lead.node_rank if mirror.lead is not None else -1)
    known = {name: {} for name in sorted(mirror.groups, key=snapshot.natural)} if groups is None else groups
    return mirror, snapshot.with_groups(shot, tuple(_group(shot, name, said, found) for name, said in known.items()))


def _group(run: snapshot.Snapshot, name: str, said: Mapping[str, Any], found: dict[str, bytes]) -> snapshot.Snapshot:
    mirror = Mirror(run.run, name)
    mirror.replace(found)
    shot = replace(snapshot.build(mirror), places=tuple(said.get("nodes", ())))
    if mirror.run is not None and 0 not in mirror.nodes:
        return replace(shot, records=Redundancy.DOWN)  # nobody serves in a group whose leader's lease is over
    if mirror.run is not None or not said:
        return shot
    # Its leader has not come yet.
    nodes, shadows = said["nodes"], said["shadows"]
    return replace(shot, run=run.run, created=run.created, nnodes=len(nodes), leader=nodes[0], shadows=shadows)


def of(shot: snapshot.Snapshot, group: str) -> snapshot.Snapshot:
    """One group of a run with what is the run's and concerns it, or the run without a name.

    Raises `NoContactError` while nothing is known of the group.
    """
    if not group:
        return shot
    found = next((g for g in shot.groups if g.group == group), None)
    if found is None:
        raise NoContactError(f"group {group} of run {shot.run} has not written anything yet")
    host = next((n.host for n in shot.nodes if n.node_rank == 0), "")
    return replace(
        found,
        alarms=shot.alarms,
        frontend_url=shot.frontend_url,
        frontend_host=host,
        fronts=shot.fronts,
        stopping=found.stopping or shot.stopping,
    )


def now(directory: RunDir, run: RunFile, door: Door) -> snapshot.Snapshot:
    """The run at this moment, and whether the agents that lead still report. Raises `NoContactError`."""
    mirror, shot = read(directory, door, run.groups)
    with contextlib.suppress(NoContactError):  # who may not ask that of an etcd of their own is told of the rest
        # Asked for itself: while there is an alarm no agent can write down that there is.
        shot = replace(shot, alarms=door.alarms())
    if shot.stopping:
        return shot

    def silence(node_rank: int, who: str) -> tuple[float, str]:
        heard = door.silence(mirror.keys.node(node_rank))
        if heard is None:
            ago, silent = terms.granted(float(run.settings.get("lease_ttl", 5.0))), True
        else:
            ago, granted = heard
            silent = ago >= max(SILENT, granted / 2)
        return ago, f"{who} has not reported for {'more than ' if heard is None else ''}{ago} s" if silent else ""

    first = mirror.lead.node_rank if mirror.lead is not None else 0
    leads = mirror.nodes.get(first)
    pid, host = (run.agent_pid, run.leader_host) if leads is None else (leads.agent_pid, leads.host)
    ago, silent = silence(first, f"the leader's agent (pid {pid}, {host})")
    others = {g.leader for g in shot.groups} - {first}
    said = {first: (ago, silent)} | {k: silence(k, _agent(mirror, k)) for k in others}
    groups = tuple(replace(g, reported_ago=said[g.leader][0], leader_silent=said[g.leader][1]) for g in shot.groups)
    return snapshot.with_groups(replace(shot, reported_ago=ago, leader_silent=silent), groups)


def _agent(mirror: Mirror, node_rank: int) -> str:
    node = mirror.nodes.get(node_rank)
    return f"the agent of node {node_rank}" + (f" (pid {node.agent_pid}, {node.host})" if node is not None else "")
