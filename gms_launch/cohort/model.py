"""The states of a cohort, its legal moves, and what they add up to.

Pure: no I/O, no clock. `move` is the only function that changes a phase, and it refuses an illegal move.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


class Phase(str, Enum):
    """Where one life of a cohort, or of one rank of it, stands.

    A headless rank has no signals of its own; it is STARTING until it fails, and the leader rank speaks for it. With
    hybrid load balancing none is headless, and each speaks for itself.
    """

    PENDING = "pending"
    STARTING = "starting"
    PARKED = "parked"
    WAKING = "waking"
    ACTIVE = "active"
    FAILING = "failing"
    FENCED = "fenced"


#: From any living phase a rank may fail; a fenced slot may be started again. Phases are read from signals that can be
#: missed (a log line, a scrape), so a living rank may skip forward, but never backward.
LEGAL: Mapping[Phase, frozenset[Phase]] = {
    Phase.PENDING: frozenset({Phase.STARTING}),
    Phase.STARTING: frozenset({Phase.PARKED, Phase.WAKING, Phase.ACTIVE, Phase.FAILING}),
    Phase.PARKED: frozenset({Phase.WAKING, Phase.ACTIVE, Phase.FAILING}),
    Phase.WAKING: frozenset({Phase.ACTIVE, Phase.FAILING}),
    Phase.ACTIVE: frozenset({Phase.FAILING}),
    Phase.FAILING: frozenset({Phase.FENCED}),
    Phase.FENCED: frozenset({Phase.PENDING}),
}
ALIVE = frozenset({Phase.STARTING, Phase.PARKED, Phase.WAKING, Phase.ACTIVE})
ENDED = frozenset({Phase.FAILING, Phase.FENCED})


class IllegalMoveError(Exception):
    """A phase was asked to change in a way that cannot happen."""


def move(current: Phase, new: Phase) -> Phase:
    """The phase after the move. Staying is allowed; anything else must be in `LEGAL`."""
    if new is current:
        return current
    if new not in LEGAL[current]:
        raise IllegalMoveError(f"a cohort cannot go from {current.value} to {new.value}")
    return new


class Redundancy(str, Enum):
    """How much can fail before nobody serves."""

    FULL = "full"
    DEGRADED = "degraded"
    NONE = "none"
    DOWN = "down"


@dataclass(frozen=True)
class CohortView:
    """One cohort slot as the records show it. `phase` is that of the whole cohort."""

    cohort_id: int
    incarnation: int
    phase: Phase
    since: float = 0.0


def cohort_phase(phases: Mapping[int, Phase], nodes: Collection[int], hybrid: bool = False) -> Phase:
    """The phase of a whole cohort from its ranks' (node rank -> phase) in one incarnation.

    `nodes` are those that count: a lost node has no say. One failing rank makes the cohort failing; it is fenced only
    when every node says so. Otherwise the leader rank speaks for all, once every rank has been started; with `hybrid`
    load balancing all do: it is active, or parked, when all of them are, and takes over as soon as one does.
    """
    known = [phases[node] for node in nodes if node in phases]
    if not ENDED.isdisjoint(known):
        return Phase.FENCED if known.count(Phase.FENCED) == len(nodes) else Phase.FAILING
    if not known:
        return Phase.PENDING
    if len(known) < len(nodes) or 0 not in nodes:
        return Phase.STARTING
    if not hybrid:
        return phases[0]
    if Phase.WAKING in known or Phase.ACTIVE in known:
        return Phase.ACTIVE if known.count(Phase.ACTIVE) == len(known) else Phase.WAKING
    return Phase.PARKED if known.count(Phase.PARKED) == len(known) else Phase.STARTING


def primary(cohorts: Iterable[CohortView]) -> CohortView | None:
    """The cohort that serves, or is about to."""
    found = [c for c in cohorts if c.phase in (Phase.ACTIVE, Phase.WAKING)]
    return max(found, key=lambda c: (c.phase is Phase.ACTIVE, c.since), default=None)


def redundancy(cohorts: Iterable[CohortView], shadows: int, gms_ready: bool = True) -> Redundancy:
    """What the phases add up to. Without a working GMS a parked cohort could not wake, so it does not count."""
    phases = [c.phase for c in cohorts]
    if Phase.ACTIVE not in phases:
        return Redundancy.DOWN
    parked = phases.count(Phase.PARKED) if gms_ready else 0
    if parked >= shadows:
        return Redundancy.FULL
    return Redundancy.DEGRADED if parked else Redundancy.NONE
