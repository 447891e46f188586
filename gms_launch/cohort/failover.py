"""Failovers, read from the run's events. Pure.

`fold` turns the list of events into one `Failover` for each primary that died, with the time of every step. Times are
seconds after zero, the earliest sign of the fault (`ZEROS`). A fault that gms-launch did not cause itself is older than
that: by what the engine took to let go of the lock and to be seen dead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gms_launch.cohort.reconciler import PEER_ENDED
from gms_launch.cohort.records import EventRecord

#: The steps in the order they are expected, and what each means.
STEPS: Mapping[str, str] = {
    "detected": "a rank's exit was seen",
    "held": "requests for the dead one wait and are not refused",
    "dead": "no process of the cohort is alive on any node",
    "lock": "the shadow has the lock",
    "awake": "weights and KV are mapped",
    "registered": "the shadow is in discovery, or says that it serves",
    "released": "those that waited are sent on to the shadow",
    "first_token": "a token came through the frontend",
    "fenced": "proved dead on every node",
    "rearmed": "a fresh shadow is parked in the dead slot",
}


#: What zero can be.
ZEROS: Mapping[str, str] = {
    "kill": "gms-launch sent SIGKILL",
    "exit": "a rank's exit was seen; the fault is older",
    "lock": "the shadow got the lock, before a rank's exit was seen; the fault is older",
}
#: What is first seen of a primary's death, in a word: for counts, which free text is no label of.
CAUSES: Mapping[str, str] = {
    "exit": "a process of it ended by itself, or by somebody's signal",
    "hung": "it lived, and did not answer or served no tokens",
    "deadline": "it did not serve in time",
    "node_lost": "a node of it was cut off or went away",
    "gms": "its memory service was gone",
    "kill-primary": "somebody asked for it",
    "switch-over": "somebody asked for it",
    "roll": "somebody asked for it",
    "drill": "somebody asked for a part of it",
    "other": "anything else",
}
#: How the details of kills begin, or end, that no person asked for.
_KILLS = (("hung:", "hung"), ("not parked within", "deadline"), ("no token within", "deadline"), ("GMS on", "gms"))

#: A kill's own time, told by another process, counts only so shortly before the fault was seen (seconds).
KILL_SEEN = 5.0
#: An agent that stood still writes down what happened meanwhile until so long after it goes on (seconds).
CATCHES_UP = 1.0
#: Steps that come long after the outage is over.
_AFTERWARDS = frozenset({"fenced", "rearmed"})


@dataclass(frozen=True)
class Failover:
    """One failover. `steps` maps a step to seconds after `time`, which is `zero`; a missing step has not happened.

    `silence` is how long at most no token came through the frontend, in seconds; None when no look saw tokens before.
    `held` connections waited for the shadow; the frontend `moved` requests so often and `lost` so many meanwhile (None:
    not known, or not yet). `over` when nothing is held any more, or never was. `stood_still` is for how long an agent
    did nothing meanwhile, in seconds, and until when: the moments of that time are those at which it went on. `kind` is
    one of `CAUSES`, `group` empty in a run without.
    """

    time: float
    cause: str
    victim: tuple[int, int]
    promoted: tuple[int, int] | None = None
    steps: Mapping[str, float] = field(default_factory=dict)
    zero: str = "exit"
    silence: float | None = None
    held: int | None = None
    moved: int | None = None
    lost: int | None = None
    over: bool = True
    stood_still: tuple[float, float] | None = None
    kind: str = "other"
    group: str = ""

    @property
    def gap(self) -> float | None:
        """Seconds from zero to the first token of anybody after it: the least that a stream stood still.

        None when that is not known.
        """
        return None if self.stood_still else self.steps.get("first_token")

    def killed_at(self, moment: float) -> Failover:
        """The same from the moment of the kill that caused it, if that can be (another machine's clock may be off)."""
        earlier = self.time - moment
        if not 0 <= earlier <= KILL_SEEN:
            return self
        steps = {name: at + earlier for name, at in self.steps.items()}
        return replace(self, time=moment, steps=steps, zero="kill")

    @property
    def complete(self) -> bool:
        return "first_token" in self.steps and "rearmed" in self.steps

    def to_json(self) -> dict[str, object]:
        def life(value: tuple[int, int] | None) -> dict[str, int] | None:
            return None if value is None else {"cohort_id": value[0], "incarnation": value[1]}

        return {
            "time": self.time,
            "group": self.group,
            "zero": self.zero,
            "silence_at_most": None if self.silence is None else round(self.silence, 6),
            "cause": self.cause,
            "kind": self.kind,
            "victim": life(self.victim),
            "promoted": life(self.promoted),
            "complete": self.complete,
            "agent_stood_still": (
                None if self.stood_still is None else dict(zip(("seconds", "until"), self.stood_still, strict=True))
            ),
            "requests": {"held": self.held, "moved": self.moved, "lost": self.lost, "gap": self.gap},
            "steps": {k: round(self.steps[k], 6) for k in STEPS if k in self.steps},
        }


def fold(events: Iterable[EventRecord], nnodes: int = 1, sizes: Mapping[str, int] | None = None) -> list[Failover]:
    """Every failover in `events`, oldest first.

    A group says itself how many nodes it has; where that is not among the events, `sizes` tells, and else `nnodes`.
    """
    told: dict[str, list[EventRecord]] = {}
    for event in sorted(events, key=lambda e: e.time):
        told.setdefault(event.group, []).append(event)
    of_all = told.get("", [])  # what befell an agent concerns all of its groups
    found = [
        replace(failover, group=group)
        for group, own in told.items()
        for failover in _fold(
            sorted([*own, *of_all], key=lambda e: e.time) if group else own,
            _size(own, (sizes or {}).get(group, nnodes)),
        )
    ]
    return sorted(found, key=lambda f: f.time)


def _size(events: Iterable[EventRecord], nnodes: int) -> int:
    said = [n for e in events if e.kind == "group_formed" and isinstance(n := e.data.get("nodes"), int)]
    return said[-1] if said else nnodes


def _fold(ordered: Sequence[EventRecord], nnodes: int) -> list[Failover]:
    found: list[_Builder] = []
    # The lock falls a moment before a death is seen, so the shadow may have it before the fault is known.
    since_lock: list[EventRecord] = []
    for event in ordered:
        life = (event.cohort_id, event.incarnation)
        if event.kind == "lock":
            since_lock = []
        since_lock.append(event)
        for builder in found:
            builder.explain(event)
        if event.kind in ("kill", "exit") and event.data.get("role") == "primary":
            known = next((b for b in found if b.victim == life), None)
            if known is None:
                known = _Builder(event, nnodes)
                found.append(known)
                for earlier in since_lock[:-1]:
                    known.take(earlier)
            if event.kind == "exit":
                known.step("detected", event.time)
            continue
        for builder in found:
            builder.take(event)
    stalls = [
        (float(seconds), e.time)
        for e in ordered
        if e.kind == "stood_still" and isinstance(seconds := e.data.get("seconds"), (int, float))
    ]
    return [b.build(stalls) for b in found]


class _Builder:
    """Collects the steps of one failover."""

    def __init__(self, sign: EventRecord, nnodes: int) -> None:
        """`sign` is the first kill or exit of the victim."""
        self.victim = (sign.cohort_id, sign.incarnation)
        self._sign = sign
        self._cause = sign
        self._nnodes = nnodes
        self._at: dict[str, float] = {}
        self._promoted: tuple[int, int] | None = None
        self._nodes: dict[str, set[int]] = {"dead": set(), "fenced": set()}
        self._token_before: float | None = None
        self._holding: set[int] = set()
        self._counted: dict[int, Mapping[str, Any]] = {}  # by node: with hybrid load balancing each has what it held

    def step(self, name: str, time: float) -> None:
        self._at.setdefault(name, time)

    def explain(self, event: EventRecord) -> None:
        """Take what befell another node's rank for the cause, if the first sign is a kill that only followed from it.

        That kill may bear the earlier time: two agents' clocks differ by more than the word between them takes.
        """
        ended = event.kind in ("kill", "exit") and (event.cohort_id, event.incarnation) == self.victim
        if ended and self._cause.detail == f"{PEER_ENDED}: rank {event.node_rank}":
            self._cause = event

    def take(self, event: EventRecord) -> None:
        life = (event.cohort_id, event.incarnation)
        if life == self.victim and event.kind in self._nodes:
            # Done when the last node says so.
            self._nodes[event.kind].add(event.node_rank)
            if len(self._nodes[event.kind]) == self._nnodes:
                self.step(event.kind, event.time)
        elif life == self.victim and event.kind in ("held", "released"):
            if event.kind == "held":
                self._holding.add(event.node_rank)
            if event.kind == "held" or event.data.get("moved"):
                self.step(event.kind, event.time)
        elif life == self.victim and event.kind == "hold_over":
            self._counted[event.node_rank] = event.data
        elif event.kind == "lock" and self._promoted is None and life != self.victim:
            self._promoted = life
            self.step("lock", event.time)
        elif life == self._promoted and event.kind in ("awake", "registered", "first_token"):
            self.step(event.kind, event.time)
            before = event.data.get("token_after")
            if event.kind == "first_token" and self._token_before is None and isinstance(before, (int, float)):
                self._token_before = float(before)
        elif event.kind == "parked" and event.cohort_id == self.victim[0] and event.incarnation > self.victim[1]:
            self.step("rearmed", event.time)

    def _stood_still(self, stalls: Iterable[tuple[float, float]]) -> tuple[float, float] | None:
        """The longest of `stalls` (seconds, until) that a moment of the outage falls into."""
        moments = [self._sign.time, *(at for name, at in self._at.items() if name not in _AFTERWARDS)]
        return max(
            (
                (seconds, until)
                for seconds, until in stalls
                if any(until - seconds <= at <= until + CATCHES_UP for at in moments)
            ),
            default=None,
        )

    def _count(self, what: str, of_all: Callable[[list[int]], int]) -> int | None:
        """What the nodes that held requests say together; None where one does not know it."""
        said = [data.get(what) for data in self._counted.values()]
        known = [n for n in said if isinstance(n, int)]
        return of_all(known) if known and len(known) == len(said) else None

    def build(self, stalls: Iterable[tuple[float, float]] = ()) -> Failover:
        """`stalls` are the times in which an agent did nothing: for how many seconds, and until when."""
        stood_still = self._stood_still(stalls)
        zero, kind = self._sign.time, self._sign.kind
        if (lock := self._at.get("lock", zero)) < zero:
            zero, kind = lock, "lock"
        steps = {name: max(0.0, at - zero) for name, at in self._at.items()}
        token = self._at.get("first_token")
        silence = None if token is None or self._token_before is None else max(0.0, token - self._token_before)
        return Failover(
            zero,
            self._cause.detail,
            self.victim,
            self._promoted,
            steps,
            kind,
            silence,
            held=self._count("connections", sum),
            moved=self._count("moves", max),
            lost=None if stood_still else self._count("lost", max),
            over=self._holding <= self._counted.keys(),
            stood_still=stood_still,
            kind=_kind(self._cause),
        )


def _kind(sign: EventRecord) -> str:
    """Which of `CAUSES` a sign of a death shows."""
    if sign.kind == "exit" or sign.detail.startswith(PEER_ENDED):
        return "exit"
    if sign.detail in CAUSES:
        return sign.detail
    if sign.detail.endswith("was lost") or sign.detail.startswith("this node is cut off"):
        return "node_lost"
    return next((kind for begins, kind in _KILLS if sign.detail.startswith(begins)), "other")
