"""The pure core under orders of events that hypothesis looks for, and what a death costs as nodes are added."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bench import simulate
from tests.simulation.interleavings import STEPS
from tests.simulation.world import explore


@settings(max_examples=300, deadline=None)
@given(
    nnodes=st.integers(1, 3),
    cohorts=st.integers(2, 3),
    faults=st.integers(0, 4),
    activate=st.booleans(),
    picks=st.lists(st.integers(0, 1000), max_size=80),
)
def test_any_order_of_events(nnodes: int, cohorts: int, faults: int, activate: bool, picks: list[int]) -> None:
    """As `test_interleavings`, with the search for the smallest case that fails, which prints as a call of `replay`."""
    left = iter(picks)
    explore(nnodes, cohorts, lambda n: next(left, 0), STEPS, faults, activate)


def test_a_rank_dies_with_its_peer_before_the_leader_has_decided_anything_and_the_cost_is_linear() -> None:
    """`measure` takes one remote rank away; it asserts that another node's rank goes by the first message."""
    small, large = simulate.measure(16), simulate.measure(64)
    for what in ("records_written", "messages", "decisions"):
        assert large[what] < 4.2 * small[what], what
