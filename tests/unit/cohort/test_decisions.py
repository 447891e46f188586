"""What the controller and the reconciler answer to each thing that they can be shown."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gms_launch.cohort import controller
from gms_launch.cohort.controller import (
    Abort,
    Answer,
    GiveUp,
    Kill,
    KillPart,
    KillRequest,
    LoseNodes,
    Memory,
    Slot,
    Start,
    View,
)
from gms_launch.cohort.model import (
    ALIVE,
    CohortView,
    IllegalMoveError,
    Phase,
    Redundancy,
    cohort_phase,
    move,
    redundancy,
)
from gms_launch.cohort.reconciler import Desire, KillRank, LetGo, LocalRank, SkipRank, StartRank, decide
from gms_launch.control import terms

POLICY = controller.Policy(
    cohorts=2, start_timeout=100, promotion_timeout=20, backoff=1, backoff_max=8, window=600, limit=3
)
RUNNING = Memory(initial=False)


def test_the_life_of_a_cohort() -> None:
    phase = Phase.PENDING
    for name in ("starting", "parked", "waking", "active", "failing", "fenced", "pending"):
        phase = move(phase, Phase(name))
    for alive in ALIVE:
        assert move(alive, Phase.FAILING) is Phase.FAILING


@pytest.mark.parametrize(
    ("start", "end"),
    [("fenced", "active"), ("failing", "parked"), ("active", "parked"), ("parked", "starting"), ("pending", "active")],
)
def test_illegal_moves(start: str, end: str) -> None:
    with pytest.raises(IllegalMoveError):
        move(Phase(start), Phase(end))


def test_phase_of_a_cohort() -> None:
    parked, starting, failing, fenced = Phase.PARKED, Phase.STARTING, Phase.FAILING, Phase.FENCED
    both = {0, 1}
    assert cohort_phase({}, both) is Phase.PENDING
    assert cohort_phase({0: parked}, both) is starting, "a rank is missing"
    assert cohort_phase({0: parked, 1: starting}, both) is parked, "the leader rank speaks for all"
    assert cohort_phase({0: Phase.ACTIVE, 1: failing}, both) is failing
    assert cohort_phase({0: fenced, 1: failing}, both) is failing
    assert cohort_phase({0: fenced}, both) is failing, "no word from node 1 is no proof"
    assert cohort_phase({0: fenced, 1: fenced}, both) is fenced
    assert cohort_phase({0: fenced, 1: starting}, {0}) is fenced, "a lost node has no say"


def test_with_hybrid_load_balancing_a_cohort_is_what_all_of_its_ranks_are() -> None:
    starting, parked, waking, active = Phase.STARTING, Phase.PARKED, Phase.WAKING, Phase.ACTIVE
    for one, other, whole in (
        (parked, starting, starting),
        (parked, parked, parked),
        (waking, parked, waking),
        (active, parked, waking),
        (active, waking, waking),
        (active, active, active),
        (active, Phase.FAILING, Phase.FAILING),
        (Phase.FENCED, parked, Phase.FAILING),
        (Phase.FENCED, Phase.FENCED, Phase.FENCED),
    ):
        for phases in ({0: one, 1: other}, {0: other, 1: one}):
            assert cohort_phase(phases, {0, 1}, hybrid=True) is whole, phases
    assert cohort_phase({0: parked}, {0, 1}, hybrid=True) is starting, "nothing has been heard of the other one"


def test_redundancy() -> None:
    def of(*phases: Phase, gms: bool = True) -> Redundancy:
        return redundancy([CohortView(k, 1, p) for k, p in enumerate(phases)], len(phases) - 1, gms)

    assert of(Phase.ACTIVE, Phase.PARKED) is Redundancy.FULL
    assert of(Phase.ACTIVE, Phase.PARKED, Phase.STARTING) is Redundancy.DEGRADED
    assert of(Phase.ACTIVE, Phase.STARTING) is Redundancy.NONE
    assert of(Phase.WAKING, Phase.PARKED) is Redundancy.DOWN
    assert of(Phase.ACTIVE, Phase.PARKED, gms=False) is Redundancy.NONE


# -- one node ------------------------------------------------------------------------------------------------------


def test_what_is_wanted_is_started_once() -> None:
    wanted = {0: Desire(0, 1, True, 29500)}
    assert decide(wanted, {}, {}) == [StartRank(wanted[0])]
    for phase in (*ALIVE, Phase.FAILING):
        assert decide(wanted, {0: LocalRank(0, 1, phase)}, {}) == []


def test_the_next_life_waits_for_the_fence_of_this_one() -> None:
    wanted = {0: Desire(0, 2, True, 29501)}
    assert decide(wanted, {0: LocalRank(0, 1, Phase.FAILING)}, {}) == []
    assert decide(wanted, {0: LocalRank(0, 1, Phase.FENCED)}, {}) == [StartRank(wanted[0])]
    (kill,) = decide(wanted, {0: LocalRank(0, 1, Phase.ACTIVE)}, {})
    assert isinstance(kill, KillRank)


def test_a_rank_dies_with_its_peer_and_nobody_else_does() -> None:
    wanted = {0: Desire(0, 1, True, 1), 1: Desire(1, 4, True, 2)}
    local = {0: LocalRank(0, 1, Phase.ACTIVE), 1: LocalRank(1, 4, Phase.PARKED)}
    (kill,) = decide(wanted, local, {(0, 1): 1})
    assert isinstance(kill, KillRank)
    assert (kill.cohort_id, kill.incarnation, kill.reason) == (0, 1, "a rank of the same life ended: rank 1")
    assert decide(wanted, local, {(1, 3): 1}) == [], "that was an earlier life"


def test_a_store_that_forgot_everything_kills_nobody() -> None:
    assert decide({}, {0: LocalRank(0, 1, Phase.ACTIVE), 1: LocalRank(1, 1, Phase.PARKED)}, {}) == []


def test_wanted_dead() -> None:
    (kill,) = decide({0: Desire(0, 1, False, 1, "kill-primary")}, {0: LocalRank(0, 1, Phase.ACTIVE)}, {})
    assert kill == KillRank(0, 1, "kill-primary")
    assert decide({0: Desire(0, 1, False, 1)}, {0: LocalRank(0, 1, Phase.FENCED)}, {}) == []


def test_a_life_that_ended_before_it_began_here_is_reported_dead_and_never_started() -> None:
    assert decide({0: Desire(0, 2, False, 1)}, {0: LocalRank(0, 1, Phase.FENCED)}, {}) == [SkipRank(0, 2)]
    assert decide({0: Desire(0, 1, False, 1)}, {}, {}) == [SkipRank(0, 1)]
    ended = {(0, 1): 1}
    assert decide({0: Desire(0, 1, True, 1)}, {}, ended) == [SkipRank(0, 1)]
    assert decide({0: Desire(0, 2, False, 1)}, {0: LocalRank(0, 1, Phase.FAILING)}, {}) == [], "the last one first"


def test_without_group_kill_a_rank_outlives_its_peers() -> None:
    wanted = {0: Desire(0, 1, True, 1)}
    ended = {(0, 1): 1}
    assert decide(wanted, {0: LocalRank(0, 1, Phase.ACTIVE)}, ended, group_kill=False) == []


def test_a_lock_is_let_go_once_for_the_life_that_is_to_serve_and_never_beside_another() -> None:
    wanted = {0: Desire(0, 3, True, 1), 1: Desire(1, 2, True, 2, serve=True)}
    parked, before = LocalRank(1, 2, Phase.PARKED), LocalRank(0, 2, Phase.FENCED, let_go=True)
    assert LetGo(1, 2) in decide(wanted, {0: before, 1: parked}, {})
    assert LetGo(1, 2) in decide(wanted, {1: replace(parked, phase=Phase.STARTING)}, {}), "its log may be late"
    for own in (replace(parked, let_go=True), replace(parked, gone=True), replace(parked, incarnation=1)):
        assert not any(isinstance(a, LetGo) for a in decide(wanted, {0: before, 1: own}, {})), own
    for phase in (*ALIVE, Phase.FAILING):
        found = decide(wanted, {0: replace(before, phase=phase), 1: parked}, {})
        assert not any(isinstance(a, LetGo) for a in found), "whoever served here is not proved dead"
    assert not any(isinstance(a, LetGo) for a in decide(wanted, {0: before, 1: parked}, {(1, 2): 0})), "it has ended"
    dead = {1: replace(wanted[1], running=False)}
    assert not any(isinstance(a, LetGo) for a in decide(dead, {1: parked}, {}))


# -- the run -------------------------------------------------------------------------------------------------------


def slot(cohort_id: int, phase: Phase, incarnation: int = 1, running: bool = True, since: float = 0.0) -> Slot:
    return Slot(cohort_id, incarnation, running, False, phase, since)


def view(*slots: Slot, confirmed: tuple[int, int] | None = None, requests: tuple[KillRequest, ...] = ()) -> View:
    return View({s.cohort_id: s for s in slots}, confirmed, requests)


def test_every_slot_is_started() -> None:
    actions, _ = controller.decide(view(), Memory(), POLICY, 0.0)
    assert [type(a) for a in actions] == [Start, Start]


def test_a_lost_node_takes_every_cohort_with_it_and_is_waited_for() -> None:
    policy = replace(POLICY, node_wait=30.0)
    serving = replace(view(slot(0, Phase.ACTIVE), slot(1, Phase.PARKED), confirmed=(0, 1)), absent={1: "node 1 (b)"})
    actions, memory = controller.decide(serving, RUNNING, policy, 100.0)
    assert actions == [], "its lease may be renewed in a moment"
    assert controller.next_look(serving, memory, policy, 100.0) == 100.0 + controller.NODE_GRACE
    actions, memory = controller.decide(serving, memory, policy, 101.0)
    assert actions == [LoseNodes((1,)), Kill(0, 1, "node 1 (b) was lost"), Kill(1, 1, "node 1 (b) was lost")]
    dead = [slot(k, Phase.FENCED, running=False) for k in (0, 1)]
    waiting = replace(view(*dead), absent={1: "node 1 (b)"}, lost=(1,))
    actions, memory = controller.decide(waiting, memory, policy, 110.0)
    assert actions == []
    late, _ = controller.decide(waiting, memory, policy, 130.0)
    assert late == [Abort(-1, 0, "node 1 (b) was lost and did not come back within 30 s (node_wait)", late=True)]
    back, memory = controller.decide(replace(view(*dead), lost=(1,)), memory, policy, 120.0)
    assert back == [LoseNodes(()), Start(0, 2, "re-arm"), Start(1, 2, "re-arm")], (
        "cold, and counted as nobody's failure"
    )
    assert memory.failures == {}


def test_how_long_a_node_is_lost_is_not_counted_while_nobody_can_tell() -> None:
    policy = replace(POLICY, node_wait=30.0)
    dead = [slot(k, Phase.FENCED, running=False) for k in (0, 1)]
    waiting = replace(view(*dead), absent={1: "node 1 (b)"}, lost=(1,))
    _, memory = controller.decide(waiting, RUNNING, policy, 100.0)
    blind = replace(waiting, heard_since=math.inf)
    assert controller.decide(blind, memory, policy, 131.0)[0] == []
    assert controller.next_look(blind, memory, policy, 131.0) is None
    again = replace(waiting, heard_since=140.0)
    actions, memory = controller.decide(again, memory, policy, 141.0)
    assert actions == [], "it is as lost as it was, and has its time anew"
    assert controller.next_look(again, memory, policy, 141.0) == 170.0
    late, _ = controller.decide(again, memory, policy, 170.0)
    assert [type(a) for a in late] == [Abort]


def test_a_node_lost_while_the_run_comes_up_ends_it() -> None:
    coming = replace(view(slot(0, Phase.STARTING)), absent={1: "node 1 (b)"})
    _, memory = controller.decide(coming, Memory(), POLICY, 0.0)
    actions, _ = controller.decide(coming, memory, POLICY, 2.0)
    assert actions == [LoseNodes((1,)), Abort(-1, 0, "node 1 (b) was lost")]


def test_a_lease_that_was_renewed_late_is_no_loss() -> None:
    serving = view(slot(0, Phase.ACTIVE), slot(1, Phase.PARKED), confirmed=(0, 1))
    _, memory = controller.decide(replace(serving, absent={1: "b"}), RUNNING, POLICY, 100.0)
    actions, memory = controller.decide(serving, memory, POLICY, 100.5)
    assert actions == [] and memory.absent_since == {}


def test_while_it_first_comes_up_a_failure_ends_the_run() -> None:
    actions, _ = controller.decide(view(slot(0, Phase.PARKED), slot(1, Phase.FAILING)), Memory(), POLICY, 1.0)
    assert [(type(a), a.cohort_id) for a in actions] == [(Abort, 1)]  # type: ignore[union-attr]
    late = view(slot(0, Phase.STARTING), slot(1, Phase.STARTING))
    (abort,), _ = controller.decide(late, Memory(), POLICY, 100.0)
    assert isinstance(abort, Abort) and abort.late


def test_a_dead_primary_is_started_again_after_the_fence_and_after_the_promotion() -> None:
    serving = view(slot(0, Phase.ACTIVE), slot(1, Phase.PARKED), confirmed=(0, 1))
    actions, memory = controller.decide(serving, RUNNING, POLICY, 0.0)
    assert actions == []
    failing = view(slot(0, Phase.FAILING), slot(1, Phase.PARKED), confirmed=(0, 1))
    actions, memory = controller.decide(failing, memory, POLICY, 1.0)
    assert [(type(a), a.cohort_id) for a in actions] == [(Kill, 0)]  # type: ignore[union-attr]
    fenced = slot(0, Phase.FENCED, running=False)
    for other in (slot(1, Phase.PARKED), slot(1, Phase.WAKING, since=1.2), slot(1, Phase.ACTIVE, since=1.2)):
        actions, memory = controller.decide(view(fenced, other, confirmed=(0, 1)), memory, POLICY, 1.3)
        assert actions == [], "the promotion goes first"
    actions, memory = controller.decide(view(fenced, slot(1, Phase.ACTIVE), confirmed=(1, 1)), memory, POLICY, 1.4)
    assert actions == [Start(0, 2, "re-arm")]


def test_a_dead_shadow_is_started_again_at_once() -> None:
    serving = view(slot(0, Phase.ACTIVE), slot(1, Phase.PARKED), confirmed=(0, 1))
    _, memory = controller.decide(serving, RUNNING, POLICY, 0.0)
    dead = view(slot(0, Phase.ACTIVE), slot(1, Phase.FENCED, running=False), confirmed=(0, 1))
    assert controller.decide(dead, memory, POLICY, 1.0)[0] == [Start(1, 2, "re-arm")]


def test_starts_that_fail_are_delayed_and_then_given_up() -> None:
    memory, now, delays = RUNNING, 0.0, []
    active = slot(0, Phase.ACTIVE)
    for life in range(1, 10):
        starting = view(active, slot(1, Phase.STARTING, life, since=now), confirmed=(0, 1))
        _, memory = controller.decide(starting, memory, POLICY, now)
        dead = view(active, slot(1, Phase.FENCED, life, running=False), confirmed=(0, 1))
        actions, memory = controller.decide(dead, memory, POLICY, now)
        if not actions:
            at = controller.next_look(dead, memory, POLICY, now)
            assert at is not None
            delays.append(at - now)
            now = at
            actions, memory = controller.decide(dead, memory, POLICY, now)
        if isinstance(actions[0], GiveUp):
            break
        assert actions == [Start(1, life + 1, "re-arm")]
    assert [0.5 * d <= found <= d for d, found in zip((1.0, 2.0), delays, strict=True)] == [True, True], delays
    assert delays[1] != 2 * delays[0], "a share of chance"
    assert life == 3, "the limit"


def test_a_promotion_that_gives_no_token_is_a_failed_start_and_one_that_does_is_none() -> None:
    for confirmed, failures in (((0, 1), {1: (5.0,)}), ((1, 1), {1: ()})):
        memory = RUNNING
        for phase in (Phase.PARKED, Phase.WAKING, Phase.ACTIVE):
            _, memory = controller.decide(view(slot(0, Phase.ACTIVE), slot(1, phase)), memory, POLICY, 0.0)
        alive = view(slot(0, Phase.ACTIVE), slot(1, Phase.ACTIVE), confirmed=confirmed)
        _, memory = controller.decide(alive, memory, POLICY, 1.0)
        dead = view(slot(0, Phase.ACTIVE), slot(1, Phase.FENCED, running=False), confirmed=(0, 1))
        _, memory = controller.decide(dead, memory, POLICY, 5.0)
        assert memory.failures == failures


def test_a_slot_that_was_given_up_gets_another_try_when_its_budget_has_healed() -> None:
    memory = replace(RUNNING, failures={1: (0.0, 1.0, 2.0)}, judged=frozenset({(1, 3)}))
    given_up = replace(slot(1, Phase.FENCED, 3, running=False), given_up=True)
    dead = view(slot(0, Phase.ACTIVE), given_up, confirmed=(0, 1))
    assert controller.decide(dead, memory, POLICY, 601.0)[0] == []
    assert controller.next_look(dead, memory, POLICY, 500.0) == 602.0
    (start,), _ = controller.decide(dead, memory, POLICY, 602.0)
    assert isinstance(start, Start) and start.incarnation == 4


def test_when_every_cohort_is_given_up_the_run_ends_and_says_why() -> None:
    memory = replace(RUNNING, failures=dict.fromkeys((0, 1), (0.0, 1.0, 2.0)), judged=frozenset({(0, 3), (1, 3)}))
    first = replace(slot(0, Phase.FENCED, 3, running=False), given_up=True)
    last = replace(slot(1, Phase.FENCED, 3, running=False), exit="exit code 1")
    actions, _ = controller.decide(view(first, last), memory, POLICY, 3.0)
    assert isinstance(actions[0], GiveUp) and isinstance(actions[-1], Abort)
    assert "every cohort is given up; 3 starts failed" in actions[-1].why and "exit code 1" in actions[-1].why


def test_a_hung_primary_is_killed() -> None:
    serving = view(slot(0, Phase.ACTIVE), slot(1, Phase.PARKED), confirmed=(0, 1))
    assert controller.decide(replace(serving, hung={(0, 1): "no token"}), RUNNING, POLICY, 0.0)[0] == [
        Kill(0, 1, "no token")
    ]
    assert controller.decide(replace(serving, hung={(0, 9): "no token"}), RUNNING, POLICY, 0.0)[0] == []


def test_without_gms_the_primary_goes_on_and_its_end_starts_the_group_cold() -> None:
    gone = {"gms_down": ("node 1 (b)",)}
    serving = replace(view(slot(0, Phase.ACTIVE), slot(1, Phase.FENCED, running=False), confirmed=(0, 1)), **gone)
    actions, memory = controller.decide(serving, RUNNING, POLICY, 0.0)
    assert actions == [], "neither is the primary touched, nor a shadow started that could not load"
    shadow_left = replace(view(slot(0, Phase.FAILING), slot(1, Phase.WAKING)), **gone)
    actions, memory = controller.decide(shadow_left, memory, POLICY, 1.0)
    assert [(a.cohort_id, type(a)) for a in actions] == [(0, Kill), (1, Kill)], "a shadow cannot take over"
    dead = replace(view(slot(0, Phase.FENCED, running=False), slot(1, Phase.FAILING, running=False)), **gone)
    assert controller.decide(dead, memory, POLICY, 2.0)[0] == [], "not before all are proved dead"
    dead = replace(view(slot(0, Phase.FENCED, running=False), slot(1, Phase.FENCED, running=False)), **gone)
    (action,), memory = controller.decide(dead, memory, POLICY, 3.0)
    assert isinstance(action, controller.NewGms)
    starting = replace(dead, gms_restarting=True)
    assert controller.decide(starting, memory, POLICY, 4.0)[0] == []
    ready = replace(dead, gms_down=())
    actions, _ = controller.decide(ready, memory, POLICY, 5.0)
    assert actions == [Start(0, 2, "re-arm"), Start(1, 2, "re-arm")], "and nobody's budget has suffered"


def test_gms_that_ends_while_the_run_comes_up_ends_the_run() -> None:
    actions, _ = controller.decide(replace(view(slot(0, Phase.STARTING)), gms_down=("node 0",)), Memory(), POLICY, 0.0)
    assert isinstance(actions[-1], Abort) and "GMS on node 0" in actions[-1].why


def test_the_budget_heals_with_time() -> None:
    memory = replace(RUNNING, failures={1: (0.0, 1.0, 2.0)})
    dead = view(slot(0, Phase.ACTIVE), slot(1, Phase.FENCED, running=False), confirmed=(0, 1))
    assert isinstance(controller.decide(dead, memory, POLICY, 3.0)[0][0], GiveUp)
    actions, memory = controller.decide(dead, memory, POLICY, 700.0)
    actions, _ = controller.decide(dead, memory, POLICY, 702.0)
    assert actions == [Start(1, 2, "re-arm")]


def test_what_cannot_be_killed_is_not_started_again() -> None:
    stuck = replace(slot(1, Phase.FENCED, running=False), leftovers=(4711,))
    assert controller.decide(view(slot(0, Phase.ACTIVE), stuck, confirmed=(0, 1)), RUNNING, POLICY, 0.0)[0] == []


def test_a_promotion_that_does_not_end_is_killed() -> None:
    hanging = view(slot(0, Phase.FENCED, running=False), slot(1, Phase.WAKING, since=5.0), confirmed=(0, 1))
    _, memory = controller.decide(hanging, RUNNING, POLICY, 6.0)
    actions, _ = controller.decide(hanging, memory, POLICY, 25.0)
    late = "no token within 20 s of the lock (promotion_timeout): "
    assert Kill(1, 1, late + "it has not registered in discovery, so nothing serves its model") in actions
    listed = replace(view(slot(1, Phase.ACTIVE, since=5.0), confirmed=(0, 1)), no_token="nothing serves tiny")
    actions, _ = controller.decide(listed, RUNNING, POLICY, 25.0)
    assert Kill(1, 1, late + "nothing serves tiny") in actions


def test_an_engine_that_nobody_can_ask_is_not_killed_for_giving_no_token() -> None:
    serving = view(slot(1, Phase.ACTIVE, since=5.0), confirmed=(0, 1))
    for since, now, dead in ((math.inf, 1e9, False), (100.0, 119.0, False), (100.0, 120.0, True)):
        actions, _ = controller.decide(replace(serving, asked_since=since), RUNNING, POLICY, now)
        assert any(isinstance(a, Kill) for a in actions) == dead
    assert controller.next_look(replace(serving, asked_since=100.0), RUNNING, POLICY, 110.0) == 120.0
    assert controller.next_look(replace(serving, asked_since=math.inf), RUNNING, POLICY, 110.0) is None


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("group", Kill(0, 1, "kill-primary")),
        ("leader", KillPart(0, 1, 0)),
        ("rank:1", KillPart(0, 1, 1)),
    ],
)
def test_kill_primary(scope: str, expected: object) -> None:
    serving = view(
        slot(0, Phase.ACTIVE), slot(1, Phase.PARKED), confirmed=(0, 1), requests=(KillRequest("u", scope, False),)
    )
    actions, _ = controller.decide(serving, RUNNING, POLICY, 0.0)
    assert actions == [expected, Answer("u", True, "killed", 0, 1)]


def test_kill_primary_is_refused_without_a_shadow() -> None:
    alone = view(
        slot(0, Phase.ACTIVE), slot(1, Phase.STARTING), confirmed=(0, 1), requests=(KillRequest("u", "group", False),)
    )
    (answer,), _ = controller.decide(alone, RUNNING, POLICY, 0.0)
    assert isinstance(answer, Answer) and not answer.ok
    forced = replace(alone, requests=(KillRequest("u", "group", True),))
    assert Kill(0, 1, "kill-primary") in controller.decide(forced, RUNNING, POLICY, 0.0)[0]
    nobody = view(slot(0, Phase.PARKED), slot(1, Phase.PARKED), requests=(KillRequest("u", "group", True),))
    (answer,), _ = controller.decide(nobody, RUNNING, POLICY, 0.0)
    assert isinstance(answer, Answer) and not answer.ok


@pytest.mark.parametrize(
    ("verb", "says"), [("kill-primary", "use --force"), ("switch-over", "use `gms-launch kill-primary --force`")]
)
def test_what_would_force_it_is_named_by_the_verb_that_has_it(verb: str, says: str) -> None:
    asked = (KillRequest("u", "group", False, cause=verb),)
    alone = view(slot(0, Phase.ACTIVE), slot(1, Phase.STARTING), confirmed=(0, 1), requests=asked)
    parked = view(slot(0, Phase.ACTIVE), slot(1, Phase.PARKED), confirmed=(0, 1), requests=asked)
    for seen in (alone, replace(parked, gms_down=("n0",))):
        (answer,), _ = controller.decide(seen, RUNNING, POLICY, 0.0)
        assert isinstance(answer, Answer) and not answer.ok and says in answer.detail


@pytest.mark.parametrize("ttl", [2.0, 3.0, 5.0, 7.5, 20.0, 60.0])
def test_who_is_cut_off_is_dead_before_the_others_go_on(ttl: float) -> None:
    # A cut of 80 % that begins just before a renewal, whose answer was then waited for, leaves several tries.
    assert terms.silence(ttl) - (terms.renewal(ttl) + 0.8 * ttl) >= 2 * terms.attempt(ttl)
    # And etcd, which counts from when the last renewal came, is not done before the node is, which counts from before.
    assert terms.granted(ttl) >= terms.silence(ttl)
    assert terms.silence(ttl) <= 2 * ttl, "node_wait may be two leases"
