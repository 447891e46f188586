"""The pure core under every order of events that chance finds, and proof that this finds mistakes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import simulate
from gms_launch.cohort import controller, reconciler
from gms_launch.cohort.model import Phase
from tests.simulation import world
from tests.simulation.world import Broken, explore, replay

STEPS, FAULTS = 30, 2


def one(seed: int, steps: int = STEPS, faults: int = FAULTS) -> bool:
    """One interleaving; True when the run ended with a word. Raises `Broken`."""
    rng = random.Random(seed)
    nnodes, cohorts = rng.choice((1, 2, 2, 3)), rng.choice((2, 2, 3))
    return bool(explore(nnodes, cohorts, rng.randrange, steps, faults, rng.random() < 0.3).aborted)


def many(first: int, count: int) -> int:
    return sum(one(seed) for seed in range(first, first + count))


def spread(total: int) -> int:
    """`total` interleavings over the cores of this machine; how many ended with a word."""
    share = 2500
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(many, range(0, total, share), [share] * (total // share)))


@pytest.mark.timeout(900)
def test_a_hundred_thousand_interleavings() -> None:
    """Never two active, never started before the predecessor is dead, never killed without a cause, always an end."""
    ended = spread(100_000)
    assert 0 < ended < 50_000, "some runs lose a node for good, and most do not"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_million_interleavings() -> None:
    assert spread(1_000_000) > 0


@settings(max_examples=300, deadline=None)
@given(
    nnodes=st.integers(1, 3),
    cohorts=st.integers(2, 3),
    faults=st.integers(0, 4),
    activate=st.booleans(),
    picks=st.lists(st.integers(0, 1000), max_size=80),
)
def test_any_order_of_events(nnodes: int, cohorts: int, faults: int, activate: bool, picks: list[int]) -> None:
    """As above, with the search for the smallest case that fails, which prints as a call of `replay`."""
    left = iter(picks)
    explore(nnodes, cohorts, lambda n: next(left, 0), STEPS, faults, activate)


def test_a_rank_dies_with_its_peer_before_the_leader_has_decided_anything_and_the_cost_is_linear() -> None:
    """`measure` takes one remote rank away; it asserts that another node's rank goes by the first message."""
    small, large = simulate.measure(16), simulate.measure(64)
    for what in ("records_written", "messages", "decisions"):
        assert large[what] < 4.2 * small[what], what


# -- mistakes that must be found -----------------------------------------------------------------------------------


def find(runs: int = 3000) -> Broken:
    for seed in range(runs):
        try:
            one(seed, 80, 6)
        except Broken as exc:
            return exc
    pytest.fail(f"not found in {runs} interleavings")


def hasty_fence(phases: Any, nodes: Any) -> Phase:
    """A life counts as fenced when the first node says so."""
    return Phase.FENCED if Phase.FENCED in phases.values() else right_phase(phases, nodes)


def forgetful(desired: Any, local: Any, ended: Any, group_kill: bool = True) -> list[Any]:
    """A life that ended before it began on this node is never said to be dead here."""
    return [a for a in right_decide(desired, local, ended, group_kill) if not isinstance(a, reconciler.SkipRank)]


def hasty_start(view: Any, memory: Any, policy: Any, now: float) -> Any:
    """The next life is wanted when the last one is unwanted, and not when it is proved dead."""
    actions, memory = right_control(view, memory, policy, now)
    failing = [s for s in view.slots.values() if not s.running and s.phase is Phase.FAILING]
    return actions + [controller.Start(s.cohort_id, s.incarnation + 1, "") for s in failing], memory


def bloodthirsty(view: Any, memory: Any, policy: Any, now: float) -> Any:
    """When the primary dies, its shadow is killed too."""
    actions, memory = right_control(view, memory, policy, now)
    dead = any(isinstance(a, controller.Kill) for a in actions)
    parked = [s for s in view.slots.values() if s.running and s.phase is Phase.PARKED]
    return actions + [controller.Kill(s.cohort_id, s.incarnation, "") for s in parked if dead], memory


def lazy(view: Any, memory: Any, policy: Any, now: float) -> Any:
    """No slot is started again."""
    actions, memory = right_control(view, memory, policy, now)
    return [a for a in actions if not (isinstance(a, controller.Start) and a.incarnation > 1)], memory


def blind_to_gms(view: Any, memory: Any, policy: Any, now: float) -> Any:
    """A GMS that is gone is not noticed."""
    return right_control(controller.replace(view, gms_down=()), memory, policy, now)


def deaf(view: Any, memory: Any, policy: Any, now: float) -> Any:
    """Users are not answered."""
    actions, memory = right_control(view, memory, policy, now)
    return [a for a in actions if not isinstance(a, controller.Answer)], memory


def hasty_gate(view: Any, memory: Any, policy: Any, now: float) -> Any:
    """The next shadow is let go when the last life is dying, and not when it is proved dead."""
    last = view.slots.get(memory.activated[0]) if policy.activate and memory.activated else None
    if last is not None and last.life == memory.activated and last.phase is Phase.FAILING:
        memory = controller.replace(memory, activated=None)
    return right_control(view, memory, policy, now)


def stubborn_roll(view: Any, memory: Any, policy: Any, now: float) -> Any:
    """Shadows are restarted for a roll although nobody serves."""
    actions, memory = right_control(view, memory, policy, now)
    old = [s for s in view.slots.values() if s.phase is Phase.PARKED and s.generation != view.generation]
    return actions + [controller.Kill(s.cohort_id, s.incarnation, "roll") for s in old], memory


right_phase, right_decide, right_control = world.cohort_phase, reconciler.decide, controller.decide


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patching:
        yield patching


def test_a_reconciler_that_forgets_to_report_is_found(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reconciler, "decide", forgetful)
    find()


@pytest.mark.parametrize(
    "mistake",
    [hasty_start, bloodthirsty, lazy, blind_to_gms, deaf, hasty_gate, stubborn_roll],
    ids=lambda m: m.__name__,
)
def test_mistakes_of_the_controller_are_found(patch: pytest.MonkeyPatch, mistake: Any) -> None:
    patch.setattr(controller, "decide", mistake)
    find()


def test_a_hasty_fence_is_found_and_prints_as_a_script_that_fails_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(world, "cohort_phase", hasty_fence)
    text = str(find())
    assert "is alive on node" in text
    call = next(line for line in text.splitlines() if line.startswith("replay: ")).removeprefix("replay: ")
    with pytest.raises(Broken, match="is alive on node"):
        eval(call, {"replay": replay})
    patch.undo()
    eval(call, {"replay": replay})
