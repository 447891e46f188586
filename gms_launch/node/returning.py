"""A node that comes to a run that goes on: whether the run would have begun with it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gms_launch.cohort import membership
from gms_launch.cohort.records import LeadRecord, NodeRecord, RunRecord, RunState
from gms_launch.control.keys import Keys
from gms_launch.errors import NoContactError, UsageError

if TYPE_CHECKING:
    from gms_launch.control.link import ControlLink

#: For how many leases a leader is waited for that may have lost its own, and where another may have to follow it.
LEASES = 2
MOVING = 4


def check(link: ControlLink, keys: Keys, record: NodeRecord, lease_ttl: float, moves: bool) -> None:
    """Compare the node of `record` with the run's leader; `moves`: that is not always node 0. Blocks.

    Before the node takes its place, so that a run that it does not fit is not disturbed. Raises `UsageError`, and
    `NoContactError` when the run has no leader for long.
    """
    deadline = time.monotonic() + (MOVING if moves else LEASES) * lease_ttl
    value = link.get(keys.run)
    if value is None or (run := RunRecord.decode(value)).state is not RunState.ADMITTED:
        return  # the leader compares all nodes when all have come
    while (leader := link.get(keys.node(leader_of(link, keys) if moves else 0))) is None:
        if time.monotonic() > deadline:
            raise NoContactError("the leader's own record is not in etcd, so this node cannot be compared with it")
        time.sleep(0.2)  # it has lost its lease, and takes a new one
    found = membership.objections_to(record, NodeRecord.decode(leader), run.nnodes + run.spares)
    if found:
        text = "; ".join(found)
        link.put_now(keys.refusal(f"{record.boot_id}-{record.agent_pid}"), text.encode())
        raise UsageError(f"{text}; run {run.run} goes on without this node until one comes that fits")


def leader_of(link: ControlLink, keys: Keys) -> int:
    """The node rank that leads the run, as etcd has it; -1 for nobody. Blocks. Raises `NoContactError`."""
    value = link.get(keys.lead)
    return LeadRecord.decode(value).node_rank if value is not None else -1
