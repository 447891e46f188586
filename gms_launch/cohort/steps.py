"""The steps of a start, for people: what an engine does before it is parked. Pure.

Nothing is decided by them: a step that is not seen is skipped in what is told, and that is all. Phases (`model`) are
what decisions are made of.
"""

from __future__ import annotations

from enum import Enum


class Step(str, Enum):
    """What a starting engine does, in this order. Where its log tells nothing, it is taken to be at the first."""

    IMPORTS = "imports"
    WEIGHTS = "weights"
    WARM_UP = "warm-up"


ORDER = tuple(Step)


def later(current: Step, seen: Step) -> bool:
    """True when `seen` comes after `current`: log lines may be missed, and come twice from several workers."""
    return ORDER.index(seen) > ORDER.index(current)


def by_memory(allocations: int, committed: bool) -> Step:
    """How far the writer of the weights is at least, by what its memory service says."""
    if committed:
        return Step.WARM_UP
    return Step.WEIGHTS if allocations else Step.IMPORTS
