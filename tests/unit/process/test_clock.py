"""Who may look at the clock on the wall, and that nothing else depends on it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

import gms_launch
from gms_launch.cohort.model import Phase
from gms_launch.cohort.view import Sightings
from gms_launch.process import clock

ROOT = Path(gms_launch.__file__).parent
#: Modules that may, and what for. An agent's deadlines, durations and records are not among it.
MAY = {
    "process/scratch.py": "compared with file times",
    "process/clock.py": "the offset, once",
    "control/door.py": "how far two machines' clocks are apart",
    "control/authority.py": "from when a certificate is good",
    "services/certificate.py": "a certificate is good today, or nothing is started",
    "run/rendezvous.py": "an end in run.json is of this start or of an earlier one",
    "run/rundir.py": "how old a run.json of another machine is",
    "observe/words.py": "a run none of whose agents is on this machine",
    "engines/reference/metrics.py": "as upstream's metrics",
}


def test_nobody_else_asks_for_the_time_of_day() -> None:
    asks = re.compile(r"time\.time\(|datetime\.now|time\.time_ns\(|utcnow")
    found = {str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if asks.search(p.read_text())}
    commands = {name for name in found if name.startswith("cli/")}  # they stamp what they ask for and print
    assert found - commands - set(MAY) == set()


def test_moments_of_an_agent_keep_their_distances_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before, wall = clock.now(), time.time()
    for hours in (1, -1):
        monkeypatch.setattr(time, "time", lambda hours=hours: wall + hours * 3600)
        assert 0 <= clock.now() - before < 1000


def test_a_phase_is_timed_from_when_the_leader_saw_it_first() -> None:
    seen = Sightings()
    assert seen.since(0, 1, Phase.STARTING, 10.0) == 10.0
    assert seen.since(0, 1, Phase.STARTING, 99.0) == 10.0
    assert seen.since(0, 1, Phase.PARKED, 100.0) == 100.0
    assert seen.since(0, 2, Phase.PARKED, 101.0) == 101.0, "of another life"
    assert seen.since(1, 2, Phase.PARKED, 102.0) == 102.0
