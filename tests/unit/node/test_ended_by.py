"""How the end of a life is told, where its slot is given up or a roll goes back because of it."""

from __future__ import annotations

import pytest

from gms_launch.cohort.controller import RANK_ENDED
from gms_launch.cohort.model import Phase
from gms_launch.cohort.records import DesiredCohort, RankRecord, Wanted
from gms_launch.node import lead

LATE = "no token within 8 s of the lock (promotion_timeout)"


@pytest.mark.parametrize(
    ("wanted", "why", "exits", "told"),
    [
        (Wanted.DEAD, LATE, ["killed by SIGKILL"], LATE),
        (Wanted.DEAD, "exit code 1", ["killed by SIGKILL", "exit code 1"], "exit code 1"),
        (Wanted.DEAD, RANK_ENDED, ["", "exit code 1"], "exit code 1"),
        (Wanted.RUNNING, "re-arm", ["exit code 1"], "exit code 1"),
        (Wanted.RUNNING, "re-arm", [""], ""),
    ],
)
def test_what_a_life_was_killed_for_is_told_and_not_our_signal(
    wanted: Wanted, why: str, exits: list[str], told: str
) -> None:
    ranks = [RankRecord(0, k, 2, Phase.FENCED, exit=text) for k, text in enumerate(exits)]
    assert lead.ended_by(DesiredCohort(0, 2, wanted, 0, why), ranks) == told
