"""What one node has to do next. Pure: a snapshot in, a list of actions out.

Level-triggered: it compares what should run with what does, so a lost or repeated message changes nothing. The fast
path is here: a rank whose cohort lost a member anywhere is killed at once, without asking the controller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gms_launch.cohort.model import ALIVE, Phase

#: How the reason begins when a rank is killed for another's sake: everybody knows by then.
PEER_ENDED = "a rank of the same life ended"


@dataclass(frozen=True)
class LocalRank:
    """This node's rank of a cohort slot. `gone`: its own process has exited; `let_go`: it has got its lock from us."""

    cohort_id: int
    incarnation: int
    phase: Phase
    gone: bool = False
    let_go: bool = False


@dataclass(frozen=True)
class Desire:
    """What the controller wants of a slot: that this life runs, or that it is dead.

    `engine_args` take the place of this agent's own, unless they are None. `serve`: it is to get its private lock.
    """

    cohort_id: int
    incarnation: int
    running: bool
    master_port: int
    why: str = ""
    engine_args: tuple[str, ...] | None = None
    master_addr: str = ""
    serve: bool = False


@dataclass(frozen=True)
class StartRank:
    """Start this node's rank of a life."""

    desire: Desire


@dataclass(frozen=True)
class KillRank:
    """Kill this node's rank of a life, and fence it."""

    cohort_id: int
    incarnation: int
    reason: str


@dataclass(frozen=True)
class SkipRank:
    """Never start this node's rank of a life, and say that it is dead here: the life ended before it began."""

    cohort_id: int
    incarnation: int


@dataclass(frozen=True)
class LetGo:
    """Let go of the private lock that this node's rank of a life waits for: it is to serve, here and everywhere."""

    cohort_id: int
    incarnation: int


Action = StartRank | KillRank | SkipRank | LetGo


def decide(
    desired: Mapping[int, Desire],
    local: Mapping[int, LocalRank],
    ended: Mapping[tuple[int, int], int],
    group_kill: bool = True,
) -> list[Action]:
    """The actions that bring this node closer to what is wanted.

    `ended` says of which lives (cohort id, incarnation) a rank has ended, and on which node, wherever that is.
    `group_kill` False leaves a rank alone whose peers are gone: a test's view of life without a launcher.
    """
    actions: list[Action] = []
    for cohort_id, rank in sorted(local.items()):
        if rank.phase in ALIVE and (reason := _why_kill(rank, desired.get(cohort_id), ended if group_kill else {})):
            actions.append(KillRank(cohort_id, rank.incarnation, reason))
    for cohort_id, desire in sorted(desired.items()):
        mine = local.get(cohort_id)
        if mine is not None and (
            mine.incarnation >= desire.incarnation or mine.phase not in (Phase.PENDING, Phase.FENCED)
        ):
            continue
        if desire.running and (desire.cohort_id, desire.incarnation) not in ended:
            actions.append(StartRank(desire))
        else:
            actions.append(SkipRank(cohort_id, desire.incarnation))
    killed = {a.cohort_id for a in actions if isinstance(a, KillRank)}
    actions += [LetGo(k, local[k].incarnation) for k in desired if k not in killed and _may_serve(desired[k], local)]
    return actions


def _may_serve(desire: Desire, local: Mapping[int, LocalRank]) -> bool:
    """Whether a rank is to have its lock now. Whoever had one before it here must be proved dead by then: the leader
    has seen to that, and two that serve on one node would be worse than none.
    """
    mine = local.get(desire.cohort_id)
    if mine is None or not (desire.serve and desire.running) or mine.incarnation != desire.incarnation:
        return False
    before = [r for r in local.values() if r.let_go and r is not mine]
    return mine.phase in ALIVE and not mine.gone and not mine.let_go and all(r.phase is Phase.FENCED for r in before)


def _why_kill(rank: LocalRank, desire: Desire | None, ended: Mapping[tuple[int, int], int]) -> str:
    if rank.gone:
        return "its own process exited"
    if (node_rank := ended.get((rank.cohort_id, rank.incarnation))) is not None:
        return f"{PEER_ENDED}: rank {node_rank}"
    if desire is None:
        return ""  # the store may have been wiped: keep what runs
    if desire.incarnation > rank.incarnation:
        return f"life {desire.incarnation} is wanted"
    if desire.incarnation == rank.incarnation and not desire.running:
        return desire.why or "the controller wants it dead"
    return ""
