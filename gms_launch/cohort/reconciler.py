"""What one node has to do next. Pure: a snapshot in, a list of actions out.

Level-triggered: it compares what should run with what does, so a lost or repeated message changes nothing. The fast
path is here: a rank whose cohort lost a member anywhere is killed at once, without asking the controller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gms_launch.cohort.model import ALIVE, ENDED, Phase


@dataclass(frozen=True)
class LocalRank:
    """This node's rank of a cohort slot. `gone`: its own process has exited."""

    cohort_id: int
    incarnation: int
    phase: Phase
    gone: bool = False


@dataclass(frozen=True)
class PeerRank:
    """Another node's rank, as its record says."""

    cohort_id: int
    incarnation: int
    node_rank: int
    phase: Phase


@dataclass(frozen=True)
class Desire:
    """What the controller wants of a slot: that this life runs, or that it is dead."""

    cohort_id: int
    incarnation: int
    running: bool
    master_port: int
    why: str = ""


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


Action = StartRank | KillRank


def decide(
    desired: Mapping[int, Desire], local: Mapping[int, LocalRank], peers: Mapping[tuple[int, int], PeerRank]
) -> list[Action]:
    """The actions that bring this node closer to what is wanted. `peers` is keyed by (cohort id, node rank)."""
    actions: list[Action] = []
    for cohort_id, rank in sorted(local.items()):
        if rank.phase in ALIVE and (reason := _why_kill(rank, desired.get(cohort_id), peers)):
            actions.append(KillRank(cohort_id, rank.incarnation, reason))
    for cohort_id, desire in sorted(desired.items()):
        mine = local.get(cohort_id)
        if desire.running and (
            mine is None or (mine.incarnation < desire.incarnation and mine.phase in (Phase.PENDING, Phase.FENCED))
        ):
            actions.append(StartRank(desire))
    return actions


def _why_kill(rank: LocalRank, desire: Desire | None, peers: Mapping[tuple[int, int], PeerRank]) -> str:
    if rank.gone:
        return "its own process exited"
    for peer in peers.values():
        if (peer.cohort_id, peer.incarnation) == (rank.cohort_id, rank.incarnation) and peer.phase in ENDED:
            return f"rank {peer.node_rank} of the same life ended"
    if desire is None:
        return ""  # the store may have been wiped: keep what runs
    if desire.incarnation > rank.incarnation:
        return f"life {desire.incarnation} is wanted"
    if desire.incarnation == rank.incarnation and not desire.running:
        return desire.why or "the controller wants it dead"
    return ""
