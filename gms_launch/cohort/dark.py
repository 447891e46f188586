"""Lost nodes from which a frontend has nothing to expect any more: the run's leader says which, and every agent with a
frontend ends that one's connections with them. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gms_launch.cohort.records import Record


@dataclass(frozen=True)
class DarkRecord(Record):
    """`dark/<group>`: the node that led that group is lost, and the registrations of its engines with Dynamo (`leases`)
    have been ended. The run's leader writes it then, and takes it away when a node leads the group again.
    """

    host: str
    address: str
    leases: tuple[int, ...] = ()


def news(known: Mapping[str, DarkRecord], said: Mapping[str, DarkRecord], here: str) -> list[str]:
    """The groups of which that is new, but for what was lost at the address of this very node."""
    return [group for group, lost in said.items() if known.get(group) != lost and lost.address not in ("", here)]
