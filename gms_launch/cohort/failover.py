"""Failovers, read from the run's events. Pure.

`fold` turns the list of events into one `Failover` for each primary that died, with the time of every step. Times are
seconds after the fault: the kill if gms-launch sent it, else the moment the exit was seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gms_launch.control.records import EventRecord

#: The steps in the order they are expected, and what each means.
STEPS: Mapping[str, str] = {
    "detected": "a rank's exit was seen",
    "dead": "no process of the cohort is alive on any node",
    "lock": "the shadow has the lock",
    "awake": "weights and KV are mapped",
    "registered": "the shadow is in discovery, or says that it serves",
    "first_token": "a token came through the frontend",
    "fenced": "proved dead on every node",
    "rearmed": "a fresh shadow is parked in the dead slot",
}


@dataclass(frozen=True)
class Failover:
    """One failover. `steps` maps a step to seconds after the fault; a missing step has not happened."""

    time: float
    cause: str
    victim: tuple[int, int]
    promoted: tuple[int, int] | None = None
    steps: Mapping[str, float] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return "first_token" in self.steps and "rearmed" in self.steps

    def to_json(self) -> dict[str, object]:
        def life(value: tuple[int, int] | None) -> dict[str, int] | None:
            return None if value is None else {"cohort_id": value[0], "incarnation": value[1]}

        return {
            "time": self.time,
            "cause": self.cause,
            "victim": life(self.victim),
            "promoted": life(self.promoted),
            "complete": self.complete,
            "steps": {k: round(self.steps[k], 6) for k in STEPS if k in self.steps},
        }


def fold(events: Iterable[EventRecord], nnodes: int = 1) -> list[Failover]:
    """Every failover in `events`, oldest first."""
    ordered = sorted(events, key=lambda e: e.time)
    found: list[_Builder] = []
    # The lock falls a moment before a death is seen, so the shadow may have it before the fault is known.
    since_lock: list[EventRecord] = []
    for event in ordered:
        life = (event.cohort_id, event.incarnation)
        if event.kind == "lock":
            since_lock = []
        since_lock.append(event)
        if event.kind in ("kill", "exit") and event.data.get("role") == "primary":
            known = next((b for b in found if b.victim == life), None)
            if known is None:
                known = _Builder(event.time, event.detail, life, nnodes)
                found.append(known)
                for earlier in since_lock[:-1]:
                    known.take(earlier)
            if event.kind == "exit":
                known.step("detected", event.time)
            continue
        for builder in found:
            builder.take(event)
    return [b.build() for b in found]


class _Builder:
    """Collects the steps of one failover."""

    def __init__(self, time: float, cause: str, victim: tuple[int, int], nnodes: int) -> None:
        self.time, self.cause, self.victim = time, cause, victim
        self._nnodes = nnodes
        self._steps: dict[str, float] = {}
        self._promoted: tuple[int, int] | None = None
        self._nodes: dict[str, set[int]] = {"dead": set(), "fenced": set()}

    def step(self, name: str, time: float) -> None:
        self._steps.setdefault(name, max(0.0, time - self.time))

    def take(self, event: EventRecord) -> None:
        life = (event.cohort_id, event.incarnation)
        if life == self.victim and event.kind in self._nodes:
            # Done when the last node says so.
            self._nodes[event.kind].add(event.node_rank)
            if len(self._nodes[event.kind]) == self._nnodes:
                self.step(event.kind, event.time)
        elif event.kind == "lock" and self._promoted is None and life != self.victim:
            self._promoted = life
            self.step("lock", event.time)
        elif life == self._promoted and event.kind in ("awake", "registered", "first_token"):
            self.step(event.kind, event.time)
        elif event.kind == "parked" and event.cohort_id == self.victim[0] and event.incarnation > self.victim[1]:
            self.step("rearmed", event.time)

    def build(self) -> Failover:
        return Failover(self.time, self.cause, self.victim, self._promoted, self._steps)
