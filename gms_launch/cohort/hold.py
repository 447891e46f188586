"""What becomes of a dead primary's listening socket, and when. Pure: no I/O, no clock.

While the primary lives, its agent has a second descriptor of the socket that it takes requests on, and does nothing
with it (`listener`). When the primary dies the kernel goes on completing connections there, so that nobody is refused:
the frontends wait (`HOLD`) instead of failing. Once the successor is registered whoever waits is turned away
(`TURN_AWAY`), which makes a frontend move the request on, with the tokens that it has. One that has not heard of the
successor yet comes back, and is turned away again. The dead lease stands until every frontend has been seen to ask the
successor (`forget`): one that hears of both at once drops the dead engine before its router knows the new one, and
loses what it is about to send. When nobody has come for a while after that, the socket is closed (`CLOSE`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

#: For how long nobody has knocked, with the dead lease over, when the socket is closed (seconds).
QUIET = 1.0
#: How long the frontends have from the successor's registration on; one that is frozen may never see it (seconds).
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
    for. `seen`: when every living frontend had asked the successor, 0 as long as one has not. `knocked`: when somebody
    was turned away last, 0 for never.
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
    seen: float = 0.0
    knocked: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What to do, why (for people, where it ends in nothing moved), and when to look again without news.

    `forget`: the frontends may be told that the dead one is gone.
    """

    act: Act
    why: str = ""
    look_at: float | None = None
    forget: bool = False


def judge(around: Around) -> Verdict:
    """What to do with one dead primary's socket."""
    now = around.now
    if around.stopping:
        return Verdict(Act.CLOSE, "the run is being stopped")
    if around.successor:
        late = now >= around.successor_since + TURNING
        if late or (around.seen and now >= max(around.seen, around.knocked) + QUIET):
            return Verdict(Act.CLOSE, forget=True)
        return Verdict(Act.TURN_AWAY, forget=around.seen > 0.0)
    if around.candidate:
        # One that does not finish in time is killed for it; the next one has a deadline of its own.
        until = max(around.begun, around.candidate_since) + around.promotion_timeout
        if now < until:
            return Verdict(Act.HOLD, look_at=until)
        return Verdict(Act.CLOSE, f"no shadow took over within {around.promotion_timeout:g} s (promotion_timeout)")
    until = around.begun + around.cold_start
    if now < until:
        return Verdict(Act.HOLD, look_at=until)
    nor = f", nor within {around.cold_start:g} s (hold_cold_start)" if around.cold_start else ""
    return Verdict(Act.CLOSE, f"no shadow is parked{nor}")
