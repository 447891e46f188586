"""What becomes of a dead primary's listening socket, and when. Pure: no I/O, no clock.

While the primary lives, its agent has a second descriptor of the socket that it takes requests on, and does nothing
with it (`listener`). When the primary dies the kernel goes on completing connections there, so that nobody is refused:
the frontends wait (`HOLD`) instead of failing. Once the successor is registered whoever waits is turned away
(`TURN_AWAY`), which makes a frontend move the request on, with the tokens that it has; a moment later the dead lease is
revoked. One that has not heard of the successor yet comes back, and is turned away again; so all frontends, however
many there are, have seen it when nobody has come for a while. Then the socket is closed (`CLOSE`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

#: For how long nobody has knocked when all frontends have seen the successor (seconds).
QUIET = 1.0
#: How long the frontends have from the successor's registration on, before the socket is closed anyway (seconds).
TURNING = 30.0


class Act(str, Enum):
    """What to do with the socket now."""

    HOLD = "hold"
    TURN_AWAY = "turn away"
    CLOSE = "close"


@dataclass(frozen=True)
class Around:
    """What a hold is judged by. Times in seconds of one clock.

    `successor`: an engine of another life is registered. `candidate`: a shadow is parked or wakes; `candidate_since` is
    when the last one began to wake, 0 when none does. `cold_start`: how long a shadow that is still starting is waited
    for. `knocked`: when somebody was turned away last, 0 for never.
    """

    begun: float
    now: float
    successor: bool = False
    successor_since: float = 0.0
    candidate: bool = False
    candidate_since: float = 0.0
    promotion_timeout: float = 60.0
    cold_start: float = 0.0
    stopping: bool = False
    knocked: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What to do, why (for people, where it ends in nothing moved), and when to look again without news."""

    act: Act
    why: str = ""
    look_at: float | None = None


def judge(around: Around) -> Verdict:
    """What to do with one dead primary's socket."""
    now = around.now
    if around.stopping:
        return Verdict(Act.CLOSE, "the run is being stopped")
    if around.successor:
        calm = max(around.successor_since, around.knocked) + QUIET
        if now >= min(calm, around.successor_since + TURNING):
            return Verdict(Act.CLOSE)
        return Verdict(Act.TURN_AWAY)
    if around.candidate:
        # One that does not finish in time is killed for it; the next one has a deadline of its own.
        until = max(around.begun, around.candidate_since) + around.promotion_timeout
        if now < until:
            return Verdict(Act.HOLD, look_at=until)
        return Verdict(Act.CLOSE, f"no shadow took over within {around.promotion_timeout:g} s (promotion_timeout)")
    until = around.begun + around.cold_start
    if now < until:
        return Verdict(Act.HOLD, look_at=until)
    late = f", nor within {around.cold_start:g} s (hold_cold_start)" if around.cold_start else ""
    return Verdict(Act.CLOSE, f"no shadow is parked{late}")
