"""Planned hand-overs, decided: who takes over (`activation`), and how engine arguments change (`roll`)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gms_launch.cohort import controller
from gms_launch.cohort.actions import Activate, Answer, Kill, Proved, Roll, RollBack, Start
from gms_launch.cohort.model import ENDED, Phase
from gms_launch.cohort.view import KillRequest, Memory, Policy, RollRequest, Slot, View

LOCK = Policy(cohorts=3, start_timeout=100, promotion_timeout=20, backoff=1, backoff_max=8, window=600, limit=3)
AGENT = replace(LOCK, activate=True)
SERVED = Memory(initial=False, activated=(0, 1), served=frozenset({(0, 1)}), best={(0, 1): Phase.ACTIVE})


def slots(*phases: Phase, generations: tuple[int, ...] = (0, 0, 0)) -> dict[int, Slot]:
    made = (Slot(k, 1, p not in ENDED, False, p, since=10.0 - k) for k, p in enumerate(phases))
    return {s.cohort_id: replace(s, generation=generations[s.cohort_id]) for s in made}


def view(*phases: Phase, **more: object) -> View:
    generations = more.pop("generations", (0, 0, 0))
    return View(slots(*phases, generations=generations), confirmed=(0, 1), **more)  # type: ignore[arg-type]


PARKED, ACTIVE, FAILING, FENCED = Phase.PARKED, Phase.ACTIVE, Phase.FAILING, Phase.FENCED


def test_the_lock_decides_unless_the_agents_do() -> None:
    found, _ = controller.decide(view(PARKED, PARKED, PARKED), Memory(), LOCK, 0.0)
    assert not any(isinstance(a, Activate) for a in found)
    found, memory = controller.decide(view(PARKED, PARKED, PARKED), Memory(), AGENT, 0.0)
    assert found == [Activate(2, 1)], "it has been parked longest"
    assert controller.decide(view(PARKED, PARKED, PARKED), memory, AGENT, 1.0)[0] == [], "one is enough"


def test_nobody_is_let_go_before_the_last_one_is_fenced() -> None:
    failing = view(FAILING, PARKED, PARKED)
    found, memory = controller.decide(failing, SERVED, AGENT, 1.0)
    assert not any(isinstance(a, Activate) for a in found)
    found, memory = controller.decide(view(FENCED, PARKED, PARKED), memory, AGENT, 1.1)
    assert [a for a in found if isinstance(a, Activate)] == [Activate(2, 1)]
    assert memory.activated == (2, 1)


def test_a_life_that_was_let_go_must_take_its_lock() -> None:
    _, memory = controller.decide(view(PARKED, PARKED, PARKED), Memory(initial=False), AGENT, 0.0)
    assert controller.decide(view(PARKED, PARKED, PARKED), memory, AGENT, 19.0)[0] == []
    (kill,) = controller.decide(view(PARKED, PARKED, PARKED), memory, AGENT, 20.0)[0]
    assert isinstance(kill, Kill) and kill.cohort_id == 2 and "promotion_timeout" in kill.why
    assert controller.next_look(view(PARKED, PARKED, PARKED), memory, AGENT, 1.0) == 20.0


def test_a_life_that_was_let_go_and_died_unseen_is_a_failed_start() -> None:
    memory = replace(SERVED, activated=(1, 1), best={(0, 1): ACTIVE, (1, 1): PARKED})
    _, after = controller.decide(view(ACTIVE, FENCED, PARKED), memory, AGENT, 5.0)
    assert after.failures == {1: (5.0,)}


def test_a_successor_can_be_chosen_where_agents_decide() -> None:
    running = view(ACTIVE, PARKED, PARKED, requests=(KillRequest("u", "group", False, to=1),))
    found, memory = controller.decide(running, SERVED, AGENT, 1.0)
    assert [type(a) for a in found] == [Kill, Answer]
    found, _ = controller.decide(view(FENCED, PARKED, PARKED), memory, AGENT, 1.1)
    assert Activate(1, 1) in found, "although cohort 2 has been parked longer"
    (refused,) = controller.decide(running, SERVED, LOCK, 1.0)[0]
    assert isinstance(refused, Answer) and not refused.ok and "--activation agent" in refused.detail
    (only,) = [
        s
        for s in controller.decide(view(ACTIVE, PARKED, Phase.STARTING, requests=running.requests), SERVED, LOCK, 1.0)[
            0
        ]
        if isinstance(s, Kill)
    ]
    assert only.cohort_id == 0, "the only one that is parked may be named"
    starting = view(ACTIVE, Phase.STARTING, PARKED, requests=running.requests)
    (refused,) = controller.decide(starting, SERVED, AGENT, 1.0)[0]
    assert isinstance(refused, Answer) and refused.detail == "cohort 1 is not parked; parked: 2"


# -- rolls ---------------------------------------------------------------------------------------------------------

ROLL = RollRequest("u", ("--max-model-len", "4096"))


def test_a_roll_begins_when_all_is_well() -> None:
    found, _ = controller.decide(view(ACTIVE, PARKED, PARKED, requests=(ROLL,)), SERVED, LOCK, 1.0)
    assert found == [Roll(ROLL.engine_args), Answer("u", True, "the shadows are being restarted")]


@pytest.mark.parametrize(
    ("seen", "memory", "policy", "why"),
    [
        (view(ACTIVE, PARKED, Phase.STARTING), SERVED, LOCK, "wait for redundancy full"),
        (view(ACTIVE, PARKED, PARKED), Memory(), LOCK, "wait for redundancy full"),
        (view(ACTIVE, PARKED, PARKED, generation=1, rolling=True), SERVED, LOCK, "a roll is under way"),
        (view(ACTIVE, PARKED, PARKED, gms_down=("n0",)), SERVED, LOCK, "GMS on n0 is gone"),
        (view(ACTIVE), SERVED, replace(LOCK, cohorts=1), "no shadows"),
    ],
)
def test_a_roll_is_refused(seen: View, memory: Memory, policy: Policy, why: str) -> None:
    found, _ = controller.decide(replace(seen, requests=(ROLL,)), memory, policy, 1.0)
    answers = [a for a in found if isinstance(a, Answer)]
    assert not any(isinstance(a, Roll) for a in found)
    assert [a.ok for a in answers] == [False] and why in answers[0].detail


def test_a_roll_is_refused_where_no_shadow_could_try_it_and_begins_where_one_can() -> None:
    gone = {k: Slot(k, 5, False, True, FENCED, since=0.0) for k in (1, 2)}
    alone = view(ACTIVE, PARKED, PARKED, requests=(ROLL,))
    spent = Memory(initial=False, served=SERVED.served, best=SERVED.best, failures={1: (0.5,), 2: (0.5,)})
    found, _ = controller.decide(replace(alone, slots={**alone.slots, **gone}), spent, LOCK, 1.0)
    (answer,) = found
    assert isinstance(answer, Answer) and not answer.ok and "every shadow is given up" in answer.detail
    found, _ = controller.decide(replace(alone, slots={**alone.slots, 1: gone[1]}), spent, LOCK, 1.0)
    assert any(isinstance(a, Roll) for a in found)


def test_shadows_are_restarted_one_at_a_time_and_the_primary_never() -> None:
    found, _ = controller.decide(view(ACTIVE, PARKED, PARKED, generation=1), SERVED, LOCK, 1.0)
    assert [type(a) for a in found] == [Kill] and found[0].cohort_id == 1  # type: ignore[union-attr]
    busy = view(ACTIVE, Phase.STARTING, PARKED, generation=1, generations=(0, 1, 0))
    assert controller.decide(busy, SERVED, LOCK, 1.0)[0] == []
    second = view(ACTIVE, PARKED, PARKED, generation=1, generations=(0, 1, 0))
    assert [a.cohort_id for a in controller.decide(second, SERVED, LOCK, 1.0)[0]] == [2]  # type: ignore[union-attr]
    done = view(ACTIVE, PARKED, PARKED, generation=1, generations=(0, 1, 1))
    assert controller.decide(done, SERVED, LOCK, 1.0)[0] == []


def test_no_shadow_is_restarted_while_nobody_serves() -> None:
    for first in (Phase.WAKING, FENCED):
        found, _ = controller.decide(view(first, PARKED, PARKED, generation=1), SERVED, LOCK, 1.0)
        assert not any(isinstance(a, Kill) for a in found)


def test_the_first_that_parks_proves_the_new_arguments() -> None:
    new = view(ACTIVE, PARKED, PARKED, generation=1, generations=(0, 1, 0), rolling=True)
    assert controller.decide(new, SERVED, LOCK, 1.0)[0] == [Proved(1, 1)]


@pytest.mark.parametrize("phase", [FAILING, FENCED])
def test_a_start_that_fails_brings_the_old_arguments_back(phase: Phase) -> None:
    new = view(ACTIVE, phase, PARKED, generation=1, generations=(0, 1, 0), rolling=True)
    found, memory = controller.decide(new, SERVED, LOCK, 1.0)
    assert found == [RollBack(1, 1, "it ended while it was starting")], "and it is not started again before that"
    back = view(ACTIVE, phase, PARKED, generation=0, generations=(0, 1, 0))
    found, _ = controller.decide(back, memory, LOCK, 20.0)
    assert all(isinstance(a, Start) for a in found)
    assert controller.tries(1, memory, LOCK, 20.0).failed == 0, "an attempt does not use the budget up"
