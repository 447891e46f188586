"""Who serves next, where the launcher decides it (--activation agent). Pure.

With `--activation lock` all cohorts wait for one lock, and whoever tries first after it falls has it. Here each waits
for a lock of its own, which its agent holds, so that exactly one can be let go: in an order, and never before the life
that served last is fenced on every node.
"""

from __future__ import annotations

from dataclasses import replace

from gms_launch.cohort.actions import Action, Activate, Kill
from gms_launch.cohort.model import ENDED, Phase
from gms_launch.cohort.view import Memory, Policy, Slot, View


def decide(view: View, memory: Memory, policy: Policy, now: float) -> tuple[list[Action], Memory]:
    """Let the next cohort serve when the last one is fenced; nothing where the lock decides."""
    if not policy.activate:
        return [], memory
    if (last := _last(view, memory)) is not None:
        if last.running and last.phase not in ENDED:
            return _in_time(last, memory, policy, now), memory
        if last.phase is not Phase.FENCED:
            return [], memory
    parked = [s for s in view.slots.values() if s.running and s.phase is Phase.PARKED]
    if not parked or view.gms_down:
        return [], memory
    chosen = min(parked, key=lambda s: _rank(s, view, memory))
    return [Activate(*chosen.life)], replace(memory, activated=chosen.life, activated_at=now, successor=-1)


def _last(view: View, memory: Memory) -> Slot | None:
    """The slot whose present life was let go last; None when there is a newer one in it, which implies its fence."""
    if memory.activated is None:
        return None
    slot = view.slots.get(memory.activated[0])
    return slot if slot is not None and slot.life == memory.activated else None


def _in_time(slot: Slot, memory: Memory, policy: Policy, now: float) -> list[Action]:
    """It was told to serve: it must have taken its lock by and by."""
    if slot.phase is not Phase.PARKED or now - memory.activated_at < policy.promotion_timeout:
        return []
    why = f"it did not take the lock within {policy.promotion_timeout:g} s of being let go (promotion_timeout)"
    return [Kill(*slot.life, why)]


def _rank(slot: Slot, view: View, memory: Memory) -> tuple[bool, bool, float, int]:
    """Whom a user wants, then the newest engine arguments, then who has been parked longest."""
    return (
        slot.cohort_id != memory.successor,
        slot.generation != view.generation,
        slot.since,
        slot.cohort_id,
    )
