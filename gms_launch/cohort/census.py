"""What a run of groups amounts to, and when it ends: the run's leader decides no more than that. Pure.

A group that is over does not come back; what it is over for concerns the others only when too few are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from gms_launch.cohort.model import Redundancy
from gms_launch.cohort.records import RecordError, RunRecord
from gms_launch.numbers import numbered


class Said(Protocol):
    """What counts of a group's `RunRecord`."""

    @property
    def redundancy(self) -> str: ...

    @property
    def failed(self) -> str: ...

    @property
    def exit_code(self) -> int: ...

    @property
    def leader(self) -> int: ...


def redundancy(groups: Mapping[str, Said], number: int) -> Redundancy | None:
    """That of the worst of `number` groups, by what their leaders say; None until every one has said something."""
    said = [
        Redundancy.DOWN if g.failed else Redundancy(g.redundancy) for g in groups.values() if g.failed or g.redundancy
    ]
    return max(said, key=list(Redundancy).index) if said and len(said) >= number else None


def too_few(groups: Mapping[str, Said], number: int, least: int, up: bool) -> tuple[str, int]:
    """Why the run is to end, and with which exit code; nothing while it goes on.

    Until it was `up` once, one group that cannot start is enough: that is a mistake which somebody is there to see.
    """
    over = {name: g for name, g in sorted(groups.items()) if g.failed}
    left = number - len(over)
    if not over or (up and left >= least):
        return "", 0
    why = "; ".join(f"group {name}: {g.failed}" for name, g in over.items())
    code = next(iter(over.values())).exit_code
    if not up:
        return why, code
    return f"{numbered(left, 'group')} of {number} can still serve, and {least} must (--min-groups); {why}", code


def orphans(groups: Mapping[str, Said], absent: Mapping[int, float], node_wait: float, now: float) -> list[str]:
    """The groups whose leading node, `absent` since then, did not come back within `node_wait`: nobody is left in them
    who could say that they are over. Times in seconds.
    """
    return [
        name
        for name, g in sorted(groups.items())
        if not g.failed and g.leader in absent and now - absent[g.leader] >= node_wait
    ]


def says_over(value: bytes | None) -> bool:
    """Whether that is the record of a group that has ended."""
    try:
        return value is not None and bool(RunRecord.decode(value).failed)
    except RecordError:
        return False
