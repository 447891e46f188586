"""The pure core under every order of events that chance finds, and proof that this finds mistakes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_launch.cohort import controller, reconciler
from gms_launch.cohort.model import Phase
from gms_launch.control.keys import ROOT, Keys
from tests.simulation import groups, world
from tests.simulation.interleavings import many, one, spread, two_groups
from tests.simulation.world import Broken, replay


@pytest.mark.timeout(900)
def test_ten_thousand_interleavings() -> None:
    """Never two active, never started before the predecessor is dead, never killed without a cause, always an end."""
    counts, ended = zip(*spread(range(10_000)), strict=True)
    assert sum(counts) == 10_000
    assert 0 < sum(ended) < 5_000, "some runs lose a node for good, and most do not"


@pytest.mark.timeout(900)
def test_three_thousand_interleavings_of_two_groups() -> None:
    """The same in each, and a group that nothing has befallen is as it was, whatever happens in the other."""
    counts, ended = zip(*spread(range(3_000), what=two_groups), strict=True)
    assert sum(counts) == 3_000 and 0 < sum(ended) < 1_500


class OneTable(Keys):
    """Which lives have ended is in one table for all groups."""

    def __init__(self, run: str, group: str = "") -> None:
        super().__init__(run, group)
        self.ended = f"{ROOT}{run}/ended/"


class OneWish(Keys):
    """What is wanted of a cohort is in one table for all groups."""

    def __init__(self, run: str, group: str = "") -> None:
        super().__init__(run, group)
        self.desired = f"{ROOT}{run}/desired/cohorts/"


@pytest.mark.parametrize("mistake", [OneTable, OneWish])
def test_groups_that_share_what_they_must_not_are_found(monkeypatch: pytest.MonkeyPatch, mistake: type[Keys]) -> None:
    monkeypatch.setattr(groups, "Keys", mistake)
    with pytest.raises(Broken, match=r"replay: groups\.replay\(") as found:
        many(range(300), two_groups)
    picked, steps = eval(str(found.value).rpartition("groups.replay")[2])
    with pytest.raises(Broken):
        groups.replay(picked, steps)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_million_interleavings() -> None:
    assert sum(count for count, _ in spread(range(1_000_000))) == 1_000_000


def test_the_interleavings_run_where_nothing_is_installed_and_say_which_case_broke() -> None:
    """Without site-packages, and a range of seeds in two processes."""
    command = [sys.executable, "-S", "-m", "tests.simulation.interleavings", "300", "--first", "4000"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, "--processes", "2"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("300 interleavings from seed 4000 held"), done.stdout
    # A controller that never starts a slot again, before the same main.
    lazy = """
from tests.simulation import interleavings, world
right = world.controller.decide
def decide(*args):
    actions, memory = right(*args)
    return [a for a in actions if not (isinstance(a, world.controller.Start) and a.incarnation > 1)], memory
world.controller.decide = decide
interleavings.main()
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", lazy, "300"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "replay: replay(" in done.stderr and "BROKEN" in done.stderr, done.stderr


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
