"""Which registered instance belongs to which life, and what is gone of it. Pure: no I/O, no clock.

Dynamo names an instance by its lease and nothing else, so whose it is must be found out when it is first seen; from
then on that never changes. To credit one to two lives would end the new primary's lease together with the dead one's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from gms_launch.cohort.model import ALIVE, Phase

Life = tuple[int, int]


@dataclass(frozen=True)
class Candidate:
    """A living leader rank of this node. `holds`: the kernel shows one of its processes as the lock's holder."""

    life: Life
    phase: Phase
    holds: bool


def owner(candidates: Iterable[Candidate]) -> Life | None:
    """Whose an instance is that was not there before; None when it can be nobody's here.

    Only an engine that has the lock registers. A dying one lets go of the lock before its end is seen, and then looks
    active beside the one that has just registered: so the lock's holder first, then who wakes, then who is active.
    """
    living = [c for c in candidates if c.phase in ALIVE]
    for found in (
        [c for c in living if c.holds],
        [c for c in living if c.phase is Phase.WAKING],
        [c for c in living if c.phase is Phase.ACTIVE],
    ):
        if found:
            return found[0].life
    return None


@dataclass
class Registrations:
    """The leases of the instances that are registered, or were, each with the one life that it belongs to."""

    _owners: dict[int, Life | None] = field(default_factory=dict)
    _here: frozenset[int] = frozenset()

    def seen(self, leases: Collection[int]) -> list[int]:
        """Take in all leases that have a registered instance now; returns those that were never seen before."""
        self._here = frozenset(leases)
        return [lease for lease in dict.fromkeys(leases) if lease not in self._owners]

    def belongs(self, lease: int, life: Life | None) -> None:
        """Note whose a lease is (None: a stranger's in the same namespace). That is for good."""
        self._owners.setdefault(lease, life)

    def of(self, life: Life) -> list[int]:
        """The leases of a life, also of one that is dead."""
        return [lease for lease, who in self._owners.items() if who == life]

    def owner(self, lease: int) -> Life | None:
        """Whose a lease is, as it was noted."""
        return self._owners.get(lease)

    def owned(self) -> tuple[int, ...]:
        """The leases of known lives that have a registered instance now."""
        return tuple(sorted(lease for lease in self._here if self._owners.get(lease) is not None))

    def present(self, life: Life) -> bool:
        """True for a life that is registered now."""
        return self.here(self.of(life))

    def here(self, leases: Collection[int]) -> bool:
        """True when one of these leases has a registered instance now."""
        return not self._here.isdisjoint(leases)

    def lost(self, life: Life) -> bool:
        """True for a life that was registered and is not any more."""
        return bool(self.of(life)) and not self.present(life)
