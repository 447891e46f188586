"""Other engine arguments without an outage: the shadows are restarted with them, one at a time. Pure.

A roll makes a new generation, with which every life is started from then on. Shadows of an older one are restarted
while the primary serves; when the first of the new one has parked, the arguments are good, and when it ends before that
the run goes back to those it had. The primary is left alone: a switch-over or its death brings it into line.
"""

from __future__ import annotations

from gms_launch.cohort.actions import Action, Answer, Kill, Proved, Roll, RollBack
from gms_launch.cohort.model import ENDED, Phase
from gms_launch.cohort.view import Memory, Policy, RollRequest, Slot, View

_GOOD = (Phase.PARKED, Phase.WAKING, Phase.ACTIVE)


def judge(view: View, memory: Memory) -> list[Action]:
    """Whether the newest generation starts, as soon as that is known."""
    for slot in view.slots.values():
        if not view.rolling or slot.generation != view.generation:
            continue
        if slot.running and slot.phase in _GOOD:
            return [Proved(*slot.life)]
        if slot.phase in ENDED and memory.best.get(slot.life) is None:
            return [RollBack(*slot.life, slot.exit or "it ended while it was starting")]
    return []


def restart(view: View) -> list[Action]:
    """Bring the next shadow of an older generation into line."""
    old = [s for s in view.slots.values() if s.phase is Phase.PARKED and s.generation != view.generation]
    if not old or view.gms_down or not _calm(view):
        return []
    return [Kill(*old[0].life, "roll: it is started again with the new engine arguments")]


def _calm(view: View) -> bool:
    """True while one serves and every other is parked: one shadow at a time, and none while somebody takes over."""
    slots = view.slots.values()
    serving = any(s.phase is Phase.ACTIVE and s.life == view.confirmed for s in slots)
    return serving and all(_stands(s) for s in slots)


def _stands(slot: Slot) -> bool:
    return slot.given_up or (slot.running and slot.phase in (Phase.PARKED, Phase.ACTIVE))


def answer(request: RollRequest, view: View, memory: Memory, policy: Policy) -> list[Action]:
    """Begin a roll, or say why not."""
    why = ""
    if policy.cohorts < 2:
        why = "the run has no shadows (--shadows 0): there is nobody to serve while engines are restarted"
    elif view.rolling:
        why = "a roll is under way; see `gms-launch status`"
    elif view.gms_down:
        why = f"GMS on {', '.join(view.gms_down)} is gone, and no engine could start"
    elif memory.initial or not _calm(view):
        why = "a roll begins when one cohort serves and all others are parked; wait for redundancy full"
    elif not any(s.phase is Phase.PARKED for s in view.slots.values()):
        why = "every shadow is given up, and none would be started with the new arguments; see `gms-launch status`"
    if why:
        return [Answer(request.uuid, False, why)]
    return [Roll(request.engine_args), Answer(request.uuid, True, "the shadows are being restarted")]
