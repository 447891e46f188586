"""What comes next for the cohorts: the decisions that only the leader node takes. Pure: no I/O, no clock.

`decide` takes a view of the run, the controller's memory and the time, and returns actions and the new memory. It
keeps every slot running, starts a dead one again once it is fenced everywhere, delays starts that fail, gives up a
slot that keeps failing until its budget has healed, kills every cohort when a node is lost and starts them cold when it
is back in time, starts the whole group cold on new GMS servers when one of those is gone and nobody serves any more,
and carries out what users ask for. Who serves is decided by the lock, or in `activation`; what a roll does, in `roll`.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

from gms_launch.cohort import activation, roll
from gms_launch.cohort.actions import Abort, Action, Answer, GiveUp, Kill, KillPart, LoseNodes, NewGms, RollBack, Start
from gms_launch.cohort.model import ENDED, CohortView, Phase, primary
from gms_launch.cohort.view import KillRequest, Memory, Policy, RollRequest, Slot, Tries, View
from gms_launch.numbers import numbered

#: A node whose lease ended may be back with a new one at once, as after a restart of etcd (seconds).
NODE_GRACE = 1.0
#: Why a life is killed of which a rank has ended, where nothing says how.
RANK_ENDED = "a rank ended"


def decide(view: View, memory: Memory, policy: Policy, now: float) -> tuple[list[Action], Memory]:
    """The next actions, and the memory to pass in next time."""
    actions: list[Action] = []
    memory = _remember(view, memory, now)
    away = memory.absent_since.items()
    lost = tuple(sorted(r for r, since in away if r in view.lost or now - since >= NODE_GRACE))
    if lost != view.lost:
        actions.append(LoseNodes(lost))
    if lost:
        return _without(lost, view, memory, policy, now, actions)
    if not policy.group_kill and len(view.slots) == policy.cohorts:
        return actions, memory
    if view.gms_down and memory.initial:
        where = ", ".join(view.gms_down)
        return [*actions, Abort(-1, 0, f"GMS on {where} ended while the run was coming up")], memory
    actions += (verdict := roll.judge(view, memory))
    if verdict:
        # What lives are started with is another matter now; and a start that was an attempt does not use the budget up.
        tried = {(a.cohort_id, a.incarnation) for a in verdict if isinstance(a, RollBack)}
        return actions, replace(memory, judged=memory.judged | tried)
    if view.gms_restarting or (view.gms_down and not _serving(view)):
        return _cold(view, memory, actions)
    for cohort_id in range(policy.cohorts):
        slot = view.slots.get(cohort_id)
        if slot is None:
            actions.append(Start(cohort_id, 1, "first start"))
        elif slot.running and slot.phase in ENDED:
            if memory.initial:
                actions.append(Abort(cohort_id, slot.incarnation, slot.exit or "it ended while it was starting"))
                return actions, memory
            actions.append(Kill(cohort_id, slot.incarnation, slot.exit or RANK_ENDED))
        elif slot.running and (why := view.hung.get((cohort_id, slot.incarnation))):
            actions.append(Kill(cohort_id, slot.incarnation, why))
        elif slot.running and (late := _too_late(slot, view, policy, now)):
            if memory.initial:
                actions.append(Abort(cohort_id, slot.incarnation, late, late=True))
                return actions, memory
            actions.append(Kill(cohort_id, slot.incarnation, late))
        elif not slot.running and slot.phase is Phase.FENCED:
            memory = _judge(slot, memory, policy, now)
            actions += _restart(slot, view, memory, policy, now)
    if len(view.slots) == policy.cohorts and all(_over(s, actions) for s in view.slots.values()):
        last = max(view.slots.values(), key=lambda s: (s.since, -s.cohort_id))
        why = next((a.why for a in actions if isinstance(a, GiveUp)), last.exit or "it ended")
        return [*actions, Abort(last.cohort_id, last.incarnation, f"every cohort is given up; {why}")], memory
    chosen, memory = activation.decide(view, memory, policy, now)
    actions += chosen
    if not actions:
        actions += roll.restart(view)
    for request in view.requests:
        if isinstance(request, RollRequest):
            actions += roll.answer(request, view, memory, policy)
        else:
            answer = _answer(request, view, policy)
            actions += answer
            if any(isinstance(a, Kill) for a in answer):
                memory = replace(memory, successor=request.to)
    return actions, memory


def _without(
    lost: tuple[int, ...], view: View, memory: Memory, policy: Policy, now: float, actions: list[Action]
) -> tuple[list[Action], Memory]:
    """Nodes are lost, and every cohort with them, since each spans all nodes: kill, wait, give up."""
    names = ", ".join(view.absent[r] for r in lost)
    since = max(view.heard_since, min(memory.absent_since[r] for r in lost))
    if memory.initial or now - since >= policy.node_wait:
        late = "" if memory.initial else f" and did not come back within {policy.node_wait:g} s (node_wait)"
        return [*actions, Abort(-1, 0, f"{names} was lost{late}", late=not memory.initial)], memory
    for slot in view.slots.values():
        if slot.running:
            actions.append(Kill(slot.cohort_id, slot.incarnation, f"{names} was lost"))
            memory = replace(memory, judged=memory.judged | {(slot.cohort_id, slot.incarnation)})
    actions += [Answer(r.uuid, False, f"{names} was lost, and with it every cohort") for r in view.requests]
    return actions, memory


def _serving(view: View) -> bool:
    """True while an engine serves on the mappings that it has; a GMS that is gone does not touch those."""
    return any(s.running and s.phase is Phase.ACTIVE for s in view.slots.values())


def _over(slot: Slot, actions: list[Action]) -> bool:
    """True for a slot that is given up, now or before, and not started again now."""
    mine = [a for a in actions if isinstance(a, (Start, GiveUp)) and a.cohort_id == slot.cohort_id]
    return any(isinstance(a, GiveUp) for a in mine) or (slot.given_up and not mine)


def _cold(view: View, memory: Memory, actions: list[Action]) -> tuple[list[Action], Memory]:
    """A GMS is gone and nobody serves: its memory went with the last engine. Everything ends and begins anew.

    The weights on the other nodes are of the same load, but half a load is none: all nodes get new servers.
    """
    where = ", ".join(view.gms_down)
    for slot in view.slots.values():
        if slot.running:
            actions.append(Kill(slot.cohort_id, slot.incarnation, f"GMS on {where} is gone: the group starts cold"))
            memory = replace(memory, judged=memory.judged | {(slot.cohort_id, slot.incarnation)})
    fenced = all(not s.running and s.phase is Phase.FENCED for s in view.slots.values())
    if fenced and not view.gms_restarting:
        actions.append(NewGms(f"GMS on {where} was gone"))
    actions += [Answer(r.uuid, False, "the group is starting cold; nobody is primary") for r in view.requests]
    return actions, memory


def next_look(view: View, memory: Memory, policy: Policy, now: float) -> float | None:
    """When `decide` might say something else although nothing happened; None for never."""
    times = [t for t in memory.not_before.values() if t > now]
    times += [f[-1] + policy.window for f in memory.failures.values() if f]
    for since in memory.absent_since.values():
        times += [since + NODE_GRACE, max(view.heard_since, since) + policy.node_wait]
    if policy.activate and memory.activated is not None:
        times.append(memory.activated_at + policy.promotion_timeout)
    if memory.lost_primary is not None:
        times.append(memory.lost_primary + policy.promotion_timeout)
    for slot in view.slots.values():
        if slot.phase is Phase.STARTING:
            times.append(slot.since + policy.start_timeout)
        elif slot.phase in (Phase.WAKING, Phase.ACTIVE) and view.confirmed != (slot.cohort_id, slot.incarnation):
            times.append(_asked(slot, view) + policy.promotion_timeout)
    return min((t for t in times if now < t < math.inf), default=None)


def _asked(slot: Slot, view: View) -> float:
    """Since when a token of a slot's is waited for: it was asked for one, where that takes another engine too."""
    return max(slot.since, view.asked_since) if slot.phase is Phase.ACTIVE else slot.since


def _remember(view: View, memory: Memory, now: float) -> Memory:
    best = dict(memory.best)
    lost = memory.lost_primary
    for slot in view.slots.values():
        life = (slot.cohort_id, slot.incarnation)
        if slot.phase in (Phase.PARKED, Phase.WAKING, Phase.ACTIVE):
            best[life] = slot.phase
        elif slot.phase in ENDED and best.get(life) in (Phase.WAKING, Phase.ACTIVE) and life not in memory.judged:
            lost = now if lost is None else lost
    served = view.confirmed is not None and any(
        (s.cohort_id, s.incarnation) == view.confirmed and s.phase is Phase.ACTIVE for s in view.slots.values()
    )
    if served:
        lost = None
    confirmed = {view.confirmed} if view.confirmed is not None else set()
    return replace(
        memory,
        best=best,
        lost_primary=lost,
        served=memory.served | confirmed,
        absent_since={r: memory.absent_since.get(r, now) for r in view.absent},
    )


def _too_late(slot: Slot, view: View, policy: Policy, now: float) -> str:
    if slot.phase is Phase.STARTING and now - slot.since >= policy.start_timeout:
        return f"not parked within {policy.start_timeout:g} s (start_timeout)"
    waking = slot.phase in (Phase.WAKING, Phase.ACTIVE) and view.confirmed != (slot.cohort_id, slot.incarnation)
    if waking and now - _asked(slot, view) >= policy.promotion_timeout:
        why = f": {view.no_token}" if view.no_token and slot.phase is Phase.ACTIVE else ""
        if slot.phase is Phase.WAKING:
            why = ": it has not registered in discovery, so nothing serves its model"
        return f"no token within {policy.promotion_timeout:g} s of the lock (promotion_timeout){why}"
    return ""


def _judge(slot: Slot, memory: Memory, policy: Policy, now: float) -> Memory:
    """Count the end of a life once. One that never parked, or took the lock and gave no token, is a failed start.

    A failed start delays the next one: doubling, with a share of chance so that slots do not start in step.
    """
    life = (slot.cohort_id, slot.incarnation)
    if life in memory.judged:
        return memory
    recent = tuple(t for t in memory.failures.get(slot.cohort_id, ()) if now - t < policy.window)
    delay = 0.0
    best = memory.best.get(life)
    promoted = best in (Phase.WAKING, Phase.ACTIVE) or life == memory.activated
    if best is None or (promoted and life not in memory.served):
        recent = (*recent, now)
        memory = replace(memory, failed_as={**memory.failed_as, slot.cohort_id: slot.exit})
        delay = min(policy.backoff_max, policy.backoff * 2.0 ** min(len(recent) - 1, 30)) * _jitter(life)
    return replace(
        memory,
        judged=memory.judged | {life},
        failures={**memory.failures, slot.cohort_id: recent},
        not_before={**memory.not_before, slot.cohort_id: now + delay},
    )


def tries(cohort_id: int, memory: Memory, policy: Policy, now: float) -> Tries:
    """What is to be told of a slot whose starts fail; nothing when none did within the window."""
    failed = sum(now - t < policy.window for t in memory.failures.get(cohort_id, ()))
    if not failed:
        return Tries()
    wait = memory.not_before.get(cohort_id, 0.0)
    return Tries(failed, policy.limit, memory.failed_as.get(cohort_id, ""), wait)


def _jitter(life: tuple[int, int]) -> float:
    """Between a half and one, the same for the same life: a decision is a function of what it is told."""
    return 0.5 + 0.5 * (zlib.crc32(f"{life[0]}.{life[1]}".encode()) / 2**32)


def _restart(slot: Slot, view: View, memory: Memory, policy: Policy, now: float) -> list[Action]:
    if slot.leftovers or view.gms_down:
        return []
    failed = [t for t in memory.failures.get(slot.cohort_id, ()) if now - t < policy.window]
    if slot.given_up:
        if failed:
            return []
        healed = f"no start has failed for {policy.window:g} s: another try"
        return [Start(slot.cohort_id, slot.incarnation + 1, healed)]
    if len(failed) >= policy.limit:
        why = f"{numbered(len(failed), 'start')} failed within {policy.window:g} s; the last: {slot.exit or 'it ended'}"
        return [GiveUp(slot.cohort_id, slot.incarnation, why)]
    if now < memory.not_before.get(slot.cohort_id, 0.0) or _promotion_under_way(view, memory, policy, now):
        return []
    return [Start(slot.cohort_id, slot.incarnation + 1, "re-arm")]


def _promotion_under_way(view: View, memory: Memory, policy: Policy, now: float) -> bool:
    """True while a shadow takes over: a start beside it would compete for the machine it needs."""
    if memory.lost_primary is None or now - memory.lost_primary >= policy.promotion_timeout:
        return False
    return any(s.phase in (Phase.PARKED, Phase.WAKING, Phase.ACTIVE) for s in view.slots.values())


def _answer(request: KillRequest, view: View, policy: Policy) -> list[Action]:
    cohorts = [CohortView(s.cohort_id, s.incarnation, s.phase, s.since) for s in view.slots.values()]
    target = primary(cohorts)
    if target is None:
        kept = f" ({view.lock_keeper} keeps the lock)" if view.lock_keeper else ""
        return [Answer(request.uuid, False, f"no cohort is primary now{kept}; see `gms-launch status`")]
    parked = [c for c in cohorts if c.phase is Phase.PARKED]
    refused = f"cohort {target.cohort_id} is primary and "
    if view.gms_down:
        refused += f"no shadow can take over, since GMS on {', '.join(view.gms_down)} is gone; "
    else:
        refused += "no shadow is parked to take over; wait for redundancy full, or "
    if (not parked or view.gms_down) and not request.force:
        force = "--force" if request.cause == "kill-primary" else "`gms-launch kill-primary --force`"  # no other has it
        return [Answer(request.uuid, False, f"{refused}use {force} and accept an outage until a cold start")]
    if request.to >= 0 and (why := _not_to(request.to, [c.cohort_id for c in parked], policy)):
        return [Answer(request.uuid, False, why)]
    done = Answer(request.uuid, True, "killed", target.cohort_id, target.incarnation)
    if request.scope == "group":
        return [Kill(target.cohort_id, target.incarnation, request.cause), done]
    node_rank = 0 if request.scope == "leader" else int(request.scope.partition(":")[2])
    return [KillPart(target.cohort_id, target.incarnation, node_rank), done]


def _not_to(cohort_id: int, parked: list[int], policy: Policy) -> str:
    """Why that cohort cannot be the one that takes over; empty when it can."""
    if cohort_id not in parked:
        return f"cohort {cohort_id} is not parked; parked: {', '.join(map(str, parked)) or 'none'}"
    if len(parked) > 1 and not policy.activate:
        return (
            f"cohorts {', '.join(map(str, parked))} wait for one lock, and the first to try has it: "
            "which one can be chosen in a run that was started with --activation agent"
        )
    return ""
