"""Spares under every order of events that chance finds, and proof that this finds mistakes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.simulation import spares
from tests.simulation.spares import SpareWorld, explore
from tests.simulation.world import Broken, nobody


def one(seed: int, steps: int = 40, faults: int = 3) -> SpareWorld:
    rng = random.Random(seed)
    return explore(rng.choice((2, 2, 3)), rng.choice((1, 1, 2)), rng.choice((2, 2, 3)), rng.randrange, steps, faults)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [2_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_interleavings_with_spares(number: int) -> None:
    """Never two ranks in one place, and none begun before its predecessor is dead, wherever that was."""
    runs = [one(seed) for seed in range(number)]
    assert sum(w.taken for w in runs) > number // 15, "spares took places"
    assert sum(bool(w.aborted) for w in runs) < number // 3


def full(serving: int, number: int) -> SpareWorld:
    world = SpareWorld(serving, number, 2, nobody, 0)
    world.settle()
    assert world.full()
    return world


def at(world: SpareWorld, rank: int) -> int:
    return world.nodes[rank].origin


def test_a_node_that_is_gone_for_good_is_followed_by_a_spare() -> None:
    world = full(3, 1)
    world.lose(world.nodes[1])
    world.settle()
    assert world.full() and (at(world, 1), at(world, 2)) == (3, 2)


def test_a_spare_that_is_lost_while_it_takes_over_is_followed_by_the_next() -> None:
    world = full(2, 2)
    world.lose(world.nodes[1])
    while not world.taken:
        world.pass_time(1.0)
        world.lead()
        world.look()
        for x in list(world.decided):
            world.exchange(x)
    (chosen,) = (m for m in world.idle if not m.lost and not world.owns(m))
    world.lose(chosen)
    world.settle()
    assert world.full() and at(world, 1) == 5 - chosen.origin and world.taken == 2


def test_two_lost_with_one_spare_wait_for_one_of_them() -> None:
    world = full(3, 1)
    world.lose(world.nodes[1])
    world.lose(world.nodes[2])
    world.settle()
    assert "did not come back" in world.aborted, "with nobody left it ends with a word"
    world = full(3, 1)
    world.lose(world.nodes[1])
    world.crash(world.nodes[2])
    world.settle()
    assert world.full() and at(world, 1) == 3


def find(monkeypatch: pytest.MonkeyPatch, name: str, mistake: Any) -> Broken:
    monkeypatch.setattr(spares.SpareWorld, name, mistake)
    for seed in range(6000):
        try:
            one(seed, 80, 4)
        except Broken as exc:
            return exc
    pytest.fail("not found")


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("guard", lambda self, m: None),  # a stopped agent's ranks live on
        ("may_act", lambda self, m: True),  # whoever wakes up acts on what it knows
    ],
)
def test_each_of_the_rules_is_needed(monkeypatch: pytest.MonkeyPatch, name: str, mistake: Any) -> None:
    assert "replay(" in str(find(monkeypatch, name, mistake))
