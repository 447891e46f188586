"""What the controller may want to be done. Pure data: who carries it out is the leader's agent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """Want the next life of a slot to run."""

    cohort_id: int
    incarnation: int
    why: str


@dataclass(frozen=True)
class Kill:
    """Want a life dead on all nodes."""

    cohort_id: int
    incarnation: int
    why: str


@dataclass(frozen=True)
class KillPart:
    """Kill one rank only, for a drill: `node_rank` of a life."""

    cohort_id: int
    incarnation: int
    node_rank: int


@dataclass(frozen=True)
class GiveUp:
    """Start a slot no more."""

    cohort_id: int
    incarnation: int
    why: str


@dataclass(frozen=True)
class Answer:
    """Answer a user's request."""

    uuid: str
    ok: bool
    detail: str
    cohort_id: int = -1
    incarnation: int = 0


@dataclass(frozen=True)
class Abort:
    """End the run: it never came up, or a node stayed away. `late` when a deadline passed; cohort -1 for no cohort."""

    cohort_id: int
    incarnation: int
    why: str
    late: bool = False


@dataclass(frozen=True)
class LoseNodes:
    """From now on these nodes are taken for lost, and no others: what they say of their ranks does not count."""

    lost: tuple[int, ...]


@dataclass(frozen=True)
class NewGms:
    """Every node shall end its GMS servers, whose memory nobody uses any more, and start new, empty ones."""

    why: str


@dataclass(frozen=True)
class Activate:
    """Let go of the lock that a parked life waits for."""

    cohort_id: int
    incarnation: int


@dataclass(frozen=True)
class Roll:
    """From now on lives are started with these engine arguments; None for those that the last were started with."""

    engine_args: tuple[str, ...] | None


@dataclass(frozen=True)
class Proved:
    """A life of the newest generation has parked: there is no way back to the one before."""

    cohort_id: int
    incarnation: int


@dataclass(frozen=True)
class RollBack:
    """The newest generation does not start: go back to the arguments before."""

    cohort_id: int
    incarnation: int
    why: str


Action = Activate | Roll | Proved | RollBack | Start | Kill | KillPart | GiveUp | Answer | Abort | LoseNodes | NewGms
