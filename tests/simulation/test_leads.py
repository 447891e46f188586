"""The run's leader role under every order of events that chance finds, and proof that this finds mistakes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.simulation import leads
from tests.simulation.leads import GRANTED, WAIT, LeadWorld, explore
from tests.simulation.world import Broken, nobody


def one(seed: int, steps: int = 60, faults: int = 4) -> LeadWorld:
    rng = random.Random(seed)
    return explore(rng.choice((3, 4)), 3, rng.choice((0, 1, 1, 2)), rng.randrange, steps, faults)


@pytest.mark.timeout(900)
def test_six_thousand_interleavings_with_a_role_that_moves() -> None:
    """Whoever writes as leader has the role, and in the end somebody has it and every rank its agent."""
    runs = [one(seed) for seed in range(6_000)]
    assert sum(len(w.terms) > 1 for w in runs) > 1000, "it moved"
    assert sum(w.refused for w in runs) > 300, "and somebody did not know that yet"
    assert sum(w.taken for w in runs) > 300, "spares took places"
    assert sum(bool(w.aborted) for w in runs) < 60, "two members lost at once are more than three bear"


def leader(world: LeadWorld) -> leads.Agent:
    (found,) = (a for a in world.agents if a.token and world.holds(a.token))
    return found


def go_on(world: LeadWorld, seconds: float) -> None:
    """Everybody who is well does what there is to do, second after second."""
    for _ in range(int(seconds)):
        world.pass_time(1.0)
        for a in (a for a in world.agents if a.up and not a.stopped and world.reaches(a)):
            while a.news:
                world.hear(a)
            world.look(a)
            while a.wants:
                world.write(a)


def test_the_first_node_leads_and_the_next_takes_over_within_two_leases() -> None:
    world = LeadWorld(3, 3, 0, nobody)
    assert leader(world).rank == 0
    world.lose(world.agents[0])
    go_on(world, 2 * GRANTED)
    assert leader(world).rank == 1


def test_leader_and_group_leader_lost_together_are_followed_by_a_spare() -> None:
    """Node 0 leads the run, and the first group."""
    world = LeadWorld(4, 3, 1, nobody)
    world.lose(world.agents[0])
    go_on(world, 2 * GRANTED + WAIT + 2)
    assert (leader(world).rank, world.seats[0].origin, world.agents[4].rank) == (1, 4, 0)


@pytest.mark.parametrize("alone", [0, 1, 2])
def test_of_one_member_against_two_the_two_have_the_leader(alone: int) -> None:
    world = LeadWorld(3, 3, 0, nobody)
    world.split(alone)
    go_on(world, 2 * GRANTED)
    assert leader(world).rank == (1 if alone == 0 else 0)
    assert alone or not world.sure(world.agents[0]), "it knows that it does not lead any more"


def test_a_leader_that_stood_still_writes_nothing_and_finds_another() -> None:
    world = LeadWorld(3, 3, 0, nobody)
    old = leader(world)
    world.speak(old)
    old.stopped = True
    go_on(world, 2 * GRANTED)
    assert leader(world).rank == 1
    world.come_back(old)
    world.write(old)
    assert world.refused == 1
    go_on(world, 5)
    assert leader(world).rank == 1 and not old.token


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("holds", lambda self, token: token > 0),  # whoever had the role may write for ever
        ("free", lambda self: True),  # whoever asks for it has it
    ],
)
def test_each_of_the_rules_is_needed(monkeypatch: pytest.MonkeyPatch, name: str, mistake: Any) -> None:
    monkeypatch.setattr(leads.LeadWorld, name, mistake)
    for seed in range(6000):
        try:
            one(seed, 80, 4)
        except Broken as exc:
            if "leads.replay(" in str(exc) and "not well" not in str(exc):
                return
    pytest.fail("not found")
