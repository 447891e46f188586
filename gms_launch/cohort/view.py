"""What the controller is shown of a run, what it remembers and how patient it is. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gms_launch.cohort.model import Phase


@dataclass(frozen=True)
class Policy:
    """Times in seconds. `limit` failed starts in `window` give a slot up.

    `activate`: who serves is decided here (--activation agent), and not by whoever gets the lock first.
    `group_kill` False: start cohorts and then watch them die, as if there were no launcher (a test switch).
    """

    cohorts: int
    start_timeout: float
    promotion_timeout: float
    backoff: float
    backoff_max: float
    window: float
    limit: int
    node_wait: float = 300.0
    group_kill: bool = True
    activate: bool = False


class Sightings:
    """When the leader first saw each slot in its phase, by its own clock: the records' times are other nodes'."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Phase, float]] = {}

    def since(self, cohort_id: int, incarnation: int, phase: Phase, now: float) -> float:
        """When that was seen first; `now` if it is new."""
        known = self._seen.get(cohort_id)
        if known is None or known[:2] != (incarnation, phase):
            known = self._seen[cohort_id] = (incarnation, phase, now)
        return known[2]


@dataclass(frozen=True)
class Slot:
    """One cohort slot: the wanted life, what the records say of it, and since when it was seen in its phase.

    `generation` counts the rolls that had been asked for when this life was started.
    """

    cohort_id: int
    incarnation: int
    running: bool
    given_up: bool
    phase: Phase
    since: float
    exit: str = ""
    leftovers: tuple[int, ...] = ()
    generation: int = 0

    @property
    def life(self) -> tuple[int, int]:
        return self.cohort_id, self.incarnation


@dataclass(frozen=True)
class KillRequest:
    """A user's wish: kill the primary, or (scope leader, rank:N) a part of it.

    `to` is the cohort that shall take over, -1 for any; `cause` the verb that was used.
    """

    uuid: str
    scope: str
    force: bool
    to: int = -1
    cause: str = "kill-primary"


@dataclass(frozen=True)
class RollRequest:
    """A user's wish: restart the shadows with other engine arguments; None for those that they have."""

    uuid: str
    engine_args: tuple[str, ...] | None = None


Request = KillRequest | RollRequest


@dataclass(frozen=True)
class View:
    """The run as the leader sees it. `generation` is the one that lives are started with; `rolling` until one of it has
    parked. `confirmed` is the life that last served a token, as (cohort, incarnation).

    `absent` are nodes without a lease now, by node rank, with a name for people; `lost` those that are taken for lost.
    `gms_down` names the nodes with a dead GMS; `gms_restarting` until every node has the new ones that were wanted.
    `lock_keeper` is a process that keeps the lock and is of no living cohort. `hung` are lives that serve no tokens
    although their processes live, with the reason. `no_token` says why the life that has registered last has given none
    yet, as far as the frontend tells; `asked_since`: that is held against it from then on (infinite: not yet).
    `heard_since`: since when it has heard of the others without a gap (infinite: it does not now). How long they are
    away is counted from then on, since what they did in between nobody has told it.
    """

    slots: Mapping[int, Slot]
    confirmed: tuple[int, int] | None
    requests: tuple[Request, ...] = ()
    absent: Mapping[int, str] = field(default_factory=dict)
    lost: tuple[int, ...] = ()
    gms_down: tuple[str, ...] = ()
    gms_restarting: bool = False
    lock_keeper: str = ""
    hung: Mapping[tuple[int, int], str] = field(default_factory=dict)
    generation: int = 0
    rolling: bool = False
    no_token: str = ""
    asked_since: float = 0.0
    heard_since: float = 0.0


@dataclass(frozen=True)
class Tries:
    """Starts of a slot that failed of late: how many, of how many allowed, how the last ended, when the next may be."""

    failed: int = 0
    limit: int = 0
    last_exit: str = ""
    not_before: float = 0.0


@dataclass(frozen=True)
class Memory:
    """What the controller remembers. `failures` are times of failed starts by slot, `failed_as` is how the last ended.

    `initial` until redundancy was full once: until then a failure ends the run, since a start that fails is a
    mistake that somebody is there to see. `judged` are lives whose end was counted; `not_before` by slot. `served` are
    lives that gave a token. `activated` is the life that was last told to serve (at `activated_at`), `successor` the
    cohort that a user wants next.
    """

    initial: bool = True
    failures: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    failed_as: Mapping[int, str] = field(default_factory=dict)
    judged: frozenset[tuple[int, int]] = frozenset()
    not_before: Mapping[int, float] = field(default_factory=dict)
    best: Mapping[tuple[int, int], Phase] = field(default_factory=dict)
    served: frozenset[tuple[int, int]] = frozenset()
    lost_primary: float | None = None
    absent_since: Mapping[int, float] = field(default_factory=dict)
    activated: tuple[int, int] | None = None
    activated_at: float = 0.0
    successor: int = -1
