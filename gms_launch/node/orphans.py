"""Groups whose leading node is lost: what the run's leader says of them, since nobody in them decides then.

Nobody serves there; and a group whose node does not come back, nor a spare for it, is over.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from gms_launch.cohort import census
from gms_launch.cohort.model import Redundancy
from gms_launch.cohort.records import RunRecord
from gms_launch.control.keys import Keys
from gms_launch.errors import DeadlineError, NoContactError
from gms_launch.node.losses import Losses
from gms_launch.node.node import Node

log = logging.getLogger("agent")

#: Between two tries to write down that a group is over (seconds).
AGAIN = 1.0


class Orphans:
    """What the run's leader remembers of lost nodes that lead groups; `losses` says which are lost."""

    def __init__(self, me: Node, losses: Losses) -> None:
        self._me, self._losses = me, losses
        self._ending: set[str] = set()
        self._told_down: set[str] = set()

    def look(self, groups: Mapping[str, RunRecord]) -> None:
        """Act for each of them once; `groups` are all of the run's, as their leaders see them."""
        for name, record in groups.items():
            self._tell(name, record, self._losses.is_lost(record.leader))
        if not self._me.ready.is_set():
            return  # the first start has deadlines of its own
        absent = self._losses.absent_since
        for name in census.orphans(groups, absent, self._me.settings.node_wait, self._me.loop.time()):
            if name not in self._ending:
                self._ending.add(name)
                self._me.spawn(self._end(name, groups[name]))

    def _tell(self, name: str, record: RunRecord, lost: bool) -> None:
        """Nobody serves in a group whose leader is lost, and nobody there says so: hooks and the pages' strips wait
        for that word.
        """
        if not lost:
            self._told_down.discard(name)
        elif name not in self._told_down and record.redundancy and not record.failed:
            self._told_down.add(name)
            self._me.report.emit("redundancy", detail=Redundancy.DOWN.value, group=name)
            self._me.progress(f"{name}: redundancy down: the node that leads it is lost")

    async def _end(self, name: str, record: RunRecord) -> None:
        """Write down that a group is over, if its leading node is not there at that very moment."""
        me = self._me
        node = me.report.seen.get(record.leader)
        who = f"node {record.leader}" + (f" ({node.host})" if node is not None else "")
        why = f"{who}, which leads it, was lost and did not come back within {me.settings.node_wait:g} s (node_wait)"
        ended = replace(record, failed=why, exit_code=DeadlineError.exit_code, redundancy=Redundancy.DOWN.value)
        keys, link = me.mirror.keys, me.report.link
        assert link is not None, "who leads the run has etcd"
        key = f"{keys.groups}{name}"
        conditions = {keys.node(record.leader): None, key: record.encode()}
        # Whoever led it may have something to say that has waited, and says it before hearing of this.
        records = {key: ended.encode(), Keys(me.layout.run, name).over: why.encode()}
        done = False
        try:
            done = await me.loop.run_in_executor(None, link.write_if, conditions, records)
        except NoContactError as exc:
            log.warning("that group %s is over cannot be written down: %s", name, exc)
        finally:
            if not done:
                me.loop.call_later(AGAIN, self._ending.discard, name)
                me.loop.call_later(AGAIN + 0.1, me.wake.set)
        if done:
            me.progress(f"{name}: this group is over: {why}")
            me.report.emit("group_over", detail=why, group=name)
