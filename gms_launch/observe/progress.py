"""How a start goes, in words: the note of a cohort that starts, and a line for every step that is over. Pure.

`Narrator` is shown snapshots and the time of a clock that nobody sets, and returns lines for people. What it counted
is handed to `starts`, and what that knows comes back with the records (`RankRecord.step_last`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from gms_launch.cohort.model import Phase, Redundancy
from gms_launch.cohort.steps import Step
from gms_launch.numbers import numbered
from gms_launch.observe.snapshot import CohortStatus, Snapshot
from gms_launch.observe.starts import Starts

#: Stages after the steps of a start, by the phase of the cohort.
AFTER = {Phase.PARKED: "parked", Phase.WAKING: "lock", Phase.ACTIVE: "registered"}
FIRST_TOKEN = "first token"
_GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """The weights in the memory service, all nodes together. Bytes; None or 0 when nobody tells."""

    allocated: int | None
    allocations: int
    total: int
    committed: bool

    @classmethod
    def of(cls, shot: Snapshot) -> Memory:
        found = [g for n in shot.nodes for g in n.gms if g.tag == "weights"]
        sizes = [g.allocated_bytes for g in found]
        return cls(
            allocated=None if None in sizes else sum(s or 0 for s in sizes),
            allocations=sum(g.allocations for g in found),
            total=shot.nodes[0].model.weights if shot.nodes else 0,
            committed=bool(found) and all(g.committed for g in found),
        )

    @property
    def text(self) -> str:
        """How much of the weights is there; empty when nothing is."""
        if not self.allocations:
            return ""
        if self.allocated is None:
            return f"{self.allocations} allocations"
        whole = f" of {self.total / _GIB:.2f}" if self.total else ""
        # Tensors that every GPU has are there more than once, and allocations are rounded up.
        return f"{min(self.allocated, self.total or self.allocated) / _GIB:.2f}{whole} GiB"


def step_of(cohort: CohortStatus) -> str:
    """The step that a starting cohort is at; empty for one that does not start."""
    if cohort.phase is not Phase.STARTING:
        return ""
    return next((r.step for r in cohort.ranks if r.node_rank == 0), "")


def note(cohort: CohortStatus, shot: Snapshot, now: float) -> str:
    """What a starting cohort is doing, for how long, and how long that took last time. `now` is Unix time."""
    step = step_of(cohort)
    if not step:
        absent = shot.nnodes - len(shot.lost) - len(cohort.ranks)
        return (
            f"waiting for its ranks on {numbered(absent, 'node')}"
            if cohort.phase is Phase.STARTING and absent > 0
            else ""
        )
    leader = next(r for r in cohort.ranks if r.node_rank == 0)
    text = step + _weights(step, cohort.cohort_id, Memory.of(shot))
    text += f" for {max(0.0, now - leader.step_since):.0f} s"
    return text + (f" (last time {leader.step_last:.0f} s)" if leader.step_last else "")


def _weights(step: str, cohort_id: int, memory: Memory) -> str:
    if step != Step.WEIGHTS.value:
        return ""
    if cohort_id > 0 and not memory.committed:
        return f" (cohort 0 writes them: {memory.text})" if memory.text else " (cohort 0 writes them)"
    return f" ({memory.text})" if memory.text else ""


@dataclass
class _Seen:
    incarnation: int
    stage: str
    since: float
    began: float
    last: float = 0.0
    #: Steps may be told later than the phase: what a life has left behind, it does not come back to.
    took: dict[str, float] = field(default_factory=dict)


class Narrator:
    """Remembers which stage each cohort was at, and says when it gets to the next. Times in seconds of one clock."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def see(self, shot: Snapshot, confirmed: Collection[tuple[int, int]], now: float) -> list[str]:
        """Lines for what is new in `shot`. `confirmed` are lives, as (cohort, incarnation), that gave a token."""
        lines = []
        for cohort in shot.cohorts:
            served = (cohort.cohort_id, cohort.incarnation) in confirmed
            stage = FIRST_TOKEN if served else step_of(cohort) or AFTER.get(cohort.phase, "")
            if not stage:
                continue
            seen = self._seen.get(cohort.cohort_id)
            leader = next((r for r in cohort.ranks if r.node_rank == 0), None)
            last = leader.step_last if leader else 0.0
            # Steps may begin and end between two looks: their rank remembers them.
            over = dict(leader.steps) if leader and leader.incarnation == cohort.incarnation else {}
            if seen is None or seen.incarnation != cohort.incarnation:
                first = next(iter(over), stage)
                usual = last if first == stage else 0.0
                seen = self._seen[cohort.cohort_id] = _Seen(cohort.incarnation, first, now, now, usual)
                lines.append(f"cohort {cohort.cohort_id}: {first}{_usual(usual)}")
            missed = [step for step in over if step not in seen.took]
            for to in (*missed, stage):
                if to == seen.stage:
                    continue
                usual = last if to == stage else 0.0
                seen.took[seen.stage] = over.get(seen.stage, now - seen.since)
                lines.append(f"cohort {cohort.cohort_id}: {_line(seen, to, usual, Memory.of(shot), now)}")
                seen.stage, seen.since, seen.last = to, now, usual
        return lines

    def took(self) -> Mapping[int, Mapping[str, float]]:
        """How long the steps took that are over, by cohort."""
        steps = {s.value for s in Step}
        return {k: {n: t for n, t in seen.took.items() if n in steps} for k, seen in self._seen.items()}


def _usual(last: float) -> str:
    return f" (last time {last:.0f} s)" if last else ""


def _line(seen: _Seen, stage: str, last: float, memory: Memory, now: float) -> str:
    took = f"{seen.stage} took {seen.took[seen.stage]:.1f} s{_usual(seen.last)}"
    if seen.stage == Step.WEIGHTS.value and memory.text:
        took += f", {memory.text} are mapped"
    if stage in (*AFTER.values(), FIRST_TOKEN):
        # Parked may last for less than there is between two looks: whoever has the lock was parked.
        parked = f"{took}; parked {now - seen.began:.1f} s after its start"
        before = "" if seen.stage in AFTER.values() else f"{parked}; "
        if stage == "parked":
            return parked
        if stage == "lock":
            return f"{before}has the lock, waking"
        if stage == "registered":
            return before + ("registered in discovery" + ("" if before else f" {now - seen.since:.2f} s later"))
        return f"{before}first token {now - seen.began:.1f} s after its start"
    return f"{took}; {stage}{_usual(last)}"


class Teller:
    """Says how the first start goes, until every shadow is parked, and keeps what it took for the next one."""

    def __init__(self, starts: Starts, say: Callable[[str], None]) -> None:
        self._starts, self._say = starts, say
        self._narrator: Narrator | None = Narrator()

    def look(self, shot: Snapshot, confirmed: tuple[int, int] | None, now: float) -> None:
        """Take in a snapshot at `now` (seconds of one clock)."""
        if self._narrator is None:
            return
        for line in self._narrator.see(shot, {confirmed} if confirmed else (), now):
            self._say(line)
        if shot.redundancy is Redundancy.FULL:
            self._starts.save(self._narrator.took())
            self._narrator = None
