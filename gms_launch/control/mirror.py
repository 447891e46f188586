"""A local copy of a run's keys, typed, fed by a watch. Pure.

Records that cannot be read are left out and named in `problems`: one bad writer must not stop the reader.
"""

from __future__ import annotations

from typing import TypeVar

from gms_launch.cohort.dark import DarkRecord
from gms_launch.cohort.records import (
    AnswerRecord,
    CommandRecord,
    CommandResult,
    DesiredCohort,
    EndedRecord,
    LeadRecord,
    NodeRecord,
    PeersRecord,
    QuestionRecord,
    RankRecord,
    Record,
    RecordError,
    RunRecord,
    SeatRecord,
)
from gms_launch.control.keys import Keys

R = TypeVar("R", bound=Record)


class Mirror:
    """What etcd holds of one group of a run, or of a run without groups.

    `groups` is what is said of each, in a run of some.
    """

    def __init__(self, run: str, group: str = "") -> None:
        self.group = group
        self.keys = Keys(run, group)
        self._clear()

    def _clear(self) -> None:
        self.run: RunRecord | None = None
        self.lead: LeadRecord | None = None
        self.groups: dict[str, RunRecord] = {}
        self.nodes: dict[int, NodeRecord] = {}
        self.desired: dict[int, DesiredCohort] = {}
        self.ranks: dict[tuple[int, int], RankRecord] = {}
        self.ended: dict[tuple[int, int], EndedRecord] = {}
        self.peers = PeersRecord()
        self.commands: dict[str, CommandRecord] = {}
        self.results: dict[str, CommandResult] = {}
        self.refusals: dict[str, str] = {}
        self.seats: dict[int, SeatRecord] = {}
        self.dark: dict[str, DarkRecord] = {}
        self.asked: dict[str, QuestionRecord] = {}
        self.answers: dict[str, AnswerRecord] = {}
        self.problems: dict[str, str] = {}

    def replace(self, snapshot: dict[str, bytes]) -> None:
        """Forget everything and take over a snapshot."""
        self._clear()
        for key, value in snapshot.items():
            self.apply(key, value)

    def apply(self, key: str, value: bytes | None) -> None:
        """Take over one change; None deletes."""
        self.problems.pop(key, None)
        keys = self.keys
        try:
            if key == keys.run:
                self.run = RunRecord.decode(value) if value is not None else None
            elif key == keys.lead:
                self.lead = LeadRecord.decode(value) if value is not None else None
            elif key.startswith(keys.groups):
                _set(self.groups, key[len(keys.groups) :], RunRecord, value)
            elif key == keys.peers:
                self.peers = PeersRecord.decode(value) if value is not None else PeersRecord()
            elif key.startswith(keys.nodes):
                _set(self.nodes, int(key[len(keys.nodes) :]), NodeRecord, value)
            elif key.startswith(keys.desired):
                _set(self.desired, int(key[len(keys.desired) :]), DesiredCohort, value)
            elif key.startswith(keys.ranks):
                cohort_id, _, node_rank = key[len(keys.ranks) :].partition("/")
                _set(self.ranks, (int(cohort_id), int(node_rank)), RankRecord, value)
            elif key.startswith(keys.ended):
                cohort_id, _, incarnation = key[len(keys.ended) :].partition("/")
                _set(self.ended, (int(cohort_id), int(incarnation)), EndedRecord, value)
            elif key.startswith(keys.seats):
                _set(self.seats, int(key[len(keys.seats) :]), SeatRecord, value)
            elif key.startswith(keys.dark):
                _set(self.dark, key[len(keys.dark) :], DarkRecord, value)
            elif key.startswith(keys.asked):
                _set(self.asked, key[len(keys.asked) :], QuestionRecord, value)
            elif key.startswith(keys.answers):
                _set(self.answers, key[len(keys.answers) :], AnswerRecord, value)
            elif key.startswith(keys.refusals):
                self.refusals[key] = (value or b"").decode(errors="replace")
            elif key.startswith(keys.commands):
                uuid, _, rest = key[len(keys.commands) :].partition("/")
                if rest == "result":
                    _set(self.results, uuid, CommandResult, value)
                else:
                    _set(self.commands, uuid, CommandRecord, value)
        except (RecordError, ValueError) as exc:
            self.problems[key] = str(exc)


K = TypeVar("K")


def _set(table: dict[K, R], key: K, kind: type[R], value: bytes | None) -> None:
    if value is None:
        table.pop(key, None)
    else:
        table[key] = kind.decode(value)
