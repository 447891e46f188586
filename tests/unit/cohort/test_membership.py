"""Which members of etcd are done without."""

from __future__ import annotations

import pytest

from gms_launch.cohort.membership import outvoted


@pytest.mark.parametrize(
    ("members", "here", "found"),
    [
        (3, {0, 1, 2, 3}, []),
        (3, {0, 1, 3}, [2]),
        (3, {1, 2}, [0]),
        (3, {0, 3}, []),  # nobody can decide
        (5, {0, 2, 4}, [1, 3]),
        (5, {0, 1}, []),
        (1, set(), []),
    ],
)
def test_lost_members_are_done_without_where_most_are_left(members: int, here: set[int], found: list[int]) -> None:
    assert outvoted(members, here) == found
