"""The pure core under orders of events that hypothesis looks for, and what a death costs as nodes are added."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import simulate
from gms_launch.control.keys import Keys, Range, prefix
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


def same_but_for_registrations(few: dict[str, int], many: dict[str, int]) -> bool:
    """Whether a failover costs the same in a run of more groups. Every group's leader hears what registers with Dynamo:
    once more and once less.
    """
    equal = ("records_written", "messages_to_the_group", "messages_to_the_runs_leader", "decisions")
    more = 2 * (many["groups"] - few["groups"])
    return all(few[k] == many[k] for k in equal) and many["messages"] == few["messages"] + more


def test_a_failover_costs_what_its_group_is_large_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """In messages, records and decisions; and that is found out when an agent follows a group that is not its own."""
    few, many = simulate.measure_groups(2), simulate.measure_groups(24)
    assert same_but_for_registrations(few, many), (few, many)
    assert simulate.measure_groups(1)["messages"] == few["messages_to_the_group"], "but for the run's leader"
    right = Keys.everywhere

    def everywhere(keys: Keys) -> list[Range]:
        return [*right(keys), prefix(f"{keys.prefix}group/g1")]  # g1, and g10 to g19

    monkeypatch.setattr(Keys, "everywhere", everywhere)
    assert not same_but_for_registrations(simulate.measure_groups(2), simulate.measure_groups(12))
