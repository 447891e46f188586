"""Whose a registered instance is."""

from __future__ import annotations

import pytest

from gms_launch.cohort.model import Phase
from gms_launch.cohort.registrations import Candidate, Registrations, owner

OLD, NEW, PARKED = (0, 1), (1, 1), (2, 1)


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        # The race: the old one has let go of the lock and is not seen dead.
        ([Candidate(OLD, Phase.ACTIVE, False), Candidate(NEW, Phase.WAKING, True)], NEW),
        ([Candidate(OLD, Phase.ACTIVE, False), Candidate(NEW, Phase.PARKED, True)], NEW),
        # The kernel does not show the holder: another pid namespace, a lock that a child has.
        ([Candidate(OLD, Phase.ACTIVE, False), Candidate(NEW, Phase.WAKING, False)], NEW),
        ([Candidate(OLD, Phase.ACTIVE, False), Candidate(PARKED, Phase.PARKED, False)], OLD),
        ([Candidate(PARKED, Phase.PARKED, False)], None),
        ([Candidate(OLD, Phase.FAILING, True), Candidate(NEW, Phase.PARKED, False)], None),
        ([], None),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_an_instance_belongs_to_one_life_in_whatever_order_they_are_asked(
    candidates: list[Candidate], expected: tuple[int, int] | None, turned: bool
) -> None:
    assert owner(reversed(candidates) if turned else candidates) == expected


def test_a_lease_keeps_its_owner_and_a_stranger_stays_one() -> None:
    known = Registrations()
    assert known.seen([7, 8, 7]) == [7, 8]
    known.belongs(7, OLD)
    known.belongs(8, None)
    assert known.seen([7, 8, 9]) == [9]
    known.belongs(9, NEW)
    known.belongs(7, NEW)
    assert known.of(OLD) == [7] and known.of(NEW) == [9]


def test_lost_is_what_was_registered_and_has_no_instance_left() -> None:
    known = Registrations()
    assert not known.lost(OLD), "never registered: an engine that speaks for itself"
    known.seen([7, 8])
    known.belongs(7, OLD)
    known.belongs(8, OLD)
    known.seen([8])
    assert not known.lost(OLD), "another endpoint of it is there"
    known.seen([])
    assert known.lost(OLD)
    known.seen([7])
    assert not known.lost(OLD), "it registered again"
