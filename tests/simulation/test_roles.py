"""A whole run under every order of events that chance finds, and proof that this finds mistakes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from gms_launch.cohort import census, controller, reconciler, seats
from tests.simulation import roles
from tests.simulation.interleavings import spread, with_roles
from tests.simulation.roles import NODE_WAIT, RunWorld, explore, settled
from tests.simulation.world import Broken, nobody

SHAPE = ((2, 2), 3, 1)


@pytest.mark.timeout(900)
def test_five_hundred_interleavings_of_a_run_whose_roles_move() -> None:
    """Never two active in a group, no write of a leader that was followed, and an end that is right."""
    worlds = [explore(random.Random(seed).randrange, 30) for seed in range(500)]
    assert sum(len(w.terms) > 1 for w in worlds) > 150, "the run's leader was another"
    assert sum(any(w.terms_of) for w in worlds) > 75, "so was a group's"
    assert sum(w.refused > 0 for w in worlds) > 10, "and somebody did not know that yet"
    assert sum(w.taken > 0 for w in worlds) > 150, "spares took places"
    assert 0 < sum(bool(w.ended) for w in worlds) < 125


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_interleavings_of_a_run_whose_roles_move() -> None:
    assert sum(count for count, _ in spread(range(100_000), what=with_roles)) == 100_000


def world() -> RunWorld:
    found = settled(SHAPE)
    found.choose = nobody
    return found


def whole(w: RunWorld, *but: int) -> None:
    assert all(w.full(g) for g in range(len(w.places)) if g not in but), w.describe()


def test_leader_and_group_leader_are_lost_together_and_a_spare_follows_one() -> None:
    w = world()
    w.lose_both(w.agents[0], w.agents[3], good=False)
    w.lose(w.agents[0])
    w.settle()
    whole(w)
    assert w.terms_of[0] == 1 and w.seats[0].origin == 4 and len(w.terms) == 2


def test_two_against_three_and_one_against_two() -> None:
    """The minority's ranks are dead within the lease, and in the end everybody is where he was or a spare is."""
    for bits in (0b00011, 0b11100, 0b00001, 0b01001):
        w = world()
        w.part(bits)
        w.go_on(8.0)
        for m in w.agents:
            assert w.reaches(m) or all(p.dead for p in m.procs.values()), bin(bits)
        w.go_on(20.0)
        w.settle()
        whole(w)


def test_a_spare_that_is_lost_as_it_takes_over_is_followed_by_the_lost_node() -> None:
    w = world()
    w.crash(w.agents[1])
    while 1 not in w.seats:
        w.pass_time(1.0)
        w.turn()
    w.lose(w.agents[4])
    w.settle()
    whole(w)
    assert w.seats[1].origin == 1, "it came back as the spare, and took its place again"


def test_a_group_leader_that_stood_still_writes_nothing() -> None:
    w = world()
    old = w.agents[2]
    w.put(old, ("desired", 1, 0), replace(old.known["desired", 1, 0], running=False, why="late"))
    old.stopped = True
    while 2 not in w.nodes or not w.seats:
        w.go_on(1.0)
    before = w.refused
    old.stopped = False
    w.deliver(old)
    assert w.refused == before + 1 and w.store["desired", 1, 0].why != "late"
    w.settle()
    whole(w)


def test_without_a_spare_the_run_goes_on_with_one_group_and_ends_with_none() -> None:
    w = settled(((2, 2), 3, 0))
    w.lose(w.agents[2])
    w.settle()
    whole(w, 1)
    assert w.store["said", 1].failed and not w.ended
    w = settled(((3,), 3, 0))
    w.lose(w.agents[0])
    w.go_on(NODE_WAIT)
    assert not w.ended, "it is waited for"
    w.settle()
    assert "1 must (--min-groups)" in w.ended


# -- mistakes that must be found -----------------------------------------------------------------------------------

right_control, right_seats, right_orphans, right_few = controller.decide, seats.decide, census.orphans, census.too_few


def find(what: str = "", seeds: int = 4000) -> str:
    """The first case that breaks with these words."""
    for seed in range(seeds):
        try:
            explore(random.Random(seed).randrange, 40, 4)
        except Broken as exc:
            if what in str(exc).splitlines()[0]:
                return str(exc)
    pytest.fail("not found")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mistake", "what"),
    [
        ("may_write", lambda self, m: True, "after leader"),  # whoever led a group may write for ever
        ("holds", lambda self, token: token > 0, "after leader"),  # and whoever led the run
        pytest.param("free", lambda self: True, "which", marks=pytest.mark.slow),  # whoever asks for that role has it
        # A rank is given to a spare while its agent is there.
        pytest.param("vacated", lambda self, rank: True, "", marks=pytest.mark.slow),
        ("guard", lambda self, m: None, ""),  # a stopped agent's ranks live on
        ("sure", lambda self, a: a.lease > 0, ""),  # whoever is cut off goes on
    ],
)
def test_each_of_the_rules_is_needed(monkeypatch: pytest.MonkeyPatch, name: str, mistake: Any, what: str) -> None:
    monkeypatch.setattr(roles.RunWorld, name, mistake)
    text = find(what)
    assert "roles.replay(" in text
    if name == "may_write":
        picked, steps, faults = eval(text.rpartition("roles.replay")[2])
        with pytest.raises(Broken, match="after leader"):
            roles.replay(picked, steps, faults)


def hasty(view: Any, memory: Any, policy: Any, now: float) -> Any:
    """A node that is lost is not waited for."""
    return right_control(view, memory, replace(policy, node_wait=2.0), now)


def reckless(nodes: Any, taken: Any, rules: Any, *rest: Any) -> Any:
    """Members of etcd are given away without a majority of the others."""
    return right_seats(nodes, taken, replace(rules, members=0), *rest)


@pytest.mark.parametrize(
    ("where", "name", "mistake"),
    [
        (controller, "decide", hasty),
        (seats, "decide", lambda *args: []),  # no spare takes over
        (census, "orphans", lambda *args: []),  # nobody says of a group without its leader that it is over
        (census, "orphans", lambda groups, absent, wait, now: right_orphans(groups, absent, 2.0, now)),
        (census, "too_few", lambda groups, *rest, **more: ("", 0)),  # the run never ends
        (census, "too_few", lambda groups, n, least, up: right_few(groups, n, n, up)),  # it ends with its first group
        (reconciler, "decide", lambda desired, local, ended: []),  # nobody follows
    ],
    ids=["hasty", "no spare", "no word of orphans", "hasty orphans", "no end", "an early end", "nobody acts"],
)
def test_mistakes_of_the_decisions_are_found(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, mistake: Any
) -> None:
    monkeypatch.setattr(where, name, mistake)
    find()


def test_of_members_that_are_away_none_is_given_away_unless_most_of_the_others_vote(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Node 2 is lost for good while the agent of node 0 stands still: its member is what keeps the majority."""

    def run() -> RunWorld:
        w = world()
        w.agents[0].stopped = True
        w.lose(w.agents[2])
        w.go_on(NODE_WAIT - 8)
        w.settle()
        return w

    whole(run())
    monkeypatch.setattr(seats, "decide", reckless)
    assert "majority" in run().aborted
