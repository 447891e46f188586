"""Hybrid load balancing under every order of events that chance finds, and proof that this finds mistakes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gms_launch.cohort import controller
from gms_launch.cohort.model import Phase
from tests.simulation import hybrid
from tests.simulation.world import Broken

right_phase, right_control = hybrid.cohort_phase, controller.decide


def one(seed: int) -> bool:
    """One interleaving; True when the run ended with a word. Raises `Broken`."""
    rng = random.Random(seed)
    return bool(hybrid.explore(rng.choice((2, 2, 3)), rng.choice((2, 2, 3)), rng.randrange, 40, 3).aborted)


def test_cohorts_never_split_between_nodes_in_three_thousand_interleavings() -> None:
    ended = sum(one(seed) for seed in range(3_000))
    assert 0 < ended < 1_500, "some runs lose a node for good, and most do not"


def hasty_gate(view: Any, memory: Any, policy: Any, now: float) -> Any:
    """The next cohort is let go when the last one is dying, and not when it is proved dead."""
    last = view.slots.get(memory.activated[0]) if memory.activated else None
    if last is not None and last.life == memory.activated and last.phase is Phase.FAILING:
        memory = controller.replace(memory, activated=None)
    return right_control(view, memory, policy, now)


def hasty_fence(phases: Any, nodes: Any, hybrid: bool = False) -> Phase:
    """A life counts as fenced when the first node says so."""
    return Phase.FENCED if Phase.FENCED in phases.values() else right_phase(phases, nodes, hybrid)


@pytest.mark.parametrize(
    ("where", "what", "mistake"), [(controller, "decide", hasty_gate), (hybrid, "cohort_phase", hasty_fence)]
)
def test_mistakes_are_found_and_print_as_a_script_that_fails_again(
    monkeypatch: pytest.MonkeyPatch, where: Any, what: str, mistake: Any
) -> None:
    monkeypatch.setattr(where, what, mistake)
    with pytest.raises(Broken, match="cohorts are split") as found:
        sum(map(one, range(1_000)))
    call = str(found.value).rpartition("replay: ")[2]
    with pytest.raises(Broken, match="cohorts are split"):
        eval(call)
    monkeypatch.undo()
    eval(call)
